//! A mount with a name outlives a program that is killed: another goes on with it, and a clean-up knows it from what is dead.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::{Held, assert_nothing_left, hold, image, in_kernel, run, temp};
use rustix::process::Signal;
use tempfile::TempDir;

/// A clean-up is about all runs, also that of the test next door: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is asked for: two layers and a scratch at `tree`, under a name of this test's own.
struct Wanted {
    dir: TempDir,
    name: String,
}

impl Wanted {
    fn new(test: &str) -> Self {
        let dir = temp();
        image("ext4", dir.path().join("a.ext4"), &[("a", "of a")]);
        image("erofs", dir.path().join("b.erofs"), &[("b", "of b")]);
        let name = format!("{test}-{}", std::process::id());
        Wanted { dir, name }
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("made/tree")
    }

    fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let (a, b, at) = (path("a.ext4"), path("b.erofs"), path("made/tree"));
        let words = [
            "--name",
            &self.name,
            "--scratch",
            "8M",
            "--layer",
            &a,
            "--layer",
            &b,
            "--at",
            &at,
        ];
        words.map(str::to_owned).to_vec()
    }

    fn hold(&self) -> Held {
        hold(self.arguments()).unwrap_or_else(|answer| panic!("{answer}"))
    }

    fn resume(&self) -> Held {
        hold(["--resume", &self.name]).unwrap_or_else(|answer| panic!("{answer}"))
    }

    /// Whether a clean-up says that it keeps this mount.
    #[track_caller]
    fn is_kept(&self) -> bool {
        let answer = run(["cleanup", "--json"]);
        let resumable = answer.json()["resumable"].as_array().unwrap().clone();
        resumable.iter().any(|kept| kept["name"] == *self.name)
    }
}

fn kill(held: Held) {
    held.kill();
}

#[test]
fn root_a_named_mount_is_resumed_after_each_kill_with_what_was_written() {
    let _alone = alone();
    let wanted = Wanted::new("resumed");
    let file = wanted.tree().join("new");
    let held = wanted.hold();
    let first = held.json.clone();
    fs::write(&file, "written before").unwrap();
    kill(held);
    let left = in_kernel(wanted.dir.path().file_name().unwrap());
    assert!(wanted.is_kept());
    assert_eq!(in_kernel(wanted.dir.path().file_name().unwrap()), left);
    let again: Vec<String> = [vec!["mount".to_owned()], wanted.arguments()].concat();
    run(&again).says(1, &["there is a mount with the name", "--resume"]);

    for round in 0..2 {
        let held = wanted.resume();
        assert_eq!(held.json["layers"], first["layers"]);
        assert_eq!(held.json["scratch"], first["scratch"]);
        assert_eq!(fs::read_to_string(&file).unwrap(), "written before");
        assert_eq!(fs::read_to_string(wanted.tree().join("b")).unwrap(), "of b");
        fs::write(wanted.tree().join(round.to_string()), "written after").unwrap();
        run(["mount", "--resume", &wanted.name]).says(1, &["is alive"]);
        assert!(!wanted.is_kept());
        kill(held);
    }
    let held = wanted.resume();
    assert!(wanted.tree().join("0").exists() && wanted.tree().join("1").exists());
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &wanted.dir);
    assert!(!wanted.dir.path().join("made").exists());
    run(["mount", "--resume", &wanted.name]).says(1, &["there is no mount with the name"]);
}

#[test]
fn root_what_can_be_resumed_is_removed_only_on_request() {
    let _alone = alone();
    let wanted = Wanted::new("unwanted");
    kill(wanted.hold());
    assert!(wanted.is_kept());
    let text = run(["cleanup", "--dry-run"]);
    text.says(0, &[]);
    assert!(
        text.stdout.contains(&format!("--resume {}", wanted.name)),
        "{text}"
    );
    run(["cleanup", "--resumable"]).says(0, &[]);
    assert_eq!(
        in_kernel(wanted.dir.path().file_name().unwrap()),
        Vec::<String>::new()
    );
    assert!(!wanted.is_kept());
    assert!(!wanted.dir.path().join("made").exists());
}

#[test]
fn root_a_named_mount_that_is_killed_at_any_moment_of_its_set_up_can_be_ended() {
    let _alone = alone();
    let wanted = Wanted::new("moments");
    let name = wanted.dir.path().file_name().unwrap();
    for moment in 0..12 {
        let mut command = common::program(["mount"]);
        command.args(wanted.arguments());
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(moment * 12));
        child.kill().unwrap();
        child.wait().unwrap();
        match hold(["--resume", &wanted.name]) {
            Ok(held) => {
                assert_eq!(fs::read_to_string(wanted.tree().join("a")).unwrap(), "of a");
                let answer = held.end(Signal::TERM);
                answer.says(0, &["nothing is left"]);
            }
            // It was killed before the name was written down, or before the stack was whole.
            Err(answer) => {
                assert_eq!(answer.code, Some(1), "{answer}");
                run(["cleanup"]).says(0, &[]);
            }
        }
        assert_eq!(
            in_kernel(name),
            Vec::<String>::new(),
            "after {moment} times 12 ms"
        );
        assert!(!wanted.is_kept());
    }
    assert!(Path::new(&wanted.dir.path().join("a.ext4")).exists());
}
