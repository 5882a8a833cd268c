//! A mount with a name outlives a program that is killed: another goes on with it, and a clean-up knows it from what is dead.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{
    self, Answer, Held, alone, assert_nothing_left, by_name, hold, image, in_kernel, run, temp,
};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

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

    /// Removes what is kept under this name, and of other names nothing: a test beside this one may have some that is
    /// left, and said.
    #[track_caller]
    fn discard(&self, run_id: &str) -> Answer {
        let answer = run(["cleanup", "--json", &format!("--resumable={}", self.name)]);
        let items = answer.json()["items"].as_array().unwrap().clone();
        let (ours, others): (Vec<_>, Vec<_>) =
            items.into_iter().partition(|item| item["run"] == run_id);
        let is_removed = |item: &Value| item["outcome"] == "removed";
        assert!(!ours.is_empty() && ours.iter().all(is_removed), "{answer}");
        let is_left = others.iter().any(|item| !item["outcome"]["left"].is_null());
        assert_eq!(answer.code, Some(i32::from(is_left)), "{answer}");
        answer
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

    /// Holds it, writes a file to it, kills the program, and says where its scratch and its records are.
    fn killed_with_a_file(&self) -> Killed {
        let held = self.hold();
        let scratch = PathBuf::from(held.json["scratch"]["source"].as_str().unwrap());
        let mounted = PathBuf::from(held.json["scratch"]["path"].as_str().unwrap());
        fs::write(self.tree().join("precious"), PRECIOUS).unwrap();
        shell(&["sync", "-f", self.tree().to_str().unwrap()]);
        let said = held.kill();
        let records = Path::new("/run/blockmount").join(common::run_id(&said).unwrap());
        Killed {
            scratch,
            mounted,
            records,
        }
    }

    /// Ends a resumed mount, which has the file that was written before.
    #[track_caller]
    fn end_with_the_file(&self, held: Held) {
        let precious = fs::read_to_string(self.tree().join("precious"));
        assert_eq!(precious.unwrap(), PRECIOUS);
        held.end(Signal::TERM).says(0, &["nothing is left"]);
    }

    /// Whether a clean-up says that it keeps this mount.
    #[track_caller]
    fn is_kept(&self) -> bool {
        let answer = run(["cleanup", "--json"]);
        let resumable = answer.json()["resumable"].as_array().unwrap().clone();
        resumable.iter().any(|kept| kept["name"] == *self.name)
    }
}

const PRECIOUS: &str = "what must not be lost";

/// A named mount whose program was killed.
struct Killed {
    scratch: PathBuf,
    mounted: PathBuf,
    records: PathBuf,
}

impl Killed {
    #[track_caller]
    fn assert_precious_is_there(&self, answer: &Answer) {
        let image = fs::read(&self.scratch).unwrap_or_else(|error| panic!("{error}: {answer}"));
        let precious = PRECIOUS.as_bytes();
        let is_there = image.windows(precious.len()).any(|part| part == precious);
        assert!(is_there, "the scratch has lost the file: {answer}");
    }

    /// Cuts a record to part of its length.
    fn cut(&self, name: &str, length: impl Fn(u64) -> u64) {
        let path = self.records.join(name);
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(length(file.metadata().unwrap().len()))
            .unwrap();
    }
}

fn shell(words: &[&str]) {
    let status = Command::new(words[0]).args(&words[1..]).status().unwrap();
    assert!(status.success(), "{words:?}");
}

/// A shell that works in a directory, until it is dropped.
struct User(std::process::Child);

