//! A machine that lacks something: the program says what, or does without it, and leaves nothing.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{
    self, Answer, Held, after_mounting, alone, by_name, clean_up, eventually, hold_by, image,
    in_kernel, program, run, signal,
};
use rustix::process::Signal;
use tempfile::TempDir;

/// What is lacking, and what comes of it.
struct Row {
    name: &'static str,
    /// Run before the program, in a mount namespace of its own.
    script: &'static str,
    arguments: &'static [&'static str],
    /// The exit status, and words on stderr.
    code: i32,
    words: &'static [&'static str],
}

const NO_SCRATCH: &[&str] = &[];
const SCRATCH: &[&str] = &["--scratch", "8M"];

/// In every row the mount ends at once or is released at once.
const ROWS: [Row; 19] = [
    Row {
        name: "/run is read-only",
        script: "mount -t tmpfs -o ro t /run",
        arguments: NO_SCRATCH,
        code: 1,
        words: &[
            "in /run/blockmount",
            "Read-only file system",
            "noted in /run",
        ],
    },
    Row {
        name: "/run has no space",
        script: "mount -t tmpfs -o size=16k t /run; cat /dev/zero > /run/fill 2>/dev/null || true",
        arguments: NO_SCRATCH,
        code: 1,
        words: &[
            "cannot write the journal",
            "No space left",
            "free some space",
        ],
    },
    Row {
        name: "/run has no inodes",
        script: "mount -t tmpfs -o nr_inodes=1 t /run",
        arguments: NO_SCRATCH,
        code: 1,
        words: &["in /run/blockmount", "No space left"],
    },
    Row {
        name: "/run has inodes for half of a run",
        script: "mount -t tmpfs -o nr_inodes=4 t /run",
        arguments: NO_SCRATCH,
        code: 1,
        words: &["No space left"],
    },
    Row {
        name: "/var/tmp is read-only and not needed",
        script: "mount -t tmpfs -o ro t /var/tmp",
        arguments: NO_SCRATCH,
        code: 0,
        words: &["nothing is left"],
    },
    Row {
        name: "/var/tmp has no space and is not needed",
        script: "mount -t tmpfs -o nr_inodes=1 t /var/tmp",
        arguments: NO_SCRATCH,
        code: 0,
        words: &["nothing is left"],
    },
    Row {
        name: "/var/tmp is read-only",
        script: "mount -t tmpfs -o ro t /var/tmp",
        arguments: SCRATCH,
        code: 1,
        words: &[
            "cannot make /var/tmp/blockmount-",
            "Read-only file system",
            "has to be writable",
        ],
    },
    Row {
        name: "/var/tmp has no space",
        script: "mount -t tmpfs -o size=16k t /var/tmp; cat /dev/zero > /var/tmp/fill 2>/dev/null || true",
        arguments: SCRATCH,
        code: 1,
        words: &["mke2fs failed", "No space left", "free some space"],
    },
    Row {
        name: "/var/tmp has no inodes",
        script: "mount -t tmpfs -o nr_inodes=1 t /var/tmp",
        arguments: SCRATCH,
        code: 1,
        words: &[
            "cannot make /var/tmp/blockmount-",
            "No space left",
            "some space",
        ],
    },
    Row {
        name: "no /var/tmp",
        script: "mount -t tmpfs t /var",
        arguments: SCRATCH,
        code: 1,
        words: &["cannot make /var/tmp/blockmount-", "No such file"],
    },
    Row {
        name: "/var/cache is not needed",
        script: "mount -t tmpfs -o ro t /var/cache",
        arguments: SCRATCH,
        code: 0,
        words: &["nothing is left"],
    },
    Row {
        name: "no /proc",
        script: "umount --lazy /proc",
        arguments: NO_SCRATCH,
        code: 1,
        words: &[
            "cannot read the table of mounts",
            "mount -t proc proc /proc",
        ],
    },
    Row {
        name: "no /sys",
        script: "umount --lazy /sys",
        arguments: NO_SCRATCH,
        code: 1,
        words: &["cannot read /sys/block", "mount -t sysfs sysfs /sys"],
    },
    Row {
        name: "a /dev without loop devices",
        script: DEV,
        arguments: NO_SCRATCH,
        code: 1,
        words: &[
            "/dev/loop-control is missing",
            "modprobe loop",
            "mknod /dev/loop-control",
        ],
    },
    Row {
        name: "files may not grow",
        script: "ulimit -f 8",
        arguments: SCRATCH,
        code: 1,
        words: &["8388608 bytes", "File too large", "ulimit -f"],
    },
    Row {
        name: "no descriptors for layers",
        script: "ulimit -n 71",
        arguments: NO_SCRATCH,
        code: 1,
        words: &["may have 71 files open", "needs up to 72", "ulimit -n 72"],
    },
    Row {
        name: "stdin is closed",
        script: "exec 0<&-",
        arguments: SCRATCH,
        code: 0,
        words: &["nothing is left"],
    },
    Row {
        name: "stdout is full",
        script: "exec 1>/dev/full",
        arguments: SCRATCH,
        code: 1,
        words: &["cannot write the result to stdout", "No space left"],
    },
    Row {
        name: "stdin and stderr are closed",
        script: "exec 0<&- 2>&-",
        arguments: SCRATCH,
        code: 0,
        words: &[],
    },
];

