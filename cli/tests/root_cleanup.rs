//! What killed runs leave, and that `blockmount cleanup` removes this and nothing else.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Answer, alone, in_kernel, run, temp};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const RUNS: &str = "/run/blockmount";

/// A stack that was mounted by a run that was killed.
struct Killed {
    dir: TempDir,
    json: Value,
}

impl Killed {
    fn new() -> Self {
        let (mut child, dir, json) = mounted();
        child.kill().unwrap();
        child.wait().unwrap();
        Killed { dir, json }
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("made/tree")
    }

    /// The id of the run, from where its layers are mounted.
    fn id(&self) -> &str {
        let path = self.json["layers"][0]["path"].as_str().unwrap();
        path.strip_prefix(RUNS)
            .unwrap()
            .trim_start_matches('/')
            .split('/')
            .next()
            .unwrap()
    }

    fn scratch(&self) -> &str {
        self.json["scratch"]["source"].as_str().unwrap()
    }

    /// What a clean-up has to say on this run.
    fn items(&self, answer: &Answer) -> Vec<Value> {
        let items = answer.json()["items"].as_array().unwrap().clone();
        items
            .into_iter()
            .filter(|item| item["run"] == *self.id())
            .collect()
    }

    #[track_caller]
    fn assert_gone(&self, answer: &Answer) {
        assert_eq!(in_kernel(self.id()), Vec::<String>::new(), "{answer}");
        assert_eq!(
            in_kernel(self.dir.path().file_name().unwrap()),
            Vec::<String>::new(),
            "{answer}"
        );
        assert_eq!(files_of(self.id()), Vec::<PathBuf>::new(), "{answer}");
        assert!(!self.dir.path().join("made").exists(), "{answer}");
        assert!(
            self.dir.path().join("a.ext4").exists(),
            "the user's image is gone: {answer}"
        );
    }
}

/// Directories that belong to a run.
fn files_of(id: &str) -> Vec<PathBuf> {
    let places = [format!("{RUNS}/{id}"), format!("/var/tmp/blockmount-{id}")].map(PathBuf::from);
    places
        .into_iter()
        .filter(|path| path.symlink_metadata().is_ok())
        .collect()
}