impl User {
    fn of(directory: &Path) -> Self {
        let mut command = Command::new("sleep");
        User(command.arg("600").current_dir(directory).spawn().unwrap())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Who gives up on a tree that is in use leaves all of it, from the tree down to the disks.
#[test]
fn root_r01_who_gives_up_on_a_busy_tree_leaves_what_is_below_it() {
    let _alone = alone();
    let wanted = Wanted::new("r01");
    let mut held = wanted.hold();
    fs::write(wanted.tree().join("precious"), PRECIOUS).unwrap();
    let user = User::of(&wanted.tree());
    common::signal(held.pid(), Signal::TERM);
    let said = held.wait_for("another signal");
    let before = in_kernel(wanted.dir.path().file_name().unwrap());
    let answer = held.end(Signal::TERM);
    assert_eq!(answer.code, Some(1), "{said}{answer}");
    let after = in_kernel(wanted.dir.path().file_name().unwrap());
    assert_eq!(after, before, "{answer}");
    let precious = fs::read_to_string(wanted.tree().join("precious"));
    assert_eq!(precious.unwrap(), PRECIOUS, "{answer}");
    drop(user);
    common::clean_up(&["--resumable"]);
    assert_eq!(in_kernel(wanted.dir.path().file_name().unwrap()), [""; 0]);
}

/// The layers were unmounted by hand, and the tree is in use: each program that would go on with it says so, none makes
/// it worse, and once it is free it is taken apart.
#[test]
fn root_r02_layers_that_are_gone_do_not_lose_the_rest() {
    let _others = by_name();
    let wanted = Wanted::new("r02");
    let held = wanted.hold();
    let layers = held.json["layers"].as_array().unwrap().clone();
    let user = User::of(&wanted.tree());
    let run_id = common::run_id(&held.kill()).unwrap().to_owned();
    for layer in layers {
        shell(&["umount", layer["path"].as_str().unwrap()]);
    }
    // The second time, the first one has been through it.
    for _ in 0..2 {
        let answer = run(["mount", "--resume", &wanted.name]);
        assert_ne!(answer.code, Some(0), "{answer}");
        assert!(
            !answer.stderr.contains("makes no sense")
                && !answer.stderr.contains("which mount each layer is"),
            "{answer}"
        );
        assert!(wanted.tree().join("b").exists(), "{answer}");
    }
    drop(user);
    wanted.discard(&run_id);
    assert_eq!(in_kernel(wanted.dir.path().file_name().unwrap()), [""; 0]);
}

fn kill(held: Held) {
    held.kill();
}

#[test]
fn root_a_named_mount_is_resumed_after_each_kill_with_what_was_written() {
    let _others = by_name();
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
    run(&again).says(
        1,
        &["there is a mount or a server with the name", "--resume"],
    );

    for round in 0..2 {
        let held = wanted.resume();
        assert_eq!(held.json["layers"], first["layers"]);
        assert_eq!(held.json["scratch"], first["scratch"]);
        assert_eq!(fs::read_to_string(&file).unwrap(), "written before");
        assert_eq!(fs::read_to_string(wanted.tree().join("b")).unwrap(), "of b");
        fs::write(wanted.tree().join(round.to_string()), "written after").unwrap();
        let process = format!("process {}", held.pid());
        run(["mount", "--resume", &wanted.name]).says(1, &["is alive", &process]);
        run(&again).says(1, &[&process, "choose another name"]);
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
fn root_r20_a_mount_that_is_killed_while_it_is_set_up_does_not_keep_its_name() {
    let _alone = alone();
    let wanted = Wanted::new("moments");
    let other = Wanted::new("beside");
    let precious = other.killed_with_a_file();
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
                held.end(Signal::TERM).says(0, &["nothing is left"]);
            }
            // It was killed before its user was told that it is up, and nobody can have written to it.
            Err(answer) => {
                answer.says(1, &["there is no mount with the name"]);
                assert!(!wanted.is_kept(), "after {moment} times 12 ms");
            }
        }
        run(["cleanup"]);
        let left = in_kernel(name);
        assert!(left.is_empty(), "after {moment} times 12 ms: {left:?}");
        assert!(other.is_kept());
    }
    // A service that is started again comes up at once.
    wanted
        .hold()
        .end(Signal::TERM)
        .says(0, &["nothing is left"]);
    let held = other.resume();
    assert!(precious.scratch.exists());
    other.end_with_the_file(held);
}

/// A resume that cannot be, which must leave the mount to the next one.
fn resume_leaves_it_as_it_was(test: &str, said: &str, resume: impl FnOnce(Command) -> Command) {
    let wanted = Wanted::new(test);
    let killed = wanted.killed_with_a_file();
    let name = wanted.dir.path().file_name().unwrap();
    let before = in_kernel(name);
    let mut command = resume(common::program(["mount", "--resume", &wanted.name]));
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(said), "{stderr}");
    assert_eq!(in_kernel(name), before, "{stderr}");
    assert!(wanted.is_kept() && killed.records.exists(), "{stderr}");
    wanted.end_with_the_file(wanted.resume());
}

#[test]
fn root_r21_a_resume_that_cannot_print_leaves_the_mount_as_it_was() {
    let _others = by_name();
    let said = "the mount is left as it was";
    resume_leaves_it_as_it_was("unprinted", said, |mut command| {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        command.stdout(full);
        command
    });
}

