//! `blockmount serve` as a service manager and a client see it.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::servers::{Server, name, socket};
use common::{in_kernel, run, signal, temp};
use rustix::process::Signal;
use tempfile::TempDir;

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
    let server = Server::ready(&dir, &[]);
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
    server.kill();

    let cleanup = run(["cleanup", "--dry-run"]);
    let advice = format!("blockmount serve --name {}", name(&dir));
    assert!(cleanup.stdout.contains(&advice), "{cleanup}");
    let resumed = run(["mount", "--resume", &name(&dir)]);
    assert!(
        resumed.stderr.contains("the activations of a server"),
        "{resumed}"
    );

    let server = Server::ready(&dir, &[]);
    assert_eq!(client(&dir, &["list"]), kept);
    signal(server.pid(), Signal::HUP);
    server.hears("RELOADING=1\nMONOTONIC_USEC=");
    server.hears("READY=1");
    let answer = server.end();
    answer.says(0, &["1 activated, which stay"]);
    assert!(!socket(&dir).exists());

    let server = Server::ready(&dir, &[]);
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
    let server = Server::start(&dir, &by_manager, &[]);
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
