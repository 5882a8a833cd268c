//! `blockmount seal` and `inspect --verity`: what they make, say and refuse.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{image, run, temp};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn erofs(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("a.erofs");
    // More than one block: the root of a single one is its digest, and there is no tree.
    image("erofs", &path, &[("file", &"text".repeat(9_000))]);
    path
}

fn beside(path: &Path) -> PathBuf {
    blockmount_verity::Metadata::path_of(path)
}

#[test]
fn a_sealed_image_is_what_containerd_and_veritysetup_take() {
    let dir = temp();
    let path = erofs(&dir);
    let before = fs::read(&path).unwrap();
    let answer = run(["seal", "--json", text(&path)]);
    answer.says(0, &[]);
    let json = answer.json();
    assert!(fs::read(&path).unwrap().starts_with(&before));
    let metadata = fs::read_to_string(beside(&path)).unwrap();
    let root = json["root_digest"].as_str().unwrap();
    let offset = json["hash_offset"].as_u64().unwrap();
    let expected = format!("{{\n  \"roothash\": \"{root}\",\n  \"hashoffset\": {offset}\n}}");
    assert_eq!(metadata, expected);
    let verify = Command::new("/usr/sbin/veritysetup")
        .args(["verify", text(&path), text(&path), root])
        .arg(format!("--hash-offset={offset}"))
        .status();
    assert!(verify.unwrap().success());

    let answer = run(["inspect", "--verity", "--json", text(&path)]);
    answer.says(0, &[]);
    let found = &answer.json()[0]["verity"];
    assert_eq!(
        (&found["root_digest"], &found["hash_offset"]),
        (&json["root_digest"], &json["hash_offset"])
    );
    assert_eq!(found["corrupt"], serde_json::Value::Null);
    let answer = run(["inspect", "--verity", text(&path)]);
    answer.says(0, &[]);
    assert!(
        answer.stdout.contains("intact") && answer.stdout.contains("sha256"),
        "{answer}"
    );
    // Without being asked, nothing is said of it.
    let plain = run(["inspect", "--json", text(&path)]);
    assert!(plain.json()[0].get("verity").is_none(), "{plain}");
}

#[test]
fn a_sealed_image_is_refused_and_a_corrupt_one_is_told() {
    let dir = temp();
    let path = erofs(&dir);
    run(["seal", text(&path)]).says(0, &["a.erofs.dmverity"]);
    let sealed = fs::read(&path).unwrap();
    run(["seal", text(&path)]).says(1, &["already", "inspect --verity"]);
    let metadata = fs::read(beside(&path)).unwrap();
    fs::remove_file(beside(&path)).unwrap();
    run(["seal", text(&path)]).says(1, &["sealed already", "inspect --verity"]);
    assert_eq!(fs::read(&path).unwrap(), sealed);
    run(["inspect", "--verity", text(&path)]).says(0, &[]);
    // The digest beside the image is the one that counts.
    let of_another = String::from_utf8(metadata)
        .unwrap()
        .replacen(['0', '1', '2'], "9", 1);
    fs::write(beside(&path), of_another).unwrap();
    run(["inspect", "--verity", text(&path)]).says(1, &["is corrupt", "root of the tree"]);
    fs::remove_file(beside(&path)).unwrap();
    let mut bad = sealed.clone();
    bad[700] ^= 1;
    fs::write(&path, bad).unwrap();
    run(["inspect", "--verity", text(&path)]).says(1, &["is corrupt", "data block 0"]);
    let unsealed = dir.path().join("b.erofs");
    image("erofs", &unsealed, &[("file", "text")]);
    run(["inspect", "--verity", text(&unsealed)]).says(1, &["no hash tree"]);
}

#[test]
fn a_tree_can_have_a_file_of_its_own() {
    let dir = temp();
    let (path, tree) = (erofs(&dir), dir.path().join("tree"));
    let before = fs::read(&path).unwrap();
    let arguments = [
        "seal",
        "--tree",
        text(&tree),
        "--algorithm",
        "sha512",
        "--salt",
        "0aFF",
    ];
    let answer = run(arguments.into_iter().chain([text(&path)]));
    answer.says(0, &[]);
    assert_eq!(fs::read(&path).unwrap(), before);
    assert!(!beside(&path).exists());
    let root = answer.stdout.trim();
    let verify = Command::new("/usr/sbin/veritysetup")
        .args(["verify", text(&path), text(&tree), root])
        .status();
    assert!(verify.unwrap().success());
    let made = fs::read(&tree).unwrap();
    run(arguments.into_iter().chain([text(&path)])).says(1, &["tree"]);
    assert_eq!(fs::read(&tree).unwrap(), made);
}

#[test]
fn what_cannot_be_sealed_is_refused_and_stays_as_it_is() {
    let dir = temp();
    let (empty, qcow2) = (dir.path().join("empty"), dir.path().join("x.qcow2"));
    fs::write(&empty, "").unwrap();
    fs::write(&qcow2, b"QFI\xfb and more").unwrap();
    run(["seal", text(&empty)]).says(1, &["empty image"]);
    run(["seal", text(&qcow2)]).says(1, &["qcow2", "qemu-img convert"]);
    run(["seal", text(&dir.path().join("absent"))]).says(1, &["cannot"]);
    run(["seal", "--salt", "abc", text(&empty)]).says(2, &["salt"]);
    run(["seal", "--algorithm", "md5", text(&empty)]).says(2, &["sha256"]);
    let path = erofs(&dir);
    let before = fs::read(&path).unwrap();
    run(["seal", "--block-size", "5000", text(&path)]).says(1, &["power of two"]);
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read(&qcow2).unwrap(), b"QFI\xfb and more");
    let names = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names, 3);
}

#[test]
fn the_blocks_of_the_tree_are_no_larger_than_those_of_the_filesystem() {
    let dir = temp();
    let path = dir.path().join("c.ext4");
    image("ext4", &path, &[("file", "text")]);
    let answer = run(["seal", "--json", text(&path)]);
    answer.says(0, &[]);
    assert_eq!(answer.json()["data_block_size"], 1024);
    assert_eq!(answer.json()["hash_block_size"], 4096);
}
