//! `blockmount mount`: what is held, and that nothing is left after it.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::common::{self, Held, assert_nothing_left, hold, image, in_kernel, run_id, temp};
use crate::merged_erofs;
use blockmount_debug_agent::kit::luks;
use rustix::process::Signal;
use tempfile::TempDir;

/// Two layers, and the arguments for them.
fn layers(dir: &TempDir) -> Vec<String> {
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    image("erofs", path("top"), &[("layer.txt", "top"), ("top", "t")]);
    image(
        "ext4",
        path("base"),
        &[("layer.txt", "base"), ("base", "b")],
    );
    layers_of(dir)
}

/// The arguments for layers that are there.
fn layers_of(dir: &TempDir) -> Vec<String> {
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    [
        "--layer",
        &path("top"),
        "--layer",
        &path("base"),
        "--at",
        &path("at"),
    ]
    .map(str::to_owned)
    .into()
}

#[track_caller]
fn held(arguments: Vec<String>) -> Held {
    hold(arguments).unwrap_or_else(|answer| panic!("{answer}"))
}

/// The header is read and the key found before anything is mapped, for which not each machine has the means.
#[test]
fn root_a_volume_of_luks2_is_opened_here_by_a_passphrase_in_a_file() {
    let dir = temp();
    let [plain, volume, right, wrong] =
        ["plain", "volume", "right", "wrong"].map(|name| dir.path().join(name));
    image("erofs", &plain, &[("file", "x")]);
    luks::volume_with(&volume, &fs::read(&plain).unwrap());
    fs::write(&right, luks::PASSPHRASE).unwrap();
    fs::write(&wrong, "wrong").unwrap();
    let at = dir.path().join("at");
    let words = |passphrase: &Path| {
        let passphrase = format!("file={}", passphrase.display());
        let [volume, at] = [&volume, &at].map(|path| path.to_str().unwrap().to_owned());
        [
            "--layer".into(),
            volume,
            "--luks".into(),
            passphrase,
            "--at".into(),
            at,
        ]
    };
    let refused = hold(words(&wrong)).map(|_| ()).unwrap_err();
    refused.says(1, &["does not open the volume"]);
    assert_nothing_left(&refused, &dir);
    let answer = match hold(words(&right)) {
        Ok(mut held) => {
            let said = held.wait_for("run started");
            let keys = format!("/run/blockmount/{}/keys", run_id(&said).unwrap());
            assert_eq!(
                fs::read_dir(keys).unwrap().count(),
                0,
                "it is not needed any more"
            );
            assert_eq!(fs::read(at.join("file")).unwrap(), b"x");
            let answer = held.end(Signal::TERM);
            answer.says(0, &[]);
            answer
        }
        Err(answer) => {
            answer.says(1, &["no device-mapper"]);
            answer
        }
    };
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_holds_a_read_only_tree_until_each_signal() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let dir = temp();
        let at = dir.path().join("at");
        let held = held(layers(&dir));
        assert_eq!(held.json["target"], at.to_str().unwrap());
        assert_eq!(held.json["writable"], false);
        assert_eq!(held.json["layers"][0]["filesystem"], "erofs");
        assert_eq!(held.json["layers"][1]["filesystem"], "ext4");
        assert_eq!(fs::read_to_string(at.join("layer.txt")).unwrap(), "top");
        assert_eq!(fs::read_to_string(at.join("base")).unwrap(), "b");
        assert!(fs::write(at.join("new"), "x").is_err());
        assert!(in_kernel(dir.path().file_name().unwrap()).len() >= 3);

        let answer = held.end(signal);
        answer.says(0, &["nothing is left"]);
        assert!(!at.exists());
        assert_nothing_left(&answer, &dir);
    }
}

