//! The program with a virtual machine: the demo, a mount that is held, and every way to end them.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use blockmount_checker::Checker;
use blockmount_checker::tree::{Node, Tree, digest_bytes};
use blockmount_qemu::{GuestStream, Vm};
use common::{
    Held, alone, assert_nothing_left, eventually, hold, image, partitioned, run, run_id, temp,
};
use rustix::process::{Pid, Signal, kill_process_group};

/// The processes of QEMU that have something to do with a run.
fn machines_of(id: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines
        .filter(|line| line.starts_with("qemu") && line.contains(id))
        .collect()
}

#[test]
fn vm_the_demo_shows_both_transports_and_leaves_nothing() {
    let dir = temp();
    let paths = ["top.erofs", "disk.img", "base.ext4"].map(|name| dir.path().join(name));
    image("erofs", &paths[0], &[("a", "top"), ("b", "top")]);
    partitioned(&paths[1], &[("b", "middle"), ("d/c", "middle")]);
    image("ext4", &paths[2], &[("d/c", "base"), ("e", "base")]);
    let [top, disk, base] = paths.each_ref().map(|path| path.to_str().unwrap());
    let layers = [
        "--layer",
        top,
        "--layer",
        disk,
        "--partition",
        "2",
        "--layer",
        base,
    ];
    let arguments = ["demo", "--guest", "qemu", "--transport", "auto", "--json"];
    let answer = run(arguments.into_iter().chain(layers));
    answer.says(0, &[]);
    let json = answer.json();
    assert_eq!(json["guest"], "qemu");
    let disks = json["layers"].as_array().unwrap();
    let transports: BTreeSet<(&str, &str)> = disks
        .iter()
        .map(|disk| {
            (
                disk["role"].as_str().unwrap(),
                disk["transport"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        transports,
        BTreeSet::from([("layer", "vpmem"), ("scratch", "scsi")])
    );
    for count in [
        "distinct_images",
        "attaches",
        "detaches",
        "mounts",
        "unmounts",
    ] {
        assert_eq!(json[count], 5, "{count}: {answer}");
    }
    assert_eq!(json["digest_mismatches"], 0, "{answer}");
    assert_eq!(json["left_over"].as_array().unwrap().len(), 0, "{answer}");
    for (which, disks) in [("one", 1), ("many", 64)] {
        let speed = &json["speed"][which];
        assert_eq!(speed["disks"], disks, "{answer}");
        assert!(speed["ours_ms"].as_f64().unwrap() > 0.0, "{answer}");
        assert!(speed["floor_ms"].as_f64().unwrap() > 0.0, "{answer}");
    }
    assert_nothing_left(&answer, &dir);
    assert_eq!(
        machines_of(run_id(&answer.stderr).unwrap()),
        Vec::<String>::new()
    );
}

#[test]
fn vm_a_mount_is_held_until_a_signal() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let arguments = [
        "--guest",
        "qemu",
        "--scratch",
        "8M",
        "--at",
        "/mnt/tree",
        "--layer",
    ];
    let arguments = arguments.map(str::to_owned).into_iter();
    let held = hold(arguments.chain([layer.display().to_string()])).unwrap_or_else(|answer| {
        panic!("{answer}");
    });
    assert_eq!(held.json["target"], "/mnt/tree");
    // The scratch disk is attached at the same time, and either may be first.
    let locator = held.json["layers"][0]["locator"].as_str().unwrap();
    assert!(["scsi:0/0", "scsi:1/0"].contains(&locator), "{locator}");
    assert_eq!(held.json["layers"][0]["filesystem"], "erofs");
    // Nothing of it is on this machine.
    assert!(!Path::new("/mnt/tree").exists());
    let answer = held.end(Signal::INT);
    answer.says(0, &["SIGINT: releasing /mnt/tree", "nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(
        machines_of(run_id(&answer.stderr).unwrap()),
        Vec::<String>::new()
    );
}

#[test]
fn vm_a_killed_program_takes_its_machine_along_and_cleanup_removes_the_rest() {
    let _alone = alone();
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let arguments = ["--guest", "qemu", "--at", "/mnt/tree", "--layer"];
    let arguments = arguments.map(str::to_owned).into_iter();
    let mut held = hold(arguments.chain([layer.display().to_string()])).unwrap_or_else(|answer| {
        panic!("{answer}");
    });
    let said = held.wait_for("run started");
    let id = run_id(&said).unwrap();
    assert_eq!(machines_of(id).len(), 1);
    common::signal(held.pid(), Signal::KILL);
    eventually("the end of the machine", || machines_of(id).is_empty());
    let left = [
        format!("/run/blockmount/{id}"),
        format!("/var/tmp/blockmount-{id}"),
    ];
    assert!(left.iter().all(|directory| Path::new(directory).exists()));
    run(["cleanup"]).says(0, &[]);
    assert!(!left.iter().any(|directory| Path::new(directory).exists()));
}

/// A mount in a machine of its own that is held, the run's id, and the process of QEMU.
fn held_in_a_machine(dir: &tempfile::TempDir) -> (Held, String, u32) {
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
    let mut held = hold(arguments).unwrap_or_else(|answer| panic!("{answer}"));
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

#[test]
fn vm_u06_a_mount_ends_with_an_error_when_its_machine_dies() {
    let dir = temp();
    let (held, id, qemu) = held_in_a_machine(&dir);
    let started = Instant::now();
    common::signal(qemu, Signal::KILL);
    let answer = held.wait();
    assert!(started.elapsed() < Duration::from_secs(60), "{answer}");
    answer.says(1, &["the VM is gone", "SIGKILL", "did not live"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

#[test]
fn vm_a_ctrl_c_at_the_terminal_is_not_for_the_machine() {
    let dir = temp();
    let (held, id, _) = held_in_a_machine(&dir);
    let group = Pid::from_raw(held.pid().cast_signed()).unwrap();
    kill_process_group(group, Signal::INT).unwrap();
    let answer = held.wait();
    answer.says(0, &["SIGINT: releasing"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

#[test]
fn vm_x06_the_second_signal_gives_up_on_a_machine_that_hangs() {
    let dir = temp();
    let (held, id, qemu) = held_in_a_machine(&dir);
    common::signal(qemu, Signal::STOP);
    common::signal(held.pid(), Signal::TERM);
    std::thread::sleep(Duration::from_millis(500));
    let started = Instant::now();
    let answer = held.end(Signal::TERM);
    // It takes some milliseconds; without the second signal it would be the 90 seconds of a request.
    assert!(started.elapsed() < Duration::from_secs(30), "{answer}");
    answer.says(1, &["giving up on the guest", "second signal"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

/// A mount whose machine outlives its program.
fn keeping<'a>(name: &'a str, layer: &'a str) -> [&'a str; 11] {
    [
        "--guest",
        "qemu",
        "--keep-vm",
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

/// What a clean-up keeps, by name, and what it removes.
fn kept_and_removed() -> (Vec<String>, String) {
    let answer = run(["cleanup", "--json"]);
    let kept = answer.json()["resumable"].as_array().unwrap().clone();
    let name = |kept: &serde_json::Value| kept["name"].as_str().unwrap().to_owned();
    (kept.iter().map(name).collect(), answer.stdout)
}

#[test]
fn vm_a_machine_that_is_kept_is_resumed_after_a_kill() {
    let _alone = alone();
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.display().to_string();
    let name = format!("kept-{}", std::process::id());
    let arguments = keeping(&name, &layer);
    let held = hold(arguments).unwrap_or_else(|answer| panic!("{answer}"));
    let first = held.json.clone();
    let id = run_id(&held.kill()).unwrap().to_owned();
    assert_eq!(machines_of(&id).len(), 1);
    let (kept, removed) = kept_and_removed();
    assert!(
        kept.contains(&name) && !removed.contains("virtual"),
        "{removed}"
    );
    assert_eq!(machines_of(&id).len(), 1);

    let (written, content) = (Path::new("/mnt/tree/written"), "before the second kill");
    in_guest(&id, async |checker| {
        checker.write(written, content).await.unwrap();
    });
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    assert_eq!(held.json["layers"], first["layers"]);
    assert_eq!(held.json["scratch"], first["scratch"]);
    held.kill();
    in_guest(&id, async |checker| {
        let mut expected = Tree::default();
        for (name, content) in [("file", "x"), ("written", content)] {
            let digest = digest_bytes(content.as_bytes());
            expected.insert(Path::new(name), Node::File(digest));
        }
        assert_eq!(checker.tree("/mnt/tree").await.unwrap(), expected);
    });
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());

    // One whose machine has ended cannot be resumed, and has its scratch still.
    let held = hold(arguments).unwrap_or_else(|answer| panic!("{answer}"));
    let id = run_id(&held.kill()).unwrap().to_owned();
    let machine = machine_in(&id);
    common::signal(machine, Signal::KILL);
    // Its command line goes before it does.
    let process = format!("/proc/{machine}");
    eventually("the end of the machine", || !Path::new(&process).exists());
    let scratch = format!("/var/tmp/blockmount-{id}/scratch.ext4");
    run(["mount", "--resume", &name]).says(1, &["has ended", "cleanup --resumable"]);
    let answer = run(["cleanup"]);
    assert!(
        answer.code == Some(1) && answer.stdout.contains("machine has ended"),
        "{answer}"
    );
    assert!(Path::new(&scratch).exists(), "{answer}");
    run(["cleanup", "--resumable"]).says(0, &[]);
    assert!(!Path::new(&scratch).exists());
    assert!(!Path::new(&format!("/run/blockmount/{id}")).exists());
}

#[test]
fn vm_a_machine_whose_record_is_unreadable_keeps_its_scratch() {
    let _alone = alone();
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.to_str().unwrap();
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 3] = [
        ("cut", |record| {
            std::fs::write(record, "{\"process\":").unwrap()
        }),
        ("removed", |record| std::fs::remove_file(record).unwrap()),
        ("another", |record| {
            let text = std::fs::read_to_string(record).unwrap();
            let text = text.replacen("\"pid\":", "\"pid\":9", 1);
            std::fs::write(record, text).unwrap();
        }),
    ];
    for (test, damage) in damages {
        let name = format!("{test}-{}", std::process::id());
        let arguments = keeping(&name, layer);
        let held = hold(arguments).unwrap_or_else(|answer| panic!("{answer}"));
        let id = run_id(&held.kill()).unwrap().to_owned();
        let machine = machine_in(&id);
        damage(&directory_of(&id).join("vm.json"));
        let scratch = format!("/var/tmp/blockmount-{id}/scratch.ext4");
        run(["mount", "--resume", &name]).says(1, &["cleanup --resumable"]);
        for arguments in [vec!["cleanup"], vec!["cleanup", "--resumable"]] {
            let answer = run(&arguments);
            assert_eq!(answer.code, Some(1), "{answer}");
            assert!(Path::new(&scratch).exists(), "{answer}");
            let names_it = answer.stdout.contains(&format!("process {machine}"));
            assert_eq!(names_it, arguments.len() > 1, "{answer}");
        }
        assert_eq!(machines_of(&id).len(), 1);
        common::signal(machine, Signal::KILL);
        eventually("the end of the machine", || machines_of(&id).is_empty());
        run(["cleanup", "--resumable"]).says(0, &[]);
        assert!(!Path::new(&scratch).exists());
    }
}

/// How often the program is killed in the next test, unless `BLOCKMOUNT_VM_KILLS` says otherwise.
const KILLS: u64 = 10;

/// The program that resumes a mount is killed at random moments: while it recovers, while it holds, while it releases.
#[test]
fn vm_a_kept_machine_outlives_programs_that_are_killed_at_any_moment() {
    let _alone = alone();
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.display().to_string();
    let name = format!("kills-{}", std::process::id());
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let kills = number("BLOCKMOUNT_VM_KILLS").unwrap_or(KILLS);
    let mut seed: u64 = number("BLOCKMOUNT_SEED").unwrap_or(1);
    let mut below = |end: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % end
    };
    let mut expected = Tree::default();
    for (name, content) in [("file", "x"), ("written", "written before")] {
        let digest = digest_bytes(content.as_bytes());
        expected.insert(Path::new(name), Node::File(digest));
    }
    let begin = || {
        let held = hold(keeping(&name, &layer)).unwrap_or_else(|answer| panic!("{answer}"));
        let json = held.json.clone();
        let id = run_id(&held.kill()).unwrap().to_owned();
        let content = "written before";
        in_guest(&id, async |checker| {
            checker
                .write(Path::new("/mnt/tree/written"), content)
                .await
                .unwrap();
        });
        (id, json)
    };
    let (mut id, mut first) = begin();
    let started = Instant::now();
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    let takes = started.elapsed().as_millis() as u64;
    held.kill();
    let (mut back, mut gone) = (0, 0);
    for kill in 0..kills {
        if below(4) > 0 {
            let mut command = common::program(["mount", "--resume", &name]);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(Duration::from_millis(below(takes * 5 / 4)));
            child.kill().unwrap();
            child.wait().unwrap();
        } else {
            let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
            common::signal(held.pid(), Signal::TERM);
            std::thread::sleep(Duration::from_millis(below(takes)));
            held.kill();
        }
        // The next one has it as it was, or is told that it was released.
        match hold(["--resume", &name]) {
            Ok(held) => {
                assert_eq!(held.json["layers"], first["layers"]);
                assert_eq!(held.json["scratch"], first["scratch"]);
                held.kill();
                in_guest(&id, async |checker| {
                    let tree = checker.tree("/mnt/tree").await.unwrap();
                    assert_eq!(tree, expected, "after {kill} kills");
                });
                back += 1;
            }
            Err(answer) => {
                assert_eq!(answer.code, Some(1), "{answer}");
                run(["cleanup", "--resumable"]).says(0, &[]);
                assert_nothing_left(&answer, &dir);
                eventually("the end of the machine", || machines_of(&id).is_empty());
                (id, first) = begin();
                gone += 1;
            }
        }
    }
    println!("{kills} kills: {back} came back, {gone} were released; a resume takes {takes} ms");
    assert!(back > 0);
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

/// The directory of the machine that a run has kept.
fn directory_of(id: &str) -> PathBuf {
    let work = std::fs::read_dir(format!("/var/tmp/blockmount-{id}")).unwrap();
    let mut directories = work.flatten().map(|entry| entry.path());
    directories
        .find(|directory| directory.join("vm.json").exists())
        .unwrap()
}

/// Asks the guest that a run has kept, between that run and the next.
fn in_guest(id: &str, ask: impl AsyncFnOnce(&mut Checker<GuestStream>)) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let vm = Vm::reattach(directory_of(id)).await.unwrap();
        let stream = vm.connect(blockmount_checker::PORT, Duration::from_secs(30));
        ask(&mut Checker::new(stream.await.unwrap())).await;
    });
}

/// The process of the machine that a run has kept.
fn machine_in(id: &str) -> u32 {
    let record = directory_of(id).join("vm.json");
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    record["process"]["pid"]
        .as_u64()
        .unwrap()
        .try_into()
        .unwrap()
}

#[test]
fn vm_a_layer_with_a_hash_tree_is_checked_by_the_guest() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.to_str().unwrap();
    run(["seal", layer]).says(0, &[]);
    let metadata = format!("{layer}.dmverity");
    let words = [
        "--guest",
        "qemu",
        "--at",
        "/mnt/tree",
        "--layer",
        layer,
        "--verity",
    ];
    let arguments = |verity: &str| {
        words
            .map(str::to_owned)
            .into_iter()
            .chain([verity.to_owned()])
    };
    for transport in ["scsi", "vpmem"] {
        let more = ["--transport", transport].map(str::to_owned);
        let held = hold(arguments(&metadata).chain(more));
        let held = held.unwrap_or_else(|answer| panic!("{answer}"));
        let seen = &held.json["layers"][0];
        assert!(
            seen["device"].as_str().unwrap().starts_with("/dev/dm-"),
            "{seen}"
        );
        assert!(
            seen["locator"].as_str().unwrap().starts_with(transport),
            "{seen}"
        );
        let answer = held.end(Signal::TERM);
        answer.says(0, &["nothing is left"]);
    }
    // The digest of another image.
    let text = std::fs::read_to_string(&metadata).unwrap();
    let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
    let table = format!("root={},offset={}", "ab".repeat(32), parsed["hashoffset"]);
    let answer = hold(arguments(&table)).map(|_| ()).unwrap_err();
    answer.says(1, &["root digest abab", "layer.erofs"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn vm_a_scratch_is_encrypted_when_it_was_asked_for() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.to_str().unwrap();
    let words = [
        "--guest",
        "qemu",
        "--at",
        "/mnt/tree",
        "--scratch",
        "64M",
        "--encrypt",
        "--layer",
        layer,
    ];
    let held = hold(words).unwrap_or_else(|answer| panic!("{answer}"));
    let scratch = &held.json["scratch"];
    assert!(
        scratch["device"].as_str().unwrap().starts_with("/dev/dm-"),
        "{scratch}"
    );
    assert_eq!(scratch["filesystem"], "ext4");
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    run(["mount", "--encrypt", "--layer", layer, "--at", "/mnt/x"]).says(2, &["--scratch"]);
}

#[test]
fn vm_what_a_machine_cannot_have_is_refused() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.to_str().unwrap();
    let answer = run(["demo", "--transport", "vpmem", "--layer", layer]);
    answer.says(2, &["no VPMEM", "--guest qemu"]);
    let outside = [
        "mount", "--guest", "qemu", "--at", "/etc/x", "--layer", layer,
    ];
    let answer = run(outside);
    answer.says(1, &["cannot combine", "/etc/x"]);
    assert_nothing_left(&answer, &dir);
}
