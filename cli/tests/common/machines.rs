//! Machines of QEMU that a run of the program has, also when it has ended.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use blockmount_checker::Checker;
use blockmount_qemu::{GuestStream, Vm};
use serde_json::Value;
use tempfile::TempDir;

use super::{Held, hold_by, image, program, run_id};

/// The processes of QEMU that have something to do with a run.
pub fn machines_of(id: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines
        .filter(|line| line.starts_with("qemu") && line.contains(id))
        .collect()
}

/// A mount in a machine of its own that is held, the run's id, and the process of QEMU.
pub fn held_in_a_machine(dir: &TempDir) -> (Held, String, u32) {
    held_in_a_machine_by(dir, |_| {})
}

/// The same by a program that is prepared.
pub fn held_in_a_machine_by(
    dir: &TempDir,
    prepare: impl FnOnce(&mut Command),
) -> (Held, String, u32) {
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.display().to_string();
    let arguments = [
        "--guest",
        "qemu",
        "--scratch",
        "8M",
        "--at",
        "/mnt/tree",
        "--layer",
        &layer,
    ];
    let mut command = program(["mount", "--json"]);
    command.args(arguments);
    prepare(&mut command);
    let mut held = hold_by(command).unwrap_or_else(|answer| panic!("{answer}"));
    let said = held.wait_for("run started");
    let id = run_id(&said).unwrap().to_owned();
    let children = format!("/proc/{0}/task/{0}/children", held.pid());
    let tasks = std::fs::read_dir(format!("/proc/{}/task", held.pid())).unwrap();
    let children = std::iter::once(children.into())
        .chain(tasks.flatten().map(|task| task.path().join("children")));
    let children: Vec<std::path::PathBuf> = children.collect();
    let pids = children
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok());
    let pids: Vec<u32> = pids
        .flat_map(|text| {
            text.split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .collect::<Vec<_>>()
        })
        .collect();
    (held, id, pids[0])
}

/// A mount whose machine outlives its program.
pub fn keeping<'a>(name: &'a str, layer: &'a str, transport: &'a str) -> [&'a str; 13] {
    [
        "--guest",
        "qemu",
        "--keep-vm",
        "--transport",
        transport,
        "--name",
        name,
        "--scratch",
        "8M",
        "--at",
        "/mnt/tree",
        "--layer",
        layer,
    ]
}

/// Where the disks of a mount are, without the reasons why, which are known at its start only.
pub fn places(held: &Held) -> Vec<Value> {
    let layers = held.json["layers"].as_array().unwrap().iter();
    let disks = layers.chain([&held.json["scratch"]]).cloned();
    let place = |mut disk: Value| {
        disk.as_object_mut().unwrap().remove("passed_on");
        disk
    };
    disks.map(place).collect()
}

/// The directory of the machine that a run has kept.
pub fn directory_of(id: &str) -> PathBuf {
    let work = std::fs::read_dir(format!("/var/tmp/blockmount-{id}")).unwrap();
    let mut directories = work.flatten().map(|entry| entry.path());
    directories
        .find(|directory| directory.join("vm.json").exists())
        .unwrap()
}

/// Asks the guest that a run has kept, between that run and the next.
pub fn in_guest(id: &str, ask: impl AsyncFnOnce(&mut Checker<GuestStream>)) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let vm = Vm::reattach(directory_of(id)).await.unwrap();
        let stream = vm.connect(blockmount_checker::PORT, Duration::from_secs(30));
        ask(&mut Checker::new(stream.await.unwrap())).await;
    });
}

/// The process of the machine that a run has kept.
pub fn machine_in(id: &str) -> u32 {
    let record = directory_of(id).join("vm.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    record["process"]["pid"]
        .as_u64()
        .unwrap()
        .try_into()
        .unwrap()
}
