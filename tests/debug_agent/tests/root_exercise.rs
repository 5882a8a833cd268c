//! Each step of a mount fails once, or is the last of its process, on loop devices: what needs no device mapper.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmount_debug_agent::exercise::{Appears, Exercise, Fault, Layer, Place, combinations};
use blockmount_debug_agent::kit::{images, temp};

const PROGRAM: &str = env!("CARGO_BIN_EXE_blockmount-debug-agent");
/// Where partition 1 is, in bytes.
const RANGE: (u64, u64) = (1 << 20, 17 << 20);

struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path, read_only: bool) -> Self {
        let mut losetup = images::tool("losetup");
        losetup
            .args(["-f", "--show"])
            .args(read_only.then_some("-r"));
        let output = losetup.arg(image).output().unwrap();
        assert!(output.status.success());
        Loop(String::from_utf8(output.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = images::tool("losetup").arg("-d").arg(&self.0).status();
        assert!(done.unwrap().success() || std::thread::panicking());
    }
}

/// A disk with an ext4 on all of it, or on its only partition.
fn disk(path: &Path, place: Place) {
    let filesystem = path.with_extension("ext4");
    images::image("ext4", &filesystem, &[("file", "text")]);
    if place == Place::Whole {
        File::create(path).unwrap().set_len(RANGE.1).unwrap();
        let disk = File::options().write(true).open(path).unwrap();
        disk.write_all_at(&fs::read(filesystem).unwrap(), 0)
            .unwrap();
        return;
    }
    File::create(path).unwrap().set_len(20 << 20).unwrap();
    let script = path.with_extension("script");
    fs::write(&script, "label: gpt\nstart=2048,size=32768\n").unwrap();
    let mut sfdisk = images::tool("sfdisk");
    sfdisk
        .arg("-q")
        .arg(path)
        .stdin(File::open(script).unwrap());
    images::run_tool(sfdisk);
    let disk = File::options().write(true).open(path).unwrap();
    disk.write_all_at(&fs::read(filesystem).unwrap(), RANGE.0)
        .unwrap();
}

fn steps(exercise: &Exercise) -> u32 {
    let mut program = Command::new(PROGRAM);
    program
        .arg("--exercise")
        .arg(serde_json::to_string(exercise).unwrap());
    let answer = blockmount_debug_agent::kit::run(program);
    assert_eq!(answer.code, Some(0), "{answer}");
    answer.stdout.trim().parse().unwrap()
}

#[test]
fn root_each_step_fails_once_or_is_the_last_and_nothing_is_left() {
    let dir = temp();
    let memory = tempfile::tempdir_in("/run").unwrap();
    let mut tried = 0;
    for (place, layer, appears) in combinations() {
        if layer != Layer::Plain || !matches!(place, Place::Whole | Place::Partition) {
            continue;
        }
        let image = dir.path().join(format!("{place:?}-{appears:?}"));
        disk(&image, place);
        let device = Loop::new(&image, appears != Appears::NewFilesystem);
        for fault in [Fault::Fails, Fault::Killed] {
            let exercise = Exercise {
                place,
                layer,
                appears,
                fault,
                steps: (0, 1),
                disk: device.0.clone(),
                range: match place {
                    Place::Whole => (0, RANGE.1),
                    _ => RANGE,
                },
                verity: None,
                tree: None,
                keys: None,
                directory: memory.path().join("exercise"),
            };
            let steps = steps(&exercise);
            // Two directories and what is in them, before and after each is made, and each of their removals.
            assert!(steps > 8, "{exercise:?} had {steps} steps");
            tried += 1;
        }
    }
    assert_eq!(tried, 12);
}
