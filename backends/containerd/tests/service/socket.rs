//! The socket: who may use it, a client that we did not write, and the end of the server.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockmount_containerd::service::{Activations, Peers, listen, serve};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::kit::Machine;

/// How long an event may take on a machine that is busy.
const TIMEOUT: Duration = Duration::from_secs(60);

struct Server {
    socket: PathBuf,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Server {
    fn start(machine: &Machine, activations: &Activations) -> Self {
        let peers = Peers::default();
        assert!(!peers.has_others());
        Self::start_for(machine, activations, peers)
    }

    fn start_for(machine: &Machine, activations: &Activations, peers: Peers) -> Self {
        let socket = machine.at("socket");
        let listener = listen(&socket).unwrap();
        let (stop, stopped) = oneshot::channel();
        let ended = async { drop(stopped.await) };
        let serving = serve(listener, activations.clone(), peers, ended);
        let serving = tokio::spawn(serving);
        Server {
            socket,
            stop,
            serving,
        }
    }

    async fn end(self) {
        self.stop.send(()).unwrap();
        let ended = tokio::time::timeout(TIMEOUT, self.serving).await;
        ended.unwrap().unwrap();
    }
}

/// What a client says that is not ours.
async fn client(machine: &Machine, image: &Path, words: &[&str]) -> String {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // That of the system, which has the packages of `tests/setup.sh all`.
    let mut client = Command::new("/usr/bin/python3");
    client
        .arg(here.join("tests/service/client.py"))
        .args([&machine.at("socket"), &here.join("protocol/proto"), image])
        .arg(machine.at("rw.img"))
        .args(words)
        .env_remove("PYTHONPATH");
    let output = tokio::task::spawn_blocking(move || client.output());
    let output = output.await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_client_in_python_that_knows_the_protocol_alone_works() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let activations = machine.activations().await;
    let server = Server::start(&machine, &activations);
    assert_eq!(client(&machine, &base, &[]).await, "done\n");
    server.end().await;
    machine.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_socket_is_its_owners_and_processes_of_others_are_refused() {
    let machine = Machine::new();
    let activations = machine.activations().await;
    let before = rustix::process::umask(rustix::fs::Mode::empty());
    let server = Server::start(&machine, &activations);
    rustix::process::umask(before);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&server.socket), 0o600);
    // A server is there, and nothing beside the socket is left.
    let again = listen(&server.socket).unwrap_err();
    assert_eq!(again.kind(), std::io::ErrorKind::AddrInUse);
    assert!(
        !machine
            .at(&format!("socket.{}", std::process::id()))
            .exists()
    );

    // Also where the permissions let everybody in.
    for path in [&server.socket, &machine.at("")] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    let said = client(&machine, Path::new("none"), &["refused", "65534"]).await;
    assert!(said.contains("of user 65534 may not"), "{said}");
    server.end().await;
    // What a server has left is replaced; anything else is not.
    drop(listen(&machine.at("socket")).unwrap());
    std::fs::write(machine.at("file"), "").unwrap();
    let taken = listen(&machine.at("file")).unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AlreadyExists);
}

#[tokio::test(flavor = "multi_thread")]
async fn root_connections_of_one_user_keep_nobody_else_out() {
    let machine = Machine::new();
    let activations = machine.activations().await;
    let peers = Peers::default();
    peers.allow_only([65534]);
    let server = Server::start_for(&machine, &activations, peers);
    for path in [&server.socket, &machine.at("")] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    let said = client(&machine, Path::new("none"), &["crowd", "65534"]).await;
    assert!(said.contains("user 65534 have 512 connections"), "{said}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_server_ends_without_clients_that_say_nothing_or_nonsense() {
    let machine = Machine::new();
    let activations = machine.activations().await;
    let server = Server::start(&machine, &activations);
    let silent = UnixStream::connect(&server.socket).unwrap();
    let mut nonsense = UnixStream::connect(&server.socket).unwrap();
    let heard = tokio::task::spawn_blocking(move || {
        std::io::Write::write_all(&mut nonsense, &[b'x'; 4096]).unwrap();
        let mut heard = Vec::new();
        // It is disconnected, with or without a reason.
        drop(nonsense.read_to_end(&mut heard));
    });
    tokio::time::timeout(TIMEOUT, heard).await.unwrap().unwrap();
    server.end().await;
    drop(silent);
}