#[test]
fn root_r04_a_resume_in_another_mount_namespace_leaves_the_mount_as_it_was() {
    let _others = by_name();
    resume_leaves_it_as_it_was("elsewhere", "mount namespace", |command| {
        let mut elsewhere = Command::new("unshare");
        elsewhere.arg("--mount").arg(command.get_program());
        elsewhere.args(command.get_args());
        elsewhere
    });
}

#[test]
fn root_r22_one_name_is_discarded_and_the_others_stay() {
    let _alone = alone();
    let (kept, unwanted) = (Wanted::new("kept"), Wanted::new("unwanted"));
    let precious = kept.killed_with_a_file();
    let run_id = common::run_id(&unwanted.hold().kill()).unwrap().to_owned();
    unwanted.discard(&run_id);
    let name = unwanted.dir.path().file_name().unwrap();
    assert_eq!(in_kernel(name), Vec::<String>::new());
    assert!(kept.is_kept() && !unwanted.is_kept());
    let held = kept.resume();
    assert!(precious.scratch.exists());
    held.end(Signal::TERM).says(0, &["nothing is left"]);
}

/// Resumes after some damage, which must fail, soon and clearly, and keep what was written until it is discarded.
fn resume_fails_and_keeps(test: &str, damage: impl Fn(&Wanted, &Killed)) {
    let wanted = Wanted::new(test);
    let killed = wanted.killed_with_a_file();
    damage(&wanted, &killed);
    for round in 0..2 {
        let started = Instant::now();
        let Err(answer) = hold(["--resume", &wanted.name]) else {
            panic!("{test}: it was resumed");
        };
        assert!(started.elapsed() < Duration::from_secs(30), "{answer}");
        let work = killed.scratch.parent().unwrap().to_str().unwrap();
        answer.says(1, &[work, "cleanup --resumable"]);
        for wrong in ["everything was released", "inspect IMAGE", "--help"] {
            assert!(!answer.stderr.contains(wrong), "{test}, {round}: {answer}");
        }
        killed.assert_precious_is_there(&answer);
        let is_lost = answer.stderr.contains("cannot be resumed");
        assert!(!is_lost || !wanted.is_kept(), "{answer}");
    }
    let answer = run(["cleanup"]);
    killed.assert_precious_is_there(&answer);
    let run_id = killed.records.file_name().unwrap().to_str().unwrap();
    let answer = wanted.discard(run_id);
    assert!(
        !killed.scratch.exists() && !killed.records.exists(),
        "{answer}"
    );
    let name = wanted.dir.path().file_name().unwrap();
    assert_eq!(in_kernel(name), Vec::<String>::new());
}

#[test]
fn root_a_failed_resume_after_an_unmount_keeps_the_scratch() {
    let _others = by_name();
    let unmount = |path: &Path| shell(&["umount", path.to_str().unwrap()]);
    resume_fails_and_keeps("no-tree", |wanted, _| unmount(&wanted.tree()));
    resume_fails_and_keeps("no-scratch", |wanted, killed| {
        unmount(&wanted.tree());
        unmount(&killed.mounted);
    });
}

#[test]
fn root_a_failed_resume_with_a_damaged_journal_keeps_the_scratch() {
    let _others = by_name();
    let state = "state/journal";
    resume_fails_and_keeps("torn", |_, killed| killed.cut(state, |length| length - 5));
    resume_fails_and_keeps("empty", |_, killed| killed.cut(state, |_| 0));
    resume_fails_and_keeps("gone", |_, killed| {
        fs::remove_file(killed.records.join(state)).unwrap();
    });
    resume_fails_and_keeps("garbage", |_, killed| {
        fs::write(killed.records.join(state), "garbage").unwrap();
    });
}

#[test]
fn root_a_resume_without_the_journal_of_the_engine_ends_and_keeps_the_scratch() {
    let _others = by_name();
    resume_fails_and_keeps("no-engine", |_, killed| {
        fs::remove_dir_all(killed.records.join("engine")).unwrap();
    });
}

#[test]
fn root_a_resume_with_halved_journals_ends_and_keeps_the_scratch() {
    let _others = by_name();
    resume_fails_and_keeps("halved", |_, killed| {
        let half = |length| length / 2;
        killed.cut("state/journal", half);
        for file in fs::read_dir(killed.records.join("engine")).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            killed.cut(&format!("engine/{name}"), half);
        }
    });
}