/// A `/dev` as a minimal container has it.
const DEV: &str = "mount -t tmpfs t /mnt; for n in null zero full random urandom; do cp -a /dev/$n /mnt; done; \
                   mount --move /mnt /dev";

/// An image and a target, on a disk that no row takes away.
fn layer() -> (TempDir, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    image("ext4", path("layer"), &[("file", "text")]);
    let arguments = ["--layer", &path("layer"), "--at", &path("made/at")];
    let arguments = arguments.map(str::to_owned).into();
    (dir, arguments)
}

#[track_caller]
fn assert_nothing_left(name: &str, answer: &Answer, dir: &TempDir) {
    let left = in_kernel(dir.path().file_name().unwrap());
    assert_eq!(left, Vec::<String>::new(), "{name}: {answer}");
    assert!(!dir.path().join("made").exists(), "{name}: {answer}");
}

/// The image files of runs.
fn work_directories() -> Vec<String> {
    let entries = fs::read_dir("/var/tmp").unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("blockmount-") && !name.starts_with("blockmount-test-"))
        .collect();
    names.sort();
    names
}

/// Those of the tests beside this one go soon.
#[track_caller]
fn assert_no_more_image_files(name: &str, answer: &Answer, before: &[String]) {
    eventually(
        &format!("the end of all image files ({name}: {answer})"),
        || {
            work_directories()
                .iter()
                .all(|found| before.contains(found))
        },
    );
}

#[test]
fn root_u13_what_is_lacking_is_said_or_done_without() {
    let _others = by_name();
    let before = work_directories();
    for row in ROWS {
        let (dir, mut arguments) = layer();
        arguments.extend(row.arguments.iter().map(|&word| word.to_owned()));
        let answer = match hold_by(after_mounting(row.script, arguments)) {
            Ok(held) => held.end(Signal::TERM),
            Err(answer) => answer,
        };
        let name = row.name;
        assert_eq!(answer.code, Some(row.code), "{name}: {answer}");
        for word in row.words {
            assert!(
                answer.stderr.contains(word),
                "{name}: no {word:?} in {answer}"
            );
        }
        assert_nothing_left(name, &answer, &dir);
        assert_no_more_image_files(name, &answer, &before);
    }
}

/// Wherever descriptors or memory run out, nothing stays that a clean-up does not remove.
#[test]
fn root_u13_a_limit_that_is_met_anywhere_leaves_nothing() {
    let _alone = alone();
    let files = [4, 6, 8, 12, 16, 24, 40, 71, 72, 80];
    let memory = (16..256).step_by(16);
    let limits = files.into_iter().map(|count| format!("ulimit -n {count}"));
    let limits = limits.chain(memory.map(|mib| format!("ulimit -v {}", mib << 10)));
    let mut codes = Vec::new();
    for limit in limits {
        let (dir, mut arguments) = layer();
        arguments.extend(["--scratch", "8M"].map(str::to_owned));
        let answer = match hold_by(after_mounting(&limit, arguments)) {
            Ok(held) => held.end(Signal::TERM),
            Err(answer) => answer,
        };
        // Without memory a program is ended by its allocator, as if it were killed.
        if answer.code != Some(0) && answer.code != Some(1) {
            assert!(limit.contains("-v"), "{limit}: {answer}");
            clean_up(&[]);
        }
        assert_nothing_left(&limit, &answer, &dir);
        codes.push(answer.code);
    }
    assert!(
        codes.contains(&Some(0)) && codes.contains(&Some(1)),
        "{codes:?}"
    );
}

/// A run whose `/run` is a small disk, held.
fn held_in_small_run(dir_and_arguments: (TempDir, Vec<String>), more: &[&str]) -> (TempDir, Held) {
    let (dir, mut arguments) = dir_and_arguments;
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    let held = hold_by(after_mounting(
        "mount -t tmpfs -o size=1m t /run",
        arguments,
    ));
    (dir, held.unwrap_or_else(|answer| panic!("{answer}")))
}

#[test]
fn root_u13_a_full_run_directory_keeps_no_mount_from_being_released() {
    let _others = by_name();
    let before = work_directories();
    for more in [
        &["--scratch", "8M"][..],
        &["--scratch", "8M", "--name", "full"],
    ] {
        let (dir, held) = held_in_small_run(layer(), more);
        let run = format!("/proc/{}/root/run/fill", held.pid());
        let mut fill = File::create(&run).unwrap();
        std::io::copy(&mut File::open("/dev/zero").unwrap(), &mut fill).unwrap_err();
        let answer = held.end(Signal::TERM);
        answer.says(0, &["nothing is left"]);
        assert_nothing_left("full", &answer, &dir);
        assert_no_more_image_files("full", &answer, &before);
    }
}

