//! What `blockmount mount` refuses: each with a clear error, and nothing left behind.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::{
    self, Answer, as_nobody, assert_nothing_left, finish, hold, image, partitioned, temp,
};
use rustix::process::Signal;
use tempfile::TempDir;

/// An image that is good, and a directory for it and for targets.
fn good() -> (TempDir, PathBuf) {
    let dir = temp();
    let path = dir.path().join("good");
    image("ext4", &path, &[("file", "text"), ("other", "text")]);
    (dir, path)
}

/// Asserts that a mount is refused with these words, and that nothing is left.
#[track_caller]
fn refused(dir: &TempDir, arguments: &[&OsStr], words: &[&str]) -> Answer {
    let before = listing(dir.path());
    let answer = match hold(arguments) {
        Ok(held) => panic!("not refused: {}", held.end(Signal::TERM)),
        Err(answer) => answer,
    };
    answer.says(1, &["error: ", "advice: "]);
    answer.says(1, words);
    assert!(!answer.stderr.contains("left over"), "{answer}");
    assert_eq!(answer.stdout, "");
    assert_nothing_left(&answer, dir);
    assert_eq!(listing(dir.path()), before, "{answer}");
    answer
}

fn listing(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    all.sort();
    all
}

macro_rules! words {
    ($($word:expr),* $(,)?) => { &[$(AsRef::<OsStr>::as_ref(&$word)),*][..] };
}

#[test]
fn root_images_that_are_none() {
    let (dir, good) = good();
    let at = dir.path().join("at");
    let make = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let bytes = fs::read(&good).unwrap();
    let absent = dir.path().join("absent");
    for (image, said) in [
        (absent, "No such file"),
        (make("empty", b""), "empty"),
        (make("cut", &bytes[..1 << 20]), "cut"),
        (make("garbage", &[0xa5; 1 << 20]), "garbage"),
        (make("blank", &[0; 1 << 20]), "blank"),
        (
            make("gzip", &[0x1f, 0x8b, 8, 0].repeat(1 << 18)),
            "compressed with gzip",
        ),
        (
            make("zstd", &[0x28, 0xb5, 0x2f, 0xfd].repeat(1 << 18)),
            "compressed with zstd",
        ),
        (dir.path().to_owned(), "cannot"),
        ("/dev/null".into(), "/dev/null"),
    ] {
        refused(&dir, words!["--layer", image, "--at", at], &[said]);
        // A layer that is good is released again when another one is not.
        refused(
            &dir,
            words![
                "--layer",
                good,
                "--layer",
                image,
                "--at",
                at,
                "--scratch",
                "8M"
            ],
            &[said],
        );
    }
}

#[test]
fn root_partitions_that_do_not_exist() {
    let (dir, good) = good();
    let at = dir.path().join("at");
    let disk = dir.path().join("disk");
    partitioned(&disk, &[("file", "text")]);
    refused(
        &dir,
        words!["--layer", disk, "--partition", "7", "--at", at],
        &["no partition 7"],
    );
    refused(
        &dir,
        words!["--layer", good, "--partition", "1", "--at", at],
        &["no partition 1"],
    );
    refused(&dir, words!["--layer", disk, "--at", at], &["partition"]);
}

#[test]
fn root_targets_that_cannot_be() {
    let (dir, good) = good();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("file"), "x").unwrap();
    fs::create_dir(path("full")).unwrap();
    fs::write(path("full/x"), "x").unwrap();
    symlink(path("nowhere"), path("dangling")).unwrap();
    for target in [
        path("file"),
        path("file/below"),
        path("dangling"),
        path("full"),
        "/".into(),
        "/usr".into(),
        "/etc".into(),
        "/proc".into(),
        "/dev".into(),
        "/run".into(),
        "/tmp".into(),
    ] {
        let said = target.display().to_string();
        refused(&dir, words!["--layer", good, "--at", target], &[&said]);
    }
    assert_eq!(fs::read_to_string(path("full/x")).unwrap(), "x");
    let long = path(&"x".repeat(300));
    refused(&dir, words!["--layer", good, "--at", long], &["xxx"]);
}

