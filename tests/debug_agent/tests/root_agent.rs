//! The agent as an ordinary process: what a host asks for over a socket is done on this machine.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use blockmount::{DeviceLocator, ErrorKind, LayerCombiner, MountOptions, Mounter, Overlay};
use blockmount_debug_agent::kit::serving::{Serving, is_mounted};
use blockmount_debug_agent::kit::{Answer, as_nobody, in_kernel, temp};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use tempfile::TempDir;

const AGENT: &str = env!("CARGO_BIN_EXE_agent-under-test");

fn agent() -> Serving {
    agent_in(temp())
}

fn agent_in(dir: TempDir) -> Serving {
    Serving::agent(AGENT, dir)
}

fn run<const N: usize>(arguments: [&str; N]) -> Answer {
    let mut command = std::process::Command::new(AGENT);
    command.args(arguments);
    blockmount_debug_agent::kit::run(command)
}

#[tokio::test]
async fn root_a_host_stacks_layers_as_an_overlay_through_the_agent() {
    let agent = agent();
    let root = agent.path("root");
    for name in ["top", "base"] {
        fs::create_dir_all(root.join(name)).unwrap();
        fs::write(root.join(name).join("name"), name).unwrap();
    }
    fs::write(root.join("base/only"), "base").unwrap();
    let overlay = Overlay::new(
        [root.join("top"), root.join("base")],
        root.join("made/tree"),
    );
    let guest = agent.guest().await;
    guest.combine(&overlay).await.unwrap();
    let read = |name: &str| fs::read_to_string(overlay.target.join(name)).unwrap();
    assert_eq!(
        (read("name"), read("only")),
        ("top".to_owned(), "base".to_owned())
    );

    // A host that comes back finds what it has made, whoever serves it then.
    for _ in 0..20 {
        guest.channel().close();
        let stream = agent.connect().await;
        guest.channel().reconnect(stream).await.unwrap();
    }
    let used = fs::File::open(overlay.target.join("name")).unwrap();
    let busy = guest.separate(&overlay.target).await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    drop(used);
    guest.separate(&overlay.target).await.unwrap();
    assert!(
        !root.join("made").exists(),
        "what the agent made is removed"
    );
    assert_eq!(
        in_kernel(agent.dir.path().file_name().unwrap()),
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn root_what_a_killed_or_ended_agent_has_mounted_is_undone_by_the_next() {
    let mut dir = temp();
    for with in [Signal::TERM, Signal::KILL] {
        let agent = agent_in(dir);
        let layer = agent.path("root/layer");
        fs::create_dir_all(&layer).unwrap();
        let overlay = Overlay::new([layer], agent.path("root/made/tree"));
        let guest = agent.guest().await;
        guest.combine(&overlay).await.unwrap();
        dir = agent.end(with).1;
        assert!(is_mounted(&overlay.target), "after {with:?}");

        let next = agent_in(dir);
        let stream = next.connect().await;
        guest.channel().reconnect(stream).await.unwrap();
        guest.separate(&overlay.target).await.unwrap();
        assert!(!is_mounted(&overlay.target) && !next.path("root/made").exists());
        dir = next.end(Signal::TERM).1;
    }
}

#[test]
fn root_two_agents_do_not_share_a_journal() {
    let agent = agent();
    let (second, journal) = (agent.path("second"), agent.path("journal"));
    let answer = run([
        "--unix",
        second.to_str().unwrap(),
        "--journal",
        journal.to_str().unwrap(),
    ]);
    answer.says(1, &["cannot use the journal in"]);
    assert!(!second.exists());
}

#[tokio::test]
async fn root_targets_outside_of_the_roots_are_refused_and_nothing_is_made() {
    let agent = agent();
    let guest = agent.guest().await;
    let device: DeviceLocator = "scsi:0/3".parse().unwrap();
    let root = agent.path("root");
    fs::create_dir_all(&root).unwrap();
    std::os::unix::fs::symlink(agent.dir.path(), root.join("link")).unwrap();
    let climbs = format!("{}/../outside", root.display());
    let outside = [
        agent.path("outside"),
        root.clone(),
        root.join("link/outside"),
        agent.path("root2/x"),
        climbs.into(),
        "/mnt".into(),
        "/etc/x".into(),
    ];
    let layer = root.join("layer");
    fs::create_dir(&layer).unwrap();
    for target in &outside {
        let mounted = guest
            .mount(&device, target, &MountOptions::read_only())
            .await;
        let overlay = Overlay::new([&layer], target);
        for refused in [mounted, guest.combine(&overlay).await] {
            let kind = refused.unwrap_err().kind();
            assert!(
                matches!(kind, ErrorKind::Invalid | ErrorKind::Conflict),
                "{target:?}: {kind:?}"
            );
        }
    }
    let mut left: Vec<_> = fs::read_dir(agent.dir.path())
        .unwrap()
        .flatten()
        .map(|e| e.file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["journal", "root", "socket"]);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 2);

    // Inside, only the device is what is missing.
    let missing = guest
        .mount(&device, &root.join("x"), &MountOptions::read_only())
        .await;
    let kind = missing.unwrap_err().kind();
    assert!(
        matches!(kind, ErrorKind::Unsuitable | ErrorKind::NotFound),
        "{kind:?}"
    );
}

#[test]
fn root_the_end_leaves_no_socket_and_a_killed_agent_is_replaced() {
    for with in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (answer, dir) = agent().end(with);
        answer.says(0, &[]);
        let left = fs::read_dir(dir.path()).unwrap().flatten();
        let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["journal"]);
    }
    let (answer, dir) = agent().end(Signal::KILL);
    assert_eq!(answer.code, None);
    assert!(dir.path().join("socket").exists());
    let (answer, dir) = agent_in(dir).end(Signal::TERM);
    answer.says(0, &[]);
    assert!(!dir.path().join("socket").exists());
}