/// A stack of two layers and a scratch at `made/tree`, held by a living run.
fn mounted() -> (Living, TempDir, Value) {
    let dir = temp();
    let path = |name: &str| dir.path().join(name);
    common::image("ext4", path("a.ext4"), &[("a", "of a")]);
    common::image("erofs", path("b.erofs"), &[("b", "of b")]);
    let mut command = common::program(["mount", "--json", "--scratch", "8M", "--layer"]);
    command
        .arg(path("a.ext4"))
        .arg("--layer")
        .arg(path("b.erofs"));
    command
        .arg("--at")
        .arg(path("made/tree"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut text = Vec::new();
    let mut byte = [0];
    let stdout = child.stdout.as_mut().unwrap();
    while !text.ends_with(b"\n}\n") {
        assert_eq!(
            stdout.read(&mut byte).unwrap(),
            1,
            "mount failed before it held"
        );
        text.push(byte[0]);
    }
    let json = serde_json::from_slice(&text).unwrap();
    (Living(child), dir, json)
}

/// A run that a test that fails does not leave alive.
struct Living(Child);

impl std::ops::Deref for Living {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Living {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            common::signal(self.0.id(), Signal::TERM);
            let _ = self.0.wait();
        }
    }
}

#[test]
fn root_x14_a_state_that_was_not_saved_to_its_end_is_removed() {
    let _alone = alone();
    let states = Path::new("/var/cache/blockmount/states");
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(states).unwrap();
    let draft = states.join("draft");
    {
        let lock = File::create(states.join("lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        fs::write(&draft, "half of a state").unwrap();
        let writing = cleanup();
        writing.says(0, &[]);
        assert!(draft.exists(), "{writing}");
    }
    let mine = |answer: &Answer| {
        let items = answer.json()["items"].as_array().unwrap().clone();
        let at_draft = |item: &&Value| item["where"] == draft.to_str().unwrap();
        items.iter().find(at_draft).unwrap()["outcome"].clone()
    };
    assert_eq!(mine(&run(["cleanup", "--json", "--dry-run"])), "found");
    assert!(draft.exists());
    assert_eq!(mine(&cleanup()), "removed");
    assert!(!draft.exists());
}

fn cleanup() -> Answer {
    run(["cleanup", "--json"])
}

/// Each item by its kind and place, with its outcome.
fn outcomes(items: &[Value]) -> Vec<(String, String, String)> {
    let text = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    let of = |item: &Value| {
        (
            text(&item["what"]),
            text(&item["where"]),
            text(&item["outcome"]),
        )
    };
    items.iter().map(of).collect()
}

#[test]
fn root_what_a_killed_run_has_left_is_shown_then_removed() {
    let _alone = alone();
    let killed = Killed::new();
    assert!(
        killed.target().join("a").exists(),
        "killing it took the mounts along"
    );

    let before = in_kernel(killed.id());
    let look = run(["cleanup", "--json", "--dry-run"]);
    look.says(0, &[]);
    let shown = outcomes(&killed.items(&look));
    assert!(
        shown.iter().all(|(_, _, outcome)| outcome == "found"),
        "{look}"
    );
    let count = |what: &str| shown.iter().filter(|item| item.0 == what).count();
    // Three layers' worth of mounts and the overlay; `made` and `made/tree`; work and run directory.
    assert_eq!(
        ["mount", "loop_device", "directory", "files"].map(count),
        [4, 3, 2, 2],
        "{look}"
    );
    assert_eq!(
        in_kernel(killed.id()),
        before,
        "a look has changed something"
    );

    let answer = cleanup();
    answer.says(0, &[]);
    let removed = outcomes(&killed.items(&answer));
    assert!(
        removed.iter().all(|(_, _, outcome)| outcome == "removed"),
        "{answer}"
    );
    assert_eq!(removed.len(), shown.len());
    killed.assert_gone(&answer);

    let again = run(["cleanup"]);
    again.says(0, &[]);
    assert!(!again.stdout.contains(killed.id()), "{again}");
}

#[test]
fn root_a_living_run_is_left_alone() {
    let _alone = alone();
    let (mut living, dir, _) = mounted();
    let killed = Killed::new();
    let answer = cleanup();
    answer.says(0, &[]);
    killed.assert_gone(&answer);
    let json = answer.json();
    assert!(json["living_runs"].as_u64().unwrap() >= 1, "{answer}");
    let processes = json["living"].as_array().unwrap().iter();
    let mut processes = processes.map(|living| &living["process"]);
    assert!(processes.any(|process| *process == living.id()), "{answer}");
    let tree = dir.path().join("made/tree");
    fs::write(tree.join("new"), "still writable").unwrap();
    assert_eq!(fs::read_to_string(tree.join("a")).unwrap(), "of a");
    common::signal(living.id(), Signal::TERM);
    assert!(
        living.wait().unwrap().success(),
        "the living run could not end in order"
    );
    assert!(!dir.path().join("made").exists());
}

#[test]
fn root_a_mount_in_use_is_reported_with_its_user_and_removed_later() {
    let _alone = alone();
    let killed = Killed::new();
    let mut user = Command::new("sleep")
        .arg("600")
        .current_dir(killed.target())
        .spawn()
        .unwrap();
    let answer = cleanup();
    user.kill().unwrap();
    user.wait().unwrap();
    answer.says(1, &[]);
    let outcomes = outcomes(&killed.items(&answer));
    let target = killed.target().display().to_string();
    let (_, _, outcome) = outcomes.iter().find(|(_, at, _)| *at == target).unwrap();
    assert!(
        outcome.contains(&format!("process {}", user.id())),
        "{answer}"
    );
    assert_eq!(
        files_of(killed.id()).len(),
        2,
        "files went although they are needed: {answer}"
    );

    let again = cleanup();
    again.says(0, &[]);
    killed.assert_gone(&again);
}

#[test]
fn root_what_others_put_on_top_is_reported_and_left() {
    let _alone = alone();
    let killed = Killed::new();
    let theirs = killed.target().join("theirs");
    fs::create_dir(&theirs).unwrap();
    tool(
        "mount",
        &["-t", "tmpfs", "foreign", theirs.to_str().unwrap()],
    );
    fs::write(theirs.join("kept"), "theirs").unwrap();
    let output = Command::new("losetup")
        .args(["-r", "-f", "--show", killed.scratch()])
        .output();
    let device = String::from_utf8(output.unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned();
    assert!(device.starts_with("/dev/loop"));

    let answer = cleanup();
    answer.says(1, &[]);
    let outcomes = outcomes(&killed.items(&answer));
    for place in [theirs.to_str().unwrap(), &device] {
        let is_left = |item: &&(String, String, String)| {
            item.1 == place && item.2.contains("not of a run of blockmount")
        };
        assert!(
            outcomes.iter().any(|item| is_left(&item)),
            "{place} in {answer}"
        );
    }
    assert_eq!(fs::read_to_string(theirs.join("kept")).unwrap(), "theirs");
    assert!(
        Path::new("/sys/block")
            .join(&device[5..])
            .join("loop/backing_file")
            .exists()
    );
    assert!(Path::new(killed.scratch()).exists(), "{answer}");

    tool("umount", &[theirs.to_str().unwrap()]);
    tool("losetup", &["-d", &device]);
    let again = cleanup();
    again.says(0, &[]);
    killed.assert_gone(&again);
}

#[test]
fn root_devices_and_mounts_of_others_elsewhere_are_not_touched() {
    let _alone = alone();
    let dir = temp();
    common::image("ext4", dir.path().join("x"), &[("x", "x")]);
    let (image, target) = (dir.path().join("x"), dir.path().join("m"));
    fs::create_dir(&target).unwrap();
    tool(
        "mount",
        &[
            "-o",
            "loop",
            image.to_str().unwrap(),
            target.to_str().unwrap(),
        ],
    );
    let before = in_kernel(dir.path().file_name().unwrap());
    let killed = Killed::new();
    let answer = cleanup();
    assert_eq!(in_kernel(dir.path().file_name().unwrap()), before);
    tool("umount", &[target.to_str().unwrap()]);
    answer.says(0, &[]);
    assert!(
        !answer.stdout.contains(dir.path().to_str().unwrap()),
        "{answer}"
    );
    killed.assert_gone(&answer);
}

#[test]
fn root_a_directory_that_is_no_longer_empty_stays() {
    let _alone = alone();
    let killed = Killed::new();
    fs::write(killed.dir.path().join("made/mine"), "the user's").unwrap();
    let answer = cleanup();
    answer.says(1, &[]);
    assert!(answer.has_words("not empty"), "{answer}");
    assert_eq!(
        fs::read_to_string(killed.dir.path().join("made/mine")).unwrap(),
        "the user's"
    );
    fs::remove_dir_all(killed.dir.path().join("made")).unwrap();
    killed.assert_gone(&cleanup());
}

#[test]
fn root_a_directory_that_could_not_be_removed_is_removed_by_the_next_clean_up() {
    let _alone = alone();
    let killed = Killed::new();
    let mine = killed.dir.path().join("made/mine");
    fs::write(&mine, "the user's").unwrap();
    for _ in 0..2 {
        cleanup().says(1, &[]);
    }
    fs::remove_file(&mine).unwrap();
    let answer = cleanup();
    answer.says(0, &[]);
    killed.assert_gone(&answer);
}

#[test]
fn root_two_clean_ups_at_once_do_not_hurt_each_other() {
    let _alone = alone();
    let killed = [Killed::new(), Killed::new()];
    let start = || {
        let mut command = common::program(["cleanup", "--json"]);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    for child in [start(), start(), start()] {
        common::finish(child).says(0, &[]);
    }
    killed
        .iter()
        .for_each(|killed| killed.assert_gone(&cleanup()));
}

#[test]
fn root_u02_a_mark_whose_run_is_not_known_here_is_left_and_reported() {
    let _alone = alone();
    let (dir, id) = (temp(), "00000000deadbeef");
    let [one, two, target] = ["one", "two", "m"].map(|name| dir.path().join(name));
    [&one, &two, &target]
        .into_iter()
        .for_each(|path| fs::create_dir(path).unwrap());
    let source = format!("blockmount:{id}");
    let lower = format!("lowerdir={}:{}", one.display(), two.display());
    tool(
        "mount",
        &[
            "-t",
            "overlay",
            &source,
            "-o",
            &lower,
            target.to_str().unwrap(),
        ],
    );
    let before = in_kernel(id);
    for arguments in [
        &["cleanup", "--json"][..],
        &["cleanup", "--json", "--dry-run"],
    ] {
        let answer = run(arguments);
        assert!(answer.stdout.contains(id), "{answer}");
        assert!(answer.has_words("may be alive"), "{answer}");
        assert_eq!(in_kernel(id), before, "{answer}");
    }
    // It may be fine where it is: nothing of this clean-up has failed.
    cleanup().says(0, &[]);
    let text = run(["cleanup"]);
    text.says(0, &[]);
    assert!(text.stdout.contains("  elsewhere mount"), "{text}");
    let temporary = dir.path().to_str().unwrap();
    let too_wide = |line: &&str| line.chars().count() > 80 && !line.contains(temporary);
    assert_eq!(text.stdout.lines().find(too_wide), None, "{text}");
    tool("umount", &[target.to_str().unwrap()]);
    assert!(!cleanup().stdout.contains(id));
}

#[test]
fn root_u02_a_living_run_is_left_alone_by_a_container_with_another_run_directory() {
    let _alone = alone();
    let dir = temp();
    // A mount namespace without the runs, which shares the mounts: as a container with shared propagation has it.
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let shared = shared.to_str().unwrap();
    tool("mount", &["--bind", shared, shared]);
    tool("mount", &["--make-shared", shared]);
    let image = dir.path().join("a.ext4");
    common::image("ext4", &image, &[("a", "of a")]);
    let tree = format!("{shared}/tree");
    let arguments = [
        "--layer",
        image.to_str().unwrap(),
        "--scratch",
        "8M",
        "--at",
        &tree,
    ];
    let held = common::hold(arguments).unwrap_or_else(|answer| panic!("{answer}"));
    let before = in_kernel(dir.path().file_name().unwrap());
    let script = "mount --make-private /run 2>/dev/null; mount -t tmpfs run /run; exec \"$0\" cleanup --json";
    let mut container = Command::new("unshare");
    container.args(["-m", "--propagation", "unchanged", "sh", "-c", script]);
    container.arg(env!("CARGO_BIN_EXE_blockmount"));
    let answer = common::finish(
        container
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    assert_eq!(
        in_kernel(dir.path().file_name().unwrap()),
        before,
        "{answer}"
    );
    assert!(answer.has_words("may be alive"), "{answer}");
    assert_eq!(fs::read_to_string(format!("{tree}/a")).unwrap(), "of a");
    held.end(Signal::TERM).says(0, &["nothing is left"]);
    tool("umount", &[shared]);
}

#[test]
fn root_x01_a_forged_mark_makes_nobody_remove_files() {
    let _alone = alone();
    let (dir, id) = (temp(), "00000000deadbea7");
    // What an unprivileged user can make: a mount of another filesystem with a mark as its source, and a work directory.
    let target = dir.path().join("m");
    fs::create_dir(&target).unwrap();
    let source = format!("blockmount:{id}");
    tool("mount", &["-t", "tmpfs", &source, target.to_str().unwrap()]);
    let work = PathBuf::from(format!("/var/tmp/blockmount-{id}"));
    fs::create_dir(&work).unwrap();
    fs::write(work.join("kept"), "x").unwrap();
    std::os::unix::fs::chown(&work, Some(65_534), None).unwrap();
    let answer = cleanup();
    assert!(!answer.stdout.contains(id), "{answer}");
    // Nor where root knows such a run, which has ended, but not the directory.
    let run_directory = Path::new(RUNS).join(id);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run_directory)
        .unwrap();
    let answer = cleanup();
    answer.says(1, &[]);
    assert!(answer.has_words("not root's alone"), "{answer}");
    assert!(work.join("kept").exists(), "{answer}");
    assert!(
        in_kernel(id).iter().any(|line| line.contains("tmpfs")),
        "{answer}"
    );
    tool("umount", &[target.to_str().unwrap()]);
    fs::remove_dir_all(&work).unwrap();
    cleanup();
    assert!(files_of(id).is_empty());
}

#[test]
fn root_runs_that_were_killed_at_their_start_are_removed() {
    let _alone = alone();
    let places = ["00000000deadbee0", "00000000deadbee1"].map(|id| Path::new(RUNS).join(id));
    let make = |path: &PathBuf| {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
    };
    places.iter().for_each(|path| make(path).unwrap());
    // The second came further, and its last line was cut off.
    File::create(places[1].join("lock")).unwrap();
    fs::write(
        places[1].join("journal"),
        "{\"work\":\"/var/tmp/blockmount-00000000deadbee1\"}\n{\"dir",
    )
    .unwrap();
    fs::DirBuilder::new()
        .mode(0o700)
        .create("/var/tmp/blockmount-00000000deadbee1")
        .unwrap();
    fs::create_dir("/var/tmp/blockmount-00000000deadbee1/tree").unwrap();
    fs::write("/var/tmp/blockmount-00000000deadbee1/tree/image", "x").unwrap();
    let answer = cleanup();
    answer.says(0, &[]);
    for id in ["00000000deadbee0", "00000000deadbee1"] {
        assert_eq!(files_of(id), Vec::<PathBuf>::new(), "{answer}");
    }
}

/// Of all runs that are not alive: directories, mounts and loop devices.
fn left_by_the_dead() -> Vec<String> {
    let names = |dir: &str, prefix: &str| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names
            .filter_map(|name| name.strip_prefix(prefix).map(str::to_owned))
            .collect::<Vec<_>>()
    };
    let mut ids: BTreeSet<String> = names(RUNS, "").into_iter().collect();
    ids.extend(names("/var/tmp", "blockmount-"));
    let in_tables = in_kernel("/run/blockmount/")
        .into_iter()
        .chain(in_kernel("blockmount:"));
    for line in in_tables.chain(in_kernel("/var/tmp/blockmount-")) {
        let after = ["/run/blockmount/", "blockmount:", "/var/tmp/blockmount-"]
            .iter()
            .find_map(|start| Some(line.split_once(start)?.1.get(..16)?.to_owned()));
        ids.extend(after);
    }
    let is_id = |id: &String| id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_alive = |id: &String| {
        let Ok(lock) = File::open(format!("{RUNS}/{id}/lock")) else {
            return false;
        };
        flock(lock, FlockOperation::NonBlockingLockShared).is_err()
    };
    ids.into_iter()
        .filter(is_id)
        .filter(|id| !is_alive(id))
        .collect()
}

/// Kills the program so many times, each after a time of its own below a limit, and cleans up.
fn kill_at(count: u32, mut limit: Duration, dir: &TempDir, command: impl Fn() -> Command) {
    let (mut killed, mut ended) = (0, 0);
    // What others have on this machine, in containers for example, is for no clean-up here.
    let before = left_by_the_dead();
    while killed < count {
        let moment = limit.mul_f64(random_fraction());
        let mut child = command()
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(moment);
        if child.try_wait().unwrap().is_none() {
            killed += 1;
        } else {
            // It is quicker than when the limit was measured.
            ended += 1;
            limit = limit.mul_f64(0.8);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let answer = cleanup();
        answer.says(0, &[]);
        let mut left = left_by_the_dead();
        left.retain(|id| !before.contains(id));
        assert_eq!(
            left,
            Vec::<String>::new(),
            "killed after {moment:?}: {answer}"
        );
        let name = dir.path().file_name().unwrap();
        assert_eq!(
            in_kernel(name),
            Vec::<String>::new(),
            "killed after {moment:?}: {answer}"
        );
        assert!(
            !dir.path().join("made").exists(),
            "killed after {moment:?}: {answer}"
        );
        assert!(ended <= 20, "only {killed} were still running when killed");
    }
}

/// A number from 0 to 1, from the kernel's random ones.
fn random_fraction() -> f64 {
    let mut bytes = [0; 2];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    f64::from(u16::from_le_bytes(bytes)) / 65_536.0
}

fn layers(dir: &TempDir) -> [PathBuf; 2] {
    let images = ["a.ext4", "b.erofs"].map(|name| dir.path().join(name));
    common::image("ext4", &images[0], &[("a", "of a")]);
    common::image("erofs", &images[1], &[("b", "of b")]);
    images
}

#[test]
fn root_a_mount_that_is_killed_at_any_moment_leaves_nothing_after_a_clean_up() {
    let _alone = alone();
    let dir = temp();
    let [a, b] = layers(&dir);
    kill_at(25, Duration::from_millis(400), &dir, || {
        let mut command = common::program(["mount", "--scratch", "8M", "--layer"]);
        command
            .arg(&a)
            .arg("--layer")
            .arg(&b)
            .arg("--at")
            .arg(dir.path().join("made/tree"));
        command
    });
}

#[test]
fn root_a_demo_that_is_killed_at_any_moment_leaves_nothing_after_a_clean_up() {
    let _alone = alone();
    let dir = temp();
    let [a, b] = layers(&dir);
    let with_images = || {
        let mut command = common::program(["demo", "--layer"]);
        command.arg(&a).arg("--layer").arg(&b);
        command
    };
    let with_samples = || common::program(["demo"]);
    kill_at(15, most_of(with_images()), &dir, with_images);
    // Few, since each demo makes its samples first.
    kill_at(4, most_of(with_samples()), &dir, with_samples);
}

/// Most of the time that a command takes on this machine, when it is let finish.
fn most_of(mut command: Command) -> Duration {
    let began = Instant::now();
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    began.elapsed().mul_f64(0.8)
}

#[track_caller]
fn tool(name: &str, arguments: &[&str]) {
    let output = Command::new(name).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
