"""A client of the Mounts service that knows nothing of the server but containerd's protocol.

client.py SOCKET PROTOCOL_DIRECTORY IMAGE WRITABLE [activate | list | deactivate | refused USER | crowd USER]

Without a word at the end it tries everything. With one it does that with an activation of the name "kept", and prints what the
server tells of all. "refused" asks as another user, whom the server does not let in; "crowd" as one whom it lets in, and who has
as many connections as a user may have.

The classes of the messages are made by protoc from the protocol's files.
"""
import concurrent.futures
import os
import socket
import subprocess
import sys
import tempfile

import grpc

SOCKET, PROTOCOL, IMAGE, WRITABLE = sys.argv[1:5]
SERVICE = "containerd.services.mounts.v1.Mounts"

classes = tempfile.TemporaryDirectory()
subprocess.run(
    ["protoc", "-I", PROTOCOL, "--python_out", classes.name,
     "containerd/types/mount.proto", "containerd/services/mounts/v1/mounts.proto"],
    check=True)
sys.path.insert(0, classes.name)
from containerd.services.mounts.v1 import mounts_pb2 as mounts  # noqa: E402
from containerd.types import mount_pb2 as types  # noqa: E402
from google.protobuf import empty_pb2  # noqa: E402

ANSWERS = {"Activate": mounts.ActivateResponse, "Deactivate": empty_pb2.Empty,
           "Info": mounts.InfoResponse, "Update": mounts.UpdateResponse, "List": mounts.ListMessage}


def connect():
    """One of its own, which is not shared with an earlier channel."""
    return grpc.insecure_channel("unix:" + SOCKET, options=[("grpc.use_local_subchannel_pool", 1)])


channel = connect()


def call(method, request, namespace="default"):
    kind = channel.unary_stream if method == "List" else channel.unary_unary
    stub = kind(f"/{SERVICE}/{method}", request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=ANSWERS[method].FromString)
    metadata = [("containerd-namespace", namespace)] if namespace else []
    answer = stub(request, metadata=metadata, timeout=60)
    return list(answer) if method == "List" else answer


def refused(code, method, request, **more):
    try:
        call(method, request, **more)
    except grpc.RpcError as error:
        assert error.code() == code, error
        return error.details()
    raise AssertionError(f"{method} was not refused")


layer = types.Mount(type="erofs", source=IMAGE, options=["ro", "loop"])
writable = types.Mount(type="mkfs/ext4", source=WRITABLE, options=[
    "rw", "loop", "X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=16MiB"])
overlay = types.Mount(type="format/mkdir/overlay", source="overlay", options=[
    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
    "workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 1 }}"])
request = mounts.ActivateRequest(name="one", mounts=[writable, layer, overlay], labels={"a.b": "1"})

if sys.argv[5:6] == ["refused"]:
    os.seteuid(int(sys.argv[6]))
    try:
        print(refused(grpc.StatusCode.PERMISSION_DENIED, "List", mounts.ListRequest()))
        # Many who say nothing are not all waited for.
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(20)]
        for peer in crowd:
            peer.settimeout(60)
            peer.connect(SOCKET)
        assert 0 < sum(len(peer.recv(1)) for peer in crowd) <= 16
    finally:
        # The classes are of the first user.
        os.seteuid(os.getuid())
    sys.exit()

if sys.argv[5:6] == ["crowd"]:
    os.seteuid(int(sys.argv[6]))
    try:
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(512)]
        for peer in crowd:
            peer.settimeout(60)
            peer.connect(SOCKET)
        print(refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "List", mounts.ListRequest()))
    finally:
        os.seteuid(os.getuid())
    channel = connect()
    assert call("List", mounts.ListRequest()) == []
    sys.exit()

if sys.argv[5:]:
    if sys.argv[5] == "activate":
        request.name = "kept"
        call("Activate", request)
    if sys.argv[5] == "deactivate":
        call("Deactivate", mounts.DeactivateRequest(name="kept"))
    print(*call("List", mounts.ListRequest()))
    sys.exit()

info = call("Activate", request).info
assert info.name == "one" and info.labels == {"a.b": "1"} and not info.system, info
assert [active.mount.type for active in info.active] == ["ext4", "erofs", "overlay"], info
assert all(active.mounted_at.seconds > 0 for active in info.active), info
root = info.active[2].mount_point
assert open(root + "/a").read() == "base"
open(root + "/written", "w").close()
refused(grpc.StatusCode.ALREADY_EXISTS, "Activate", request)
assert call("Info", mounts.InfoRequest(name="one")).info == info
assert [message.info for message in call("List", mounts.ListRequest())] == [info]
assert call("List", mounts.ListRequest(filters=['labels."a.b"==2'])) == []
assert call("List", mounts.ListRequest(), namespace="other") == []
update = mounts.UpdateRequest(info=types.ActivationInfo(name="one", labels={"c": "2"}))
update.update_mask.paths.append("labels")
assert call("Update", update).info.labels == {"c": "2"}
user = open(root + "/a")
details = refused(grpc.StatusCode.FAILED_PRECONDITION, "Deactivate", mounts.DeactivateRequest(name="one"))
assert root in details, details
user.close()
call("Deactivate", mounts.DeactivateRequest(name="one"))
refused(grpc.StatusCode.NOT_FOUND, "Info", mounts.InfoRequest(name="one"))
refused(grpc.StatusCode.FAILED_PRECONDITION, "List", mounts.ListRequest(), namespace=None)
refused(grpc.StatusCode.UNIMPLEMENTED, "Activate", mounts.ActivateRequest(
    name="none", mounts=[types.Mount(type="tmpfs", source="tmpfs")]))
wrong = mounts.ActivateRequest(name="wrong", mounts=[types.Mount(
    type="format/bind", source="{{ mount 7 }}" * 100000)])
details = refused(grpc.StatusCode.INVALID_ARGUMENT, "Activate", wrong)
assert details.startswith("mount 0 of the list"), details

with concurrent.futures.ThreadPoolExecutor(16) as pool:
    names = [f"many-{number}" for number in range(64)]
    many = [mounts.ActivateRequest(name=name, mounts=[layer]) for name in names]
    points = {answer.info.active[0].mount_point for answer in pool.map(lambda one: call("Activate", one), many)}
    assert len(points) == 1, points
    assert len(call("List", mounts.ListRequest(filters=["name~=^many-"]))) == 64
    list(pool.map(lambda name: call("Deactivate", mounts.DeactivateRequest(name=name)), names))
assert call("List", mounts.ListRequest()) == []
print("done")