#[test]
fn root_a_place_that_is_taken_is_refused_and_left_alone() {
    let agent = agent();
    let socket = agent.socket();
    let other = agent.path("other");
    fs::write(&other, "theirs").unwrap();
    for path in [&socket, &other] {
        let third = agent.path("third");
        let journal = agent.path("journal of the third");
        let answer = run([
            "--journal",
            journal.to_str().unwrap(),
            "--unix",
            third.to_str().unwrap(),
            "--unix",
            path.to_str().unwrap(),
        ]);
        answer.says(1, &["cannot listen on", path.to_str().unwrap()]);
        assert!(!third.exists(), "the socket that could be made is removed");
    }
    assert_eq!(fs::read_to_string(&other).unwrap(), "theirs");
    std::os::unix::net::UnixStream::connect(&socket).unwrap();
}

#[test]
fn root_the_agent_is_for_root() {
    let dir = temp();
    let socket = dir.path().join("socket");
    let arguments = ["--unix", socket.to_str().unwrap()];
    let mut command = as_nobody(AGENT, dir.path(), arguments);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("sudo blockmount-agent"));
    assert!(!socket.exists());
}

/// A pair of pseudo terminals: the host's end, and the path of the agent's.
fn serial_line() -> (fs::File, String) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let host = openpt(flags).unwrap();
    grantpt(&host).unwrap();
    unlockpt(&host).unwrap();
    let path = ptsname(&host, Vec::new()).unwrap();
    (host.into(), path.into_string().unwrap())
}

/// Asks for a version over a line, until the agent answers: it may still be throwing away what came before.
fn negotiate(mut line: &fs::File) {
    let hello = br#"{"Hello":{"min":1,"max":1,"software":"a test"}}"#;
    let size = u32::try_from(12 + hello.len()).unwrap();
    let frame = [&size.to_le_bytes()[..], &7_u64.to_le_bytes(), hello].concat();
    for _ in 0..20 {
        line.write_all(&frame).unwrap();
        let mut answer = Vec::new();
        while has_input(line) {
            let mut bytes = [0; 4096];
            let length = line.read(&mut bytes).unwrap();
            answer.extend(&bytes[..length]);
            let body = answer.get(12..).unwrap_or_default();
            if let Ok(body) = serde_json::from_slice::<serde_json::Value>(body) {
                assert_eq!(answer[4..12], 7_u64.to_le_bytes());
                assert_eq!(body["Chosen"]["version"], 1, "{body}");
                return;
            }
        }
    }
    panic!("the agent does not answer on the line");
}

fn has_input(line: &fs::File) -> bool {
    let mut fds = [PollFd::new(line, PollFlags::IN)];
    let timeout = Timespec::try_from(Duration::from_secs(2)).unwrap();
    rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0
}

#[tokio::test]
async fn root_a_serial_line_is_raw_and_garbage_ends_only_a_conversation() {
    let (mut line, path) = serial_line();
    let dir = temp();
    let journal = dir.path().join("journal").to_str().unwrap().to_owned();
    let arguments = ["--serial", &path, "--journal", &journal];
    let agent = Serving::start(AGENT, dir, &arguments);
    for _ in 0..3 {
        negotiate(&line);
        line.write_all(&[0; 16]).unwrap();
    }
    drop(line);
    // The line hung up; whoever comes by another way is served on.
    let guest = agent.guest().await;
    guest.unmount(Path::new("/run/mounts/x")).await.unwrap();
}