#[test]
fn root_a_target_that_is_a_mount_point() {
    let (dir, good) = good();
    let at = dir.path().join("at");
    let held =
        hold(words!["--layer", good, "--at", at]).unwrap_or_else(|answer| panic!("{answer}"));
    let Err(answer) = hold(words!["--layer", good, "--at", at]) else {
        panic!("mounted over a mount")
    };
    answer.says(1, &["at", "advice: "]);
    assert_eq!(
        fs::read_to_string(at.join("file")).unwrap(),
        "text",
        "the first mount is untouched"
    );
    let answer = held.end(Signal::TERM);
    answer.says(0, &[]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_options_that_make_no_sense() {
    let (dir, good) = good();
    let at = dir.path().join("at");
    for (option, said) in [
        ("rw", "contradicts"),
        ("no_such_option", "no_such_option"),
        ("bind", "does not apply"),
        ("remount", "does not apply"),
        ("nodev,noexec", "comma"),
        ("", "malformed"),
    ] {
        refused(
            &dir,
            words!["--layer", good, "--at", at, "--option", option],
            &[said],
        );
    }
    let both = ["--option", "atime", "--option", "noatime"];
    let arguments = words![
        "--layer", good, "--at", at, both[0], both[1], both[2], both[3]
    ];
    refused(&dir, arguments, &["contradicts"]);
}

#[test]
fn root_needs_root() {
    let (dir, good) = good();
    for arguments in [
        words!["mount", "--layer", good, "--at", dir.path().join("at")],
        words!["demo", "--json"],
    ] {
        let mut command = as_nobody(dir.path(), arguments);
        let answer = finish(
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        answer.says(1, &["needs root", "advice: run it with sudo"]);
        assert_nothing_left(&answer, &dir);
    }
    // A user has runs and a cache too.
    let mut command = as_nobody(dir.path(), ["cleanup"]);
    let own = dir.path().join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(65_534), None).unwrap();
    for place in ["HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"] {
        command.env(place, &own);
    }
    let answer = finish(
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    answer.says(0, &[]);
    assert!(answer.stdout.contains("nothing to clean up"), "{answer}");
}

#[test]
fn root_names_of_every_kind_work() {
    let dir = temp();
    let plain = dir.path().join("plain");
    image("erofs", &plain, &[("file", "text")]);
    for name in [
        &b"with space"[..],
        b"comma,colon:lowerdir=x",
        b"new\nline\ttab",
        b"quote\"back\\slash\\040",
        b"\xff\xfe not utf-8",
        b"-dash",
    ] {
        let below = dir.path().join(OsString::from_vec(name.to_vec()));
        fs::create_dir(&below).unwrap();
        let (image, at) = (below.join(OsStr::new("an image,:")), below.join("at: a,b"));
        fs::copy(&plain, &image).unwrap();
        let held = hold(words!["--layer", image, "--scratch", "8M", "--at", at]);
        let held = held.unwrap_or_else(|answer| panic!("{answer}"));
        assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "text");
        fs::write(at.join("new"), "x").unwrap();
        let answer = held.end(Signal::TERM);
        answer.says(0, &[]);
        assert!(!at.exists(), "{answer}");
        assert_nothing_left(&answer, &dir);
    }
}

#[test]
fn root_paths_of_4000_characters_work_or_are_refused_clearly() {
    let dir = temp();
    let mut deep = dir.path().to_owned();
    while deep.as_os_str().len() < 3_800 {
        deep.push("d".repeat(200));
        fs::create_dir(&deep).unwrap();
    }
    deep.push("d".repeat(4_000 - 20 - deep.as_os_str().len()));
    fs::create_dir(&deep).unwrap();
    let plain = dir.path().join("plain");
    image("erofs", &plain, &[("file", "text")]);
    let (image, at) = (deep.join("image"), deep.join("at"));
    fs::copy(&plain, &image).unwrap();
    match hold(words!["--layer", image, "--at", at]) {
        Ok(held) => {
            assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "text");
            let answer = held.end(Signal::TERM);
            answer.says(0, &[]);
            assert_nothing_left(&answer, &dir);
        }
        Err(answer) => {
            answer.says(1, &["error: ", "advice: "]);
            assert_nothing_left(&answer, &dir);
        }
    }
    let endless = dir.path().join("x/".repeat(3_000));
    refused(
        &dir,
        words!["--layer", plain, "--at", endless],
        &["error: "],
    );
    refused(
        &dir,
        words!["--layer", endless, "--at", dir.path().join("at")],
        &["error: "],
    );
}

#[test]
fn root_a_hash_tree_needs_a_device_mapper_and_one_that_fits() {
    let (dir, good) = good();
    let at = dir.path().join("at");
    common::run(["seal", good.to_str().unwrap()]).says(0, &[]);
    let metadata = PathBuf::from(format!("{}.dmverity", good.display()));
    let absent = dir.path().join("absent.dmverity");
    for (verity, said) in [
        (absent.as_os_str(), "cannot use --verity"),
        (good.as_os_str(), "a .dmverity file"),
        (OsStr::new("root=ab,offset=0"), "no superblock"),
        (OsStr::new("root=ab,offset=1"), "multiple of 512"),
    ] {
        refused(
            &dir,
            words!["--layer", good, "--verity", verity, "--at", at],
            &[said],
        );
    }
    let arguments = words!["--layer", good, "--verity", metadata, "--at", at];
    match Path::new("/sys/class/misc/device-mapper").exists() {
        false => drop(refused(
            &dir,
            arguments,
            &["this kernel has no device-mapper"],
        )),
        true => {
            let held = hold(arguments).unwrap_or_else(|answer| panic!("{answer}"));
            held.end(Signal::TERM).says(0, &["nothing is left"]);
        }
    }
}
