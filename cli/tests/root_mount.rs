//! `blockmount mount`: what is held, and that nothing is left after it.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use common::{Held, assert_nothing_left, hold, image, in_kernel, temp};
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
fn root_a_second_signal_gives_up_on_a_busy_tree_and_says_what_stays() {
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
    let cleanup = common::run(["cleanup"]);
    assert_eq!(cleanup.code, Some(0), "{cleanup}");
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_x07_writes_to_the_scratch_that_were_lost_are_an_error_of_the_mount() {
    for is_told in [false, true] {
        // Not below /var/tmp, where the images of a run are: the program sees a small one there, of its own.
        let dir = tempfile::tempdir().unwrap();
        let mut arguments = layers(&dir);
        arguments.extend(["--scratch", "400M"].map(str::to_owned));
        let command =
            common::after_mounting("mount -t tmpfs -o size=24m small /var/tmp", arguments);
        let held = common::hold_by(command).unwrap_or_else(|answer| panic!("{answer}"));
        let inside = Path::new("/proc").join(held.pid().to_string()).join("root");
        let at = inside
            .join(dir.path().strip_prefix("/").unwrap())
            .join("at");
        let full = fs::write(inside.join("var/tmp/fill"), vec![1; 30 << 20]);
        assert_eq!(full.unwrap_err().kind(), ErrorKind::StorageFull);
        fs::write(at.join("large"), vec![1; 30 << 20]).unwrap();
        if is_told {
            let sync = Command::new("sync").arg("-f").arg(&at).status().unwrap();
            assert!(!sync.success());
        }
        let answer = held.end(Signal::TERM);
        answer.says(
            1,
            &["everything is released, but writes were lost", "scratch"],
        );
        assert_nothing_left(&answer, &dir);
    }
}