#[test]
fn root_a_scratch_takes_all_changes_and_ends_with_the_mount() {
    let dir = temp();
    let at = dir.path().join("at");
    let mut arguments = layers(&dir);
    arguments.extend(["--scratch", "32M", "--option", "nodev"].map(str::to_owned));
    let images = || ["top", "base"].map(|name| fs::read(dir.path().join(name)).unwrap());
    let before = images();
    // An existing empty directory is used, and stays.
    fs::create_dir(&at).unwrap();
    let held = held(arguments);
    assert_eq!(held.json["writable"], true);
    assert_eq!(held.json["scratch"]["filesystem"], "ext4");
    fs::write(at.join("layer.txt"), "changed").unwrap();
    fs::remove_file(at.join("base")).unwrap();
    assert_eq!(fs::read_to_string(at.join("layer.txt")).unwrap(), "changed");

    let answer = held.end(Signal::TERM);
    answer.says(0, &[]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
    assert!(before == images(), "a layer was written to");
}

#[test]
fn root_one_image_under_several_names_is_one_layer() {
    let dir = temp();
    let mut arguments = layers(&dir);
    symlink(dir.path().join("base"), dir.path().join("link")).unwrap();
    fs::hard_link(dir.path().join("base"), dir.path().join("hard")).unwrap();
    let first = held(arguments.clone());
    let link = dir.path().join("link").to_str().unwrap().to_owned();
    let hard = dir.path().join("hard").to_str().unwrap().to_owned();
    arguments = vec![
        "--layer".into(),
        link,
        "--at".into(),
        dir.path().join("at2").to_str().unwrap().into(),
    ];
    let second = held(arguments.clone());
    assert_eq!(
        fs::read_to_string(dir.path().join("at2/base")).unwrap(),
        "b"
    );
    for held in [first, second] {
        let answer = held.end(Signal::TERM);
        answer.says(0, &[]);
    }
    arguments.extend(["--layer".into(), hard]);
    let held = held(arguments);
    assert_eq!(held.json["layers"].as_array().unwrap().len(), 1);
    let answer = held.end(Signal::TERM);
    answer.says(0, &["hard is the same layer as", "adds nothing"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_a_busy_tree_is_reported_and_waited_for() {
    let dir = temp();
    let mut held = held(layers(&dir));
    let file = fs::File::open(dir.path().join("at/base")).unwrap();
    common::signal(held.pid(), Signal::TERM);
    let said = held.wait_for("until they release it");
    assert!(
        said.contains(&format!("process {}", std::process::id())),
        "{said}"
    );
    assert!(
        Path::new(&dir.path().join("at/base")).exists(),
        "it is still there while it is used"
    );
    drop(file);
    let answer = held.wait();
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_u20_a_covered_tree_is_waited_for_as_a_busy_one() {
    let dir = temp();
    let mut held = held(layers(&dir));
    let at = dir.path().join("at");
    let cover = Cover::over(&at);
    common::signal(held.pid(), Signal::TERM);
    let said = held.wait_for("until they release it");
    let by = format!("it is covered by the mount at {}", at.display());
    assert!(said.contains(&by), "{said}");
    drop(cover);
    let answer = held.wait();
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
}

/// A mount of somebody else, which a test that fails takes along.
struct Cover(std::path::PathBuf);

impl Cover {
    fn over(directory: &Path) -> Self {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "cover"]).arg(directory);
        assert!(mount.status().unwrap().success());
        Cover(directory.to_owned())
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        assert!(unmounted.unwrap().success() || std::thread::panicking());
    }
}

/// A shell, sudo and the terminal may each pass on one Ctrl-C.
#[test]
fn root_u20_a_signal_that_comes_several_times_at_once_is_one() {
    let dir = temp();
    let mut held = held(layers(&dir));
    let file = fs::File::open(dir.path().join("at/base")).unwrap();
    for _ in 0..20 {
        common::signal(held.pid(), Signal::INT);
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
    held.wait_for("until they release it");
    drop(file);
    let answer = held.wait();
    answer.says(0, &["nothing is left"]);
    assert!(!answer.stderr.contains("not yet"), "{answer}");
    assert_nothing_left(&answer, &dir);
}

/// Signals that mean nothing to the program would end it without a release.
#[test]
fn root_u20_signals_for_users_release_the_tree() {
    for signal in [Signal::USR1, Signal::USR2] {
        let dir = temp();
        let answer = held(layers(&dir)).end(signal);
        answer.says(0, &["nothing is left"]);
        assert_nothing_left(&answer, &dir);
    }
    let dir = temp();
    let held = held(layers(&dir));
    common::signal(held.pid(), Signal::XFSZ);
    assert!(dir.path().join("at/base").exists());
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_u17_a_tree_in_the_way_is_told_of_with_what_to_do() {
    let _alone = common::alone();
    let dir = temp();
    let first = held(layers(&dir));
    let refused = |words: &[&str]| match hold(layers_of(&dir)) {
        Ok(held) => panic!("not refused: {}", held.end(Signal::TERM)),
        Err(answer) => answer.says(1, words),
    };
    let process = format!("process {}", first.pid());
    refused(&["another \"blockmount mount\" holds a tree there", &process]);
    first.kill();
    refused(&[
        "a killed run has left its tree there",
        "sudo blockmount cleanup",
    ]);
    common::clean_up(&[]);
    let mut named = layers_of(&dir);
    named.extend(["--name", "in-the-way"].map(str::to_owned));
    held(named).kill();
    refused(&["sudo blockmount mount --resume in-the-way"]);
    common::clean_up(&["--resumable"]);
    assert!(in_kernel(dir.path().file_name().unwrap()).is_empty());
}

/// On some systems `/mnt` and `/home` are links.
#[test]
fn root_u13_a_link_on_the_way_to_the_target_is_followed_once() {
    let dir = temp();
    let mut arguments = layers(&dir);
    fs::create_dir(dir.path().join("real")).unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    let at = arguments.last_mut().unwrap();
    *at = dir.path().join("link/tree").to_str().unwrap().to_owned();
    let held = held(arguments);
    let real = dir.path().join("real/tree");
    assert_eq!(held.json["target"], real.to_str().unwrap());
    assert_eq!(fs::read_to_string(real.join("base")).unwrap(), "b");
    let answer = held.end(Signal::TERM);
    answer.says(0, &[&format!("is {}", real.display())]);
    assert!(!real.exists());
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_options_of_one_layer_are_for_that_layer() {
    let dir = temp();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    layers(&dir);
    let at = path("at");
    let arguments = [
        "-o",
        "nodev",
        "-l",
        &path("top"),
        "--fs",
        "erofs",
        "-l",
        &path("base"),
        "-o",
        "noatime",
        "--at",
        &at,
    ];
    let held = held(arguments.map(str::to_owned).into());
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let options = |index: usize| {
        let at = held.json["layers"][index]["path"].as_str().unwrap();
        let line = table
            .lines()
            .find(|line| line.contains(&format!(" {at} ")))
            .unwrap();
        line.split(' ').nth(5).unwrap().to_owned()
    };
    let [top, base] = [options(0), options(1)];
    assert!(top.contains("nodev") && !top.contains("noatime"), "{top}");
    assert!(base.contains("nodev") && base.contains("noatime"), "{base}");
    let answer = held.end(Signal::TERM);
    answer.says(0, &[]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_a_block_device_is_a_layer() {
    let dir = temp();
    let mut arguments = layers(&dir);
    let image = dir.path().join("base");
    let mut losetup = Command::new("losetup");
    let made = losetup
        .args(["--find", "--show", "--read-only"])
        .arg(&image)
        .output()
        .unwrap();
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    arguments[3].clone_from(&device);
    let held = hold(arguments);
    let answer = held.map(|held| {
        assert_eq!(fs::read_to_string(dir.path().join("at/base")).unwrap(), "b");
        held.end(Signal::TERM)
    });
    let detach = Command::new("losetup").args(["--detach", &device]).status();
    assert!(detach.unwrap().success());
    let answer = answer.unwrap_or_else(|answer| answer);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_quiet_says_nothing_when_all_is_well() {
    let dir = temp();
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockmount"));
    command
        .args(["--quiet", "mount", "--json"])
        .args(layers(&dir));
    let held = common::hold_by(command).unwrap_or_else(|answer| panic!("{answer}"));
    let answer = held.end(Signal::TERM);
    answer.says(0, &[]);
    assert_eq!(
        answer.stderr.lines().count(),
        1,
        "only why it ends: {answer}"
    );
}

#[test]
fn root_a_second_signal_gives_up_on_a_busy_tree_and_says_what_stays() {
    let _alone = common::alone();
    let dir = temp();
    let mut held = held(layers(&dir));
    let file = fs::File::open(dir.path().join("at/base")).unwrap();
    common::signal(held.pid(), Signal::INT);
    held.wait_for("until they release it");
    let answer = held.end(Signal::INT);
    answer.says(
        1,
        &[
            "not everything could be released",
            "at/base".strip_suffix("/base").unwrap(),
            "blockmount cleanup",
        ],
    );
    assert!(!in_kernel(dir.path().file_name().unwrap()).is_empty());
    drop(file);
    common::clean_up(&[]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_x07_a_scratch_that_lost_writes_is_kept_and_the_mount_ends_with_an_error() {
    let _alone = common::alone();
    for is_told in [false, true] {
        // The program has its images on a small disk: it sees that one, of all that are, as its /var/tmp.
        let dir = tempfile::tempdir().unwrap();
        let small = Small::new("24m");
        let mut arguments = layers(&dir);
        arguments.extend(["--scratch", "400M"].map(str::to_owned));
        let bind = format!("mount --bind {} /var/tmp", small.0.path().display());
        let command = common::after_mounting(&bind, arguments);
        let held = common::hold_by(command).unwrap_or_else(|answer| panic!("{answer}"));
        let inside = Path::new("/proc").join(held.pid().to_string()).join("root");
        let at = inside
            .join(dir.path().strip_prefix("/").unwrap())
            .join("at");
        let full = fs::write(small.0.path().join("fill"), vec![1; 30 << 20]);
        assert_eq!(full.unwrap_err().kind(), ErrorKind::StorageFull);
        fs::write(at.join("large"), vec![1; 30 << 20]).unwrap();
        if is_told {
            // It fails, unless the kernel has written back by itself before: then nobody is told.
            Command::new("sync").arg("-f").arg(&at).status().unwrap();
        }
        let answer = held.end(Signal::TERM);
        let id = common::run_id(&answer.stderr).unwrap();
        let scratch = format!("blockmount-{id}/scratch.ext4");
        let kept = format!("kept as /var/tmp/{scratch}");
        let lost = "everything is released, but writes were lost";
        answer.says(1, &[lost, &kept, "cleanup --resumable"]);
        assert!(small.0.path().join(scratch).exists(), "{answer}");
        assert_eq!(common::in_kernel(id), Vec::<String>::new(), "{answer}");
        // It is removed only on request.
        let cleanup = common::run(["cleanup"]);
        assert_eq!(cleanup.code, Some(1), "{cleanup}");
        assert!(
            cleanup.has_words("writes to its scratch were lost"),
            "{cleanup}"
        );
        common::clean_up(&["--resumable"]);
        assert_nothing_left(&answer, &dir);
    }
}

/// A small disk of the host.
struct Small(tempfile::TempDir);

impl Small {
    fn new(size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "small"]);
        assert!(mount.arg(directory.path()).status().unwrap().success());
        Small(directory)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        let unmounted = unmount.arg("--lazy").arg(self.0.path()).status();
        assert!(unmounted.unwrap().success() || std::thread::panicking());
    }
}

#[test]
fn root_u04_a_layer_is_mounted_with_its_further_devices() {
    let dir = temp();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let content = |seed: &str| format!("{seed:4096}").repeat(2);
    for name in ["one", "two"] {
        image("erofs", path(name), &[("file", &content(name))]);
    }
    let contents = ["one", "two"].map(content);
    let files = [("first", 0), ("second", 1)].map(|(name, image)| merged_erofs::Merged {
        name,
        image,
        content: contents[image].as_bytes(),
    });
    let images = ["one", "two"].map(|name| dir.path().join(name));
    let merged = dir.path().join("merged");
    merged_erofs::write(&merged, &[&images[0], &images[1]], &files, true);
    let arguments = |devices: [&str; 2]| -> Vec<String> {
        let words = [
            "--layer",
            &path("merged"),
            "--device",
            &path(devices[0]),
            "--device",
            &path(devices[1]),
        ];
        let at = ["--at", &path("at")];
        words
            .iter()
            .chain(&at)
            .map(|word| (*word).to_owned())
            .collect()
    };
    let held = held(arguments(["one", "two"]));
    for (name, text) in ["first", "second"].iter().zip(&contents) {
        assert_eq!(
            &fs::read_to_string(dir.path().join("at").join(name)).unwrap(),
            text
        );
    }
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    let answer = hold(arguments(["two", "one"])).err().unwrap();
    answer.says(1, &["further device 1"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_an_overlay_has_the_options_that_were_asked_for() {
    let dir = temp();
    let with = |options: &[&str]| {
        let mut arguments = layers(&dir);
        let options = options
            .iter()
            .flat_map(|option| ["--overlay-option", option]);
        arguments.extend(options.map(str::to_owned));
        arguments
    };
    let mut volatile = with(&["volatile"]);
    volatile.extend(["--scratch", "32M"].map(str::to_owned));
    let held = held(volatile);
    let at = dir.path().join("at");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table
        .lines()
        .find(|line| line.contains(&format!(" {} ", at.display())));
    let shown = |word: &str| line.unwrap().contains(word);
    assert!(shown(",volatile") || shown("fsync=volatile"), "{line:?}");
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    for (options, words) in [
        (&["volatile"], "no scratch disk"),
        (&["lowerdir=/etc"], "lowerdir"),
    ] {
        let answer = hold(with(options)).err().unwrap();
        answer.says(1, &[words]);
        assert_nothing_left(&answer, &dir);
    }
}

#[test]
fn root_u15_the_tree_and_a_layer_of_it_are_seen_at_other_places() {
    let dir = temp();
    let path = |name: &str| dir.path().join(name);
    let tree = format!("{}:ro,noexec", path("seen").display());
    let layer = format!("{}:layer=2", path("made/base").display());
    let mut arguments = layers(&dir);
    arguments.extend(["--scratch", "32M", "--view", &tree, "--view", &layer].map(str::to_owned));
    let held = held(arguments.clone());
    let views = &held.json["views"];
    assert_eq!(views[0]["of"], path("at").to_str().unwrap());
    assert_eq!(views[0]["read_only"], true);
    assert_eq!(views[1]["of"], held.json["layers"][1]["path"]);
    fs::write(path("at/new"), "in the tree").unwrap();
    assert_eq!(fs::read_to_string(path("seen/new")).unwrap(), "in the tree");
    let error = fs::write(path("seen/other"), "x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(
        fs::read_to_string(path("made/base/layer.txt")).unwrap(),
        "base"
    );
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert!(!path("seen").exists() && !path("made").exists());
    // What cannot be shown is said, and takes nothing along.
    for (view, code, words) in [
        (
            format!("{}:layer=3", path("x").display()),
            2,
            "there is no layer 3",
        ),
        (
            format!("{}:subpath=none", path("x").display()),
            1,
            "it is not there",
        ),
        (
            path("at").display().to_string(),
            1,
            "an overlay is mounted there",
        ),
    ] {
        let mut arguments = layers_of(&dir);
        arguments.extend(["--view".to_owned(), view]);
        let Err(answer) = hold(arguments) else {
            panic!("{words} is no trouble");
        };
        answer.says(code, &[words]);
        assert_nothing_left(&answer, &dir);
        assert!(!path("at").exists() && !path("x").exists());
    }
}

#[test]
fn root_u21_the_files_of_layers_appear_as_those_of_a_container() {
    let dir = temp();
    let at = dir.path().join("at");
    let mut arguments = vec!["--map-ids".to_owned(), "0:100000:65536".to_owned()];
    arguments.extend(layers(&dir));
    arguments.extend(["--scratch", "32M"].map(str::to_owned));
    let held = held(arguments);
    let owner = |path: &Path| {
        let meta = path.metadata().unwrap();
        (meta.uid(), meta.gid())
    };
    let all = (100_000, 100_000);
    assert_eq!(
        [owner(&at), owner(&at.join("base")), owner(&at.join("top"))],
        [all; 3]
    );
    // The root of the container, who has no rights on the way to the tree.
    let written = Command::new("setpriv")
        .args(["--reuid", "100000", "--regid", "100000", "--clear-groups"])
        .args(["sh", "-ec", "echo more >> base; mkdir new; rm top"])
        .current_dir(&at)
        .status();
    assert!(written.unwrap().success());
    assert_eq!(fs::read_to_string(at.join("base")).unwrap(), "bmore\n");
    assert_eq!(owner(&at.join("new")), all);
    let scratch = Path::new(held.json["scratch"]["path"].as_str().unwrap());
    assert_eq!(owner(&scratch.join("upper/base")), all);
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
}
