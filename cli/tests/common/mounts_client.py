"""A client of the Mounts service that does what it is told: an object of JSON for each call on stdin, one for each answer on stdout.

mounts_client.py SOCKET PROTOCOL_DIRECTORY [USER]

{"call": "Activate", "request": {...}}                            -> {"answer": {...}} or {"code": "NOT_FOUND", "details": "..."}
{"all": [{"call": ..., "request": ...}, ...]}, all at once        -> {"all": [...]}

With the number of a user it connects as that one. Requests and answers are messages of containerd's protocol in the JSON of protocol buffers. List answers with a list.
"""
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile

import grpc

SOCKET, PROTOCOL = sys.argv[1:3]
SERVICE = "containerd.services.mounts.v1.Mounts"

classes = tempfile.TemporaryDirectory()
subprocess.run(
    ["protoc", "-I", PROTOCOL, "--python_out", classes.name,
     "containerd/types/mount.proto", "containerd/services/mounts/v1/mounts.proto"],
    check=True)
sys.path.insert(0, classes.name)
from containerd.services.mounts.v1 import mounts_pb2 as mounts  # noqa: E402
from google.protobuf import empty_pb2, json_format  # noqa: E402

REQUESTS = {"Activate": mounts.ActivateRequest, "Deactivate": mounts.DeactivateRequest, "Info": mounts.InfoRequest,
            "Update": mounts.UpdateRequest, "List": mounts.ListRequest}
ANSWERS = {"Activate": mounts.ActivateResponse, "Deactivate": empty_pb2.Empty, "Info": mounts.InfoResponse,
           "Update": mounts.UpdateResponse, "List": mounts.ListMessage}
if sys.argv[3:]:
    os.seteuid(int(sys.argv[3]))
channel = grpc.insecure_channel("unix:" + SOCKET)


def call(asked):
    method = asked["call"]
    request = json_format.ParseDict(asked.get("request", {}), REQUESTS[method]())
    kind = channel.unary_stream if method == "List" else channel.unary_unary
    stub = kind(f"/{SERVICE}/{method}", request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=ANSWERS[method].FromString)
    try:
        answer = stub(request, metadata=[("containerd-namespace", "default")], timeout=300)
        if method == "List":
            return {"answer": [json_format.MessageToDict(message) for message in answer]}
        return {"answer": json_format.MessageToDict(answer)}
    except grpc.RpcError as error:
        return {"code": error.code().name, "details": error.details()}


for line in sys.stdin:
    asked = json.loads(line)
    if "all" in asked:
        with concurrent.futures.ThreadPoolExecutor(len(asked["all"])) as pool:
            answer = {"all": list(pool.map(call, asked["all"]))}
    else:
        answer = call(asked)
    print(json.dumps(answer), flush=True)
# The classes are of the first user.
os.seteuid(os.getuid())
