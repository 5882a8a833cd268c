//! `blockmount serve` as a service manager and a client see it.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{Answer, LONGEST, finish, in_kernel, kill_after, program, run, signal, temp};
use rustix::process::Signal;
use tempfile::TempDir;

/// A server with a directory of its own, and what it tells its service manager.
struct Server {
    child: Child,
    notified: UnixDatagram,
}

fn socket(dir: &TempDir) -> PathBuf {
    dir.path().join("socket")
}

/// The name of the servers of one test.
fn name(dir: &TempDir) -> String {
    let name = dir.path().file_name().unwrap().to_str().unwrap();
    format!("test{name}")
}

impl Server {
    fn start(dir: &TempDir, before: &[&str]) -> Self {
        let path = dir.path().join("notify");
        let _absent = fs::remove_file(&path);
        let notified = UnixDatagram::bind(&path).unwrap();
        notified.set_read_timeout(Some(LONGEST)).unwrap();
        let server = program(["serve", "--log-format", "json", "--name", &name(dir)]);
        let mut command = Command::new(before.first().map_or(server.get_program(), AsRef::as_ref));
        command.args(before.iter().skip(1));
        if !before.is_empty() {
            command.arg(server.get_program());
        }
        let config = dir.path().join("serve.toml");
        let text = format!("address = {:?}\nallow-users = [65534]\n", socket(dir));
        fs::write(&config, text).unwrap();
        let child = command
            .args(server.get_args())
            .arg("--config")
            .arg(config)
            .env("NOTIFY_SOCKET", path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Server { child, notified }
    }

    fn ready(dir: &TempDir) -> Self {
        let server = Server::start(dir, &[]);
        server.hears("READY=1");
        server
    }

    #[track_caller]
    fn hears(&self, expected: &str) {
        let mut heard = [0; 256];
        let length = self.notified.recv(&mut heard).unwrap();
        let heard = String::from_utf8_lossy(&heard[..length]);
        assert!(heard.starts_with(expected), "{heard}");
    }

    fn end(self) -> Answer {
        signal(self.child.id(), Signal::TERM);
        let watch = kill_after(self.child.id(), LONGEST);
        let answer = finish(self.child);
        drop(watch);
        answer
    }
}

/// What a client that is not ours says.
#[track_caller]
fn client(dir: &TempDir, word: &[&str]) -> String {
    let containerd = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backends/containerd");
    let output = Command::new("/usr/bin/python3")
        .arg(containerd.join("tests/service/client.py"))
        .args([socket(dir), containerd.join("protocol/proto"), image(dir)])
        .arg(dir.path().join("rw.img"))
        .args(word)
        .env_remove("PYTHONPATH")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

fn image(dir: &TempDir) -> PathBuf {
    dir.path().join("base.erofs")
}

fn directory() -> TempDir {
    let dir = temp();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("a"), "base").unwrap();
    let mut mkfs = Command::new("mkfs.erofs");
    let made = mkfs.arg("--quiet").args([&image(&dir), &tree]).status();
    assert!(made.unwrap().success());
    dir
}

#[track_caller]
fn assert_nothing_left(dir: &TempDir) {
    let mark = dir.path().file_name().unwrap();
    assert_eq!(in_kernel(mark), Vec::<String>::new());
    assert!(!socket(dir).exists());
    let runs = fs::read_dir("/run/blockmount").unwrap();
    let files = runs.map(|run| run.unwrap().path().join("mount.json"));
    let of_test =
        |file: &PathBuf| fs::read_to_string(file).is_ok_and(|text| text.contains(&name(dir)));
    assert_eq!(files.filter(of_test).count(), 0);
}

#[test]
fn root_a_server_outlives_kill_9_and_ends_with_nothing_left() {
    let _alone = common::alone();
    let dir = directory();
    let server = Server::ready(&dir);
    let mode = socket(&dir).metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(client(&dir, &[]), "done\n");
    // Another at the same address, or of the same name, is refused.
    let second = run(["serve", "--address", socket(&dir).to_str().unwrap()]);
    assert!(second.stderr.contains("cannot listen at"), "{second}");
    let elsewhere = dir.path().join("elsewhere");
    let second = run([
        "serve",
        "--name",
        &name(&dir),
        "--address",
        elsewhere.to_str().unwrap(),
    ]);
    assert!(second.stderr.contains("is alive"), "{second}");
    fs::remove_file(elsewhere).unwrap_or_default();

    let kept = client(&dir, &["activate"]);
    assert!(kept.contains("name: \"kept\""), "{kept}");
    let Server { mut child, .. } = server;
    child.kill().unwrap();
    child.wait().unwrap();

    let cleanup = run(["cleanup", "--dry-run"]);
    let advice = format!("blockmount serve --name {}", name(&dir));
    assert!(cleanup.stdout.contains(&advice), "{cleanup}");
    let resumed = run(["mount", "--resume", &name(&dir)]);
    assert!(
        resumed.stderr.contains("the activations of a server"),
        "{resumed}"
    );

    let server = Server::ready(&dir);
    assert_eq!(client(&dir, &["list"]), kept);
    signal(server.child.id(), Signal::HUP);
    server.hears("RELOADING=1\nMONOTONIC_USEC=");
    server.hears("READY=1");
    let answer = server.end();
    answer.says(0, &["1 activated, which stay"]);
    assert!(!socket(&dir).exists());

    let server = Server::ready(&dir);
    assert_eq!(client(&dir, &["deactivate"]), "\n");
    server.end().says(0, &[]);
    assert_nothing_left(&dir);
}

#[test]
fn root_a_server_takes_the_socket_of_its_service_manager() {
    let _alone = common::alone();
    let dir = directory();
    let listen = format!("--listen={}", socket(&dir).display());
    let by_manager = ["systemd-socket-activate", "-E", "NOTIFY_SOCKET", &listen];
    let server = Server::start(&dir, &by_manager);
    common::eventually("a socket", || socket(&dir).exists());
    assert_eq!(client(&dir, &["list"]), "\n");
    server.hears("READY=1");
    server.end().says(0, &[]);
    // It is the manager's to remove.
    fs::remove_file(socket(&dir)).unwrap();
    assert_nothing_left(&dir);
}

#[test]
fn root_a_file_of_a_server_that_makes_no_sense_is_named() {
    let dir = temp();
    let file = dir.path().join("serve.toml");
    for (text, words) in [
        ("wonder = 1", "unknown field `wonder`"),
        ("grace = \"soon\"", "grace in"),
        ("guest = \"moon\"", "guest in"),
        ("name = \"\"", "holder's name"),
    ] {
        fs::write(&file, text).unwrap();
        let answer = run(["serve", "--config", file.to_str().unwrap()]);
        assert!(answer.stderr.contains(words), "{answer}");
        answer.says(2, &["serve.toml"]);
    }
}