#[test]
fn root_u13_with_all_streams_closed_a_mount_is_held_and_released() {
    let (dir, arguments) = layer();
    let mut command = Command::new("sh");
    let program = program(["mount"]);
    command
        .args(["-c", "exec \"$0\" \"$@\" 0<&- 1>&- 2>&-"])
        .arg(program.get_program())
        .args(program.get_args())
        .args(&arguments)
        .stdin(Stdio::null());
    let mut child = command.spawn().unwrap();
    let at = dir.path().join("made/at");
    // Without a stream it cannot say that all of it is there; then its status can be asked for.
    let is_held = || {
        let status = run(["status", "--json"]).json();
        let runs = status["runs"].as_array().unwrap();
        runs.iter().any(|run| run["at"] == at.to_str().unwrap())
    };
    eventually("the mount", || {
        is_held() || child.try_wait().unwrap().is_some()
    });
    assert!(at.join("file").exists());
    signal(child.id(), Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!dir.path().join("made").exists());
    assert!(in_kernel(dir.path().file_name().unwrap()).is_empty());
}

/// A host that has not plugged in the agent's port yet is waited for, and not in silence.
#[test]
fn root_u13_an_agent_without_a_port_says_what_it_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = program(["agent", "--journal"]);
    let mut agent = command
        .arg(dir.path().join("journal"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let watch = common::kill_after(agent.id(), common::LONGEST);
    let mut line = String::new();
    BufReader::new(agent.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(
        line.contains("waiting") && line.contains("blockmount.agent"),
        "{line}"
    );
    signal(agent.id(), Signal::TERM);
    assert_eq!(agent.wait().unwrap().code(), Some(0));
    drop(watch);
}

/// `/run` is empty after a boot, and `/var/tmp` is not.
#[test]
fn root_u13_image_files_whose_run_was_lost_are_found() {
    let _alone = alone();
    let make = |id: &str| {
        let path = Path::new("/var/tmp").join(format!("blockmount-{id}"));
        let mut builder = fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&path).unwrap();
        fs::write(path.join("scratch.ext4"), "x").unwrap();
        path
    };
    let [lost, named, held] = ["0", "1", "2"].map(|n| make(&format!("00000000deadbed{n}")));
    fs::write(named.join("named"), "").unwrap();
    // A living run of another container has it locked.
    let lock = File::open(&held).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let forged = make("00000000deadbed3");
    std::os::unix::fs::chown(&forged, Some(65_534), None).unwrap();
    let shown = common::run(["cleanup", "--dry-run"]);
    assert!(
        shown.stdout.contains("deadbed0") && lost.exists(),
        "{shown}"
    );
    let answer = common::run(["cleanup"]);
    answer.says(1, &[]);
    assert!(
        answer.has_words("which had a name") && !lost.exists(),
        "{answer}"
    );
    assert!(
        named.exists() && held.exists() && forged.exists(),
        "{answer}"
    );
    clean_up(&["--resumable"]);
    assert!(!named.exists() && held.exists() && forged.exists());
    drop(lock);
    clean_up(&[]);
    assert!(!held.exists() && forged.exists());
    fs::remove_dir_all(forged).unwrap();
}

/// The journal says which directories were made, and never which files are removed.
#[test]
fn root_x01_a_clean_up_believes_no_place_that_a_journal_names() {
    let _alone = alone();
    let victim = common::temp();
    fs::set_permissions(
        victim.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    fs::write(victim.path().join("kept"), "x").unwrap();
    let run = Path::new("/run/blockmount/00000000deadbed4");
    let mut builder = fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(run).unwrap();
    let line = format!("{{\"work\":\"{}\"}}\n", victim.path().display());
    fs::write(run.join("journal"), line).unwrap();
    clean_up(&[]);
    assert!(victim.path().join("kept").exists() && !run.exists());
}

#[test]
fn root_u13_a_run_that_is_not_as_it_was_made_holds_no_clean_up() {
    let _alone = alone();
    let places = ["lock", "journal", "mount.json", "lost"].map(|name| {
        let run = Path::new("/run/blockmount").join(format!("00000000deadbe{:02x}", name.len()));
        let mut builder = fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(&run).unwrap();
        let mut mkfifo = Command::new("mkfifo");
        assert!(mkfifo.arg(run.join(name)).status().unwrap().success());
        run
    });
    let answer = common::run(["cleanup"]);
    answer.says(1, &[]);
    let doubtful = "cannot tell whether its run is alive";
    assert!(answer.has_words(doubtful) && places[0].exists(), "{answer}");
    for place in places {
        fs::remove_dir_all(&place)
            .or_else(|_| if place.exists() { Err(()) } else { Ok(()) })
            .unwrap();
    }
}