#[test]
fn root_a_named_mount_whose_name_is_unreadable_is_removed_only_on_request() {
    let _alone = alone();
    type Damage = fn(&Killed);
    let damages: [(&str, Damage); 3] = [
        ("cut", |killed| {
            killed.cut("mount.json", |length| length / 2)
        }),
        ("emptied", |killed| killed.cut("mount.json", |_| 0)),
        ("removed", |killed| {
            fs::remove_file(killed.records.join("mount.json")).unwrap();
        }),
    ];
    for (test, damage) in damages {
        let wanted = Wanted::new(test);
        let killed = wanted.killed_with_a_file();
        damage(&killed);
        let answer = run(["cleanup"]);
        killed.assert_precious_is_there(&answer);
        assert_eq!(answer.code, Some(1), "{answer}");
        assert!(answer.stdout.contains("cleanup --resumable"), "{answer}");
        assert!(wanted.tree().join("precious").exists(), "{answer}");
        run(["cleanup", "--resumable"]).says(0, &[]);
        assert!(!killed.scratch.exists() && !killed.records.exists());
    }
}

/// A signal that comes before the mount is taken over leaves it to the next program.
#[test]
fn root_an_interrupted_resume_leaves_the_mount_as_it_was() {
    let _others = by_name();
    let wanted = Wanted::new("interrupted");
    let mut killed = wanted.killed_with_a_file();
    let left = in_kernel(wanted.dir.path().file_name().unwrap());
    let (mut interrupted, mut released) = (0, 0);
    for moment in 0..16 {
        let mut command = common::program(["mount", "--json", "--resume", &wanted.name]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_micros(moment * 1_500));
        common::signal(child.id(), Signal::TERM);
        let answer = common::finish(child);
        if answer.stdout.contains("\n}\n") {
            // It was taken over in time.
            answer.says(0, &["nothing is left"]);
            released += 1;
            killed = wanted.killed_with_a_file();
            continue;
        }
        interrupted += 1;
        // Before it could listen to signals, this one has ended it.
        assert!(
            answer.code.is_none() || answer.stderr.contains("left as it was"),
            "{answer}"
        );
        assert!(wanted.is_kept(), "{answer}");
        let now = in_kernel(wanted.dir.path().file_name().unwrap());
        assert_eq!(now.len(), left.len(), "{now:?}");
        killed.assert_precious_is_there(&answer);
    }
    println!("{interrupted} interrupted, {released} released");
    assert!(interrupted > 0);
    let held = wanted.resume();
    wanted.end_with_the_file(held);
}

#[test]
fn root_u15_a_named_mount_is_resumed_with_its_views() {
    let _alone = alone();
    let wanted = Wanted::new("views");
    let path = |name: &str| wanted.dir.path().join(name);
    let mut arguments = wanted.arguments();
    for view in ["seen:ro", "made/part:layer=2", "gone"] {
        arguments.extend(["--view".to_owned(), path(view).display().to_string()]);
    }
    let held = hold(&arguments).unwrap_or_else(|answer| panic!("{answer}"));
    let first = held.json["views"].clone();
    assert_eq!(first.as_array().unwrap().len(), 3);
    fs::write(wanted.tree().join("new"), "written before").unwrap();
    kill(held);
    shell(&["umount", path("gone").to_str().unwrap()]);

    let mut held = wanted.resume();
    held.wait_for("view 3 is gone");
    let again = held.json["views"].as_array().unwrap();
    assert_eq!(again[..], first.as_array().unwrap()[..2]);
    assert_eq!(
        fs::read_to_string(path("seen/new")).unwrap(),
        "written before"
    );
    assert_eq!(fs::read_to_string(path("made/part/b")).unwrap(), "of b");
    assert!(fs::write(path("seen/other"), "x").is_err());
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &wanted.dir);
    assert!(!path("seen").exists() && !path("made").exists());

    // A clean-up knows the views of a run that is dead.
    let held = hold(&arguments).unwrap_or_else(|answer| panic!("{answer}"));
    kill(held);
    common::clean_up(&["--resumable"]);
    assert_eq!(in_kernel(wanted.dir.path().file_name().unwrap()), [""; 0]);
    assert!(!path("seen").exists() && !path("made").exists());
}
