//! As many layers as the kernel stacks, and more.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::{alone, hold, image, in_kernel, temp};
use rustix::process::Signal;
use tempfile::TempDir;

/// So many small layers, as words of the command line.
fn layers(dir: &TempDir, count: usize) -> Vec<String> {
    let first = dir.path().join("first");
    image("erofs", &first, &[("file", "text")]);
    let copy = |number: usize| -> PathBuf {
        let path = dir.path().join(format!("layer{number}"));
        fs::copy(&first, &path).unwrap();
        path
    };
    let words = (0..count).flat_map(|number| {
        let path = copy(number).to_str().unwrap().to_owned();
        ["--layer".to_owned(), path]
    });
    let at = dir.path().join("at").to_str().unwrap().to_owned();
    words.chain(["--at".to_owned(), at]).collect()
}

fn loop_devices() -> usize {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let is_loop = |name: &str| name.starts_with("loop");
    devices
        .filter(|device| is_loop(&device.file_name().to_string_lossy()))
        .count()
}

#[test]
fn root_u17_300_layers_again_and_again_make_no_more_loop_devices() {
    let _alone = alone();
    let dir = temp();
    let arguments = layers(&dir, 300);
    let mut counts = Vec::new();
    for _ in 0..3 {
        let held = hold(&arguments).unwrap_or_else(|answer| panic!("{answer}"));
        assert_eq!(held.json["layers"].as_array().unwrap().len(), 300);
        assert_eq!(
            fs::read_to_string(dir.path().join("at/file")).unwrap(),
            "text"
        );
        let answer = held.end(Signal::TERM);
        answer.says(0, &["nothing is left"]);
        counts.push(loop_devices());
    }
    assert!(in_kernel(dir.path().file_name().unwrap()).is_empty());
    assert_eq!(counts[1..], [counts[0]; 2], "loop devices after each run");
}

#[test]
fn root_u17_more_layers_than_linux_stacks_are_refused_before_anything_is_attached() {
    let dir = temp();
    let Err(answer) = hold(layers(&dir, 1_000)) else {
        panic!("1,000 layers were mounted");
    };
    answer.says(2, &["1000 layers", "500"]);
    assert_eq!(common::run_id(&answer.stderr), None, "{answer}");
    assert!(in_kernel(dir.path().file_name().unwrap()).is_empty());
}
