//! `blockmount inspect`: what it says of images, good and bad.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::process::Stdio;

use crate::common::{self, finish, image, partitioned, program, run, temp};

#[test]
fn says_what_is_in_each_image() {
    let dir = temp();
    let paths = ["a.erofs", "b.squashfs", "c.ext4", "d.disk"].map(|name| dir.path().join(name));
    for (path, filesystem) in paths.iter().zip(["erofs", "squashfs", "ext4"]) {
        image(filesystem, path, &[("file", "text")]);
    }
    partitioned(&paths[3], &[("file", "text")]);

    let mut command = program(["inspect", "--json"]);
    let answer = finish(
        command
            .args(&paths)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    answer.says(0, &[]);
    let json = answer.json();
    for (found, (path, filesystem)) in json
        .as_array()
        .unwrap()
        .iter()
        .zip(paths.iter().zip(["erofs", "squashfs", "ext4"]))
    {
        assert_eq!(found["image"], path.to_str().unwrap());
        assert_eq!(found["size"], fs::metadata(path).unwrap().len());
        assert_eq!(found["content"]["kind"], "filesystem");
        assert_eq!(found["content"]["filesystem"], filesystem);
        assert!(
            found["content"]["block_size"].as_u64().unwrap() >= 512,
            "{found}"
        );
    }
    assert_eq!(json[2]["content"]["label"], "test-label");
    assert_eq!(json[2]["content"]["uuid"].as_str().unwrap().len(), 36);
    assert_eq!(json[2]["content"]["filesystem_size"], 8 << 20);

    let disk = &json[3];
    assert_eq!(disk["content"]["kind"], "partition-table");
    let partitions = disk["partitions"].as_array().unwrap();
    assert_eq!(partitions.len(), 2);
    assert_eq!(partitions[0]["content"]["kind"], "blank");
    assert_eq!(
        (&partitions[1]["number"], &partitions[1]["name"]),
        (&2.into(), &"second".into())
    );
    assert_eq!(partitions[1]["start"], 4096 * 512);
    assert_eq!(partitions[1]["content"]["filesystem"], "ext4");
}

#[test]
fn has_a_table_for_people() {
    let dir = temp();
    let path = dir.path().join("c.ext4");
    image("ext4", &path, &[("file", "text")]);
    let answer = run(["inspect", path.to_str().unwrap()]);
    answer.says(0, &[]);
    for word in [
        "ext4",
        "8 MiB",
        "test-label",
        "filesystem size",
        "block size",
        "uuid",
    ] {
        assert!(answer.stdout.contains(word), "no {word:?} in {answer}");
    }
}

#[test]
fn bad_images_get_a_clear_answer() {
    let dir = temp();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let garbage: Vec<u8> = (0..100_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    run(["inspect", &file("garbage", &garbage)]).says(1, &["unknown content", "advice:"]);
    run(["inspect", &file("empty", b"")]).says(1, &["empty", "advice:"]);
    run(["inspect", &file("small", b"x")]).says(1, &["unknown content"]);

    let whole = dir.path().join("whole");
    image("ext4", &whole, &[("file", "text")]);
    let bytes = fs::read(&whole).unwrap();
    let answer = run(["inspect", "--json", &file("cut", &bytes[..1 << 20])]);
    answer.says(
        1,
        &[
            "truncated: needs 8388608 bytes, has 1048576",
            "advice: the end is missing",
        ],
    );
    assert_eq!(answer.json()[0]["content"]["truncated"], true);

    run(["inspect", "/nowhere/at/all"]).says(
        1,
        &["cannot inspect /nowhere/at/all", "No such file", "advice:"],
    );
    run(["inspect", dir.path().to_str().unwrap()]).says(1, &["neither a file nor a block device"]);
    run(["inspect", "/dev/null"]).says(1, &["neither a file nor a block device"]);

    let pipe = dir.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    run(["inspect", pipe.to_str().unwrap()]).says(1, &["neither a file nor a block device"]);
}

#[test]
fn one_bad_image_does_not_hide_the_others() {
    let dir = temp();
    let good = dir.path().join("good");
    image("squashfs", &good, &[("file", "text")]);
    let answer = run(["inspect", "--json", "/nowhere", good.to_str().unwrap()]);
    answer.says(1, &["/nowhere"]);
    assert_eq!(answer.json()[0]["content"]["filesystem"], "squashfs");
}

#[test]
fn hostile_names_do_not_reach_the_terminal() {
    let dir = temp();
    let name = std::ffi::OsString::from_vec(b"a b,c:\n\x1b[2J\xff".to_vec());
    let path = dir.path().join(name);
    image("erofs", &path, &[("file", "text")]);
    let mut command = program(["inspect"]);
    let answer = finish(
        command
            .arg(&path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    answer.says(0, &[]);
    assert!(!answer.stdout.contains('\u{1b}'), "{answer}");
    assert!(answer.stdout.contains("erofs"), "{answer}");
}

#[test]
fn needs_no_root() {
    let dir = temp();
    let path = dir.path().join("c.ext4");
    image("ext4", &path, &[("file", "text")]);
    let mut command = common::as_nobody(dir.path(), ["inspect".as_ref(), path.as_os_str()]);
    let answer = finish(
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    answer.says(0, &[]);
    assert!(answer.stdout.contains("ext4"), "{answer}");
}
