//! Machines that outlive the program, or a runtime of the library: killed at any moment, and gone on with by the next one.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use blockmount::{DeviceLocator, Disk, Manager, Recovery, Transport};
use blockmount_checker::Checker;
use blockmount_checker::tree::{Node, Tree, digest_bytes};
use blockmount_qemu::{GuestStream, QemuScsi, QemuVpmem, Vm};
use blockmount_scsi::ScsiTransport;
use blockmount_vpmem::{Mode, VpmemTransport};
use common::kills::{self, Gate, Plan, Runtime, World};
use common::machines::{directory_of, in_guest, keeping, machine_in, machines_of, places};
use common::{alone, assert_nothing_left, eventually, hold, image, run, run_id, temp};
use rustix::process::Signal;
use tokio::sync::Mutex;

/// What a clean-up keeps, by name, and what it removes.
fn kept_and_removed() -> (Vec<String>, String) {
    let answer = run(["cleanup", "--json"]);
    let kept = answer.json()["resumable"].as_array().unwrap().clone();
    let name = |kept: &serde_json::Value| kept["name"].as_str().unwrap().to_owned();
    (kept.iter().map(name).collect(), answer.stdout)
}

#[test]
fn vm_a_machine_that_is_kept_is_resumed_after_a_kill() {
    resumed_after_a_kill("scsi");
}

/// The layer is on persistent memory, packed, and the scratch on SCSI.
#[test]
fn vm_u03_a_machine_with_packed_memory_is_resumed_after_a_kill() {
    resumed_after_a_kill("vpmem");
}

fn resumed_after_a_kill(transport: &str) {
    let _alone = alone();
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.display().to_string();
    let name = format!("kept-{}", std::process::id());
    let of_container = ["--map-ids", "0:100000:65536", "--view", "/mnt/seen:ro"];
    let arguments = || {
        keeping(&name, &layer, transport)
            .into_iter()
            .chain(of_container)
    };
    let held = hold(arguments()).unwrap_or_else(|answer| panic!("{answer}"));
    assert_eq!(held.json["views"][0]["path"], "/mnt/seen", "{}", held.json);
    let lower = held.json["layers"][0]["path"].as_str().unwrap().to_owned();
    let first = places(&held);
    for (disk, transport) in first.iter().zip([transport, "scsi"]) {
        let locator = disk["locator"].as_str().unwrap();
        assert!(locator.starts_with(&format!("{transport}:")), "{disk}");
    }
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
        let refused = checker.write("/mnt/seen/other", "x").await.unwrap_err();
        assert!(refused.to_string().contains("os error 30"), "{refused}");
        let mounts = checker.tables().await.unwrap().mounts;
        let options = |point: &str| {
            let mut found = mounts.iter().filter(|mount| mount.mount_point == point);
            found.next().map(|mount| mount.options.as_str())
        };
        let is_mapped = |point: &str| options(point).map(|all| all.contains(",idmapped"));
        let found = [&*lower, "/mnt/tree", "/mnt/seen"].map(is_mapped);
        assert_eq!(found, [Some(true), Some(false), Some(false)], "{mounts:?}");
    });
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    assert_eq!(places(&held), first);
    held.kill();
    in_guest(&id, async |checker| {
        let mut expected = Tree::default();
        for (name, content) in [("file", "x"), ("written", content)] {
            let digest = digest_bytes(content.as_bytes());
            expected.insert(Path::new(name), Node::File(digest));
        }
        for path in ["/mnt/tree", "/mnt/seen"] {
            assert_eq!(checker.tree(path).await.unwrap(), expected, "{path}");
        }
    });
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());

    // One whose machine has ended cannot be resumed, and has its scratch still.
    let held = hold(arguments()).unwrap_or_else(|answer| panic!("{answer}"));
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
        answer.code == Some(1) && answer.has_words("machine has ended"),
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
        let arguments = keeping(&name, layer, "scsi");
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

/// How often the program is killed in the next test, unless `BLOCKMOUNT_KILLS` says otherwise.
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
    let kills = kills::number("BLOCKMOUNT_KILLS").unwrap_or(KILLS);
    let mut seed = kills::Seed::of_run();
    let mut below = |end: u64| seed.below(end);
    let mut expected = Tree::default();
    for (name, content) in [("file", "x"), ("written", "written before")] {
        let digest = digest_bytes(content.as_bytes());
        expected.insert(Path::new(name), Node::File(digest));
    }
    let begin = || {
        let held = hold(keeping(&name, &layer, "auto")).unwrap_or_else(|answer| panic!("{answer}"));
        let places = places(&held);
        let id = run_id(&held.kill()).unwrap().to_owned();
        let content = "written before";
        in_guest(&id, async |checker| {
            checker
                .write(Path::new("/mnt/tree/written"), content)
                .await
                .unwrap();
        });
        (id, places)
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
                assert_eq!(places(&held), first);
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

/// A guest that a run of the program has kept, and that this process has reached, with the images in a directory.
struct Kept {
    directory: PathBuf,
    vm: Vm,
    scsi: QemuScsi,
    vpmem: QemuVpmem,
    checker: Mutex<Checker<GuestStream>>,
}

/// As the program has it.
const MEMORY_SIZE: u64 = 2 << 30;

impl Kept {
    /// Reaches the machine whose directory is named in a file.
    async fn reach(directory: PathBuf) -> Self {
        let machine = std::fs::read_to_string(directory.join("machine")).unwrap();
        let vm = Vm::reattach(machine).await.unwrap();
        let stream = vm.connect(blockmount_checker::PORT, Duration::from_secs(30));
        Kept {
            scsi: vm.scsi(),
            vpmem: vm.vpmem(MEMORY_SIZE, &directory).unwrap(),
            checker: Mutex::new(Checker::new(stream.await.unwrap())),
            directory,
            vm,
        }
    }

    fn transports(&self) -> (VpmemTransport<QemuVpmem>, ScsiTransport<QemuScsi>) {
        let (vpmem, scsi) = (self.vpmem.clone(), self.scsi.clone());
        let vpmem_geometry = vpmem.geometry();
        let scsi_geometry = scsi.geometry();
        (
            VpmemTransport::new(vpmem, vpmem_geometry, Mode::Packed, &[]).unwrap(),
            ScsiTransport::new(scsi, scsi_geometry, &[]).unwrap(),
        )
    }

    /// What QEMU and the guest's kernel have, one line each.
    async fn state(&self) -> Vec<String> {
        let vpmem = blockmount_vpmem::Attacher::list(&self.vpmem).await.unwrap();
        let mut state = self.scsi.left().await.unwrap();
        state.extend(vpmem.iter().map(|there| format!("{there:?}")));
        let tables = self.checker.lock().await.tables().await.unwrap();
        let mounts = tables.mounts.iter();
        state.extend(mounts.map(|mount| format!("mount at {}", mount.mount_point)));
        state.extend(tables.scsi_devices.iter().map(|at| format!("SCSI {at}")));
        let mapped = tables.dm_devices.iter();
        state.extend(mapped.map(|device| format!("mapped {}", device.name)));
        state.extend(
            tables
                .directories
                .iter()
                .map(|at| format!("directory {at}")),
        );
        state.sort();
        state
    }
}

impl Runtime for Kept {
    async fn recover(&self, gate: Gate) -> Recovery {
        let (vpmem, scsi) = self.transports();
        let guest = gate.guard(self.vm.guest("blockmount.agent").await.unwrap());
        let builder = Manager::builder()
            .transport(gate.guard(vpmem))
            .transport(gate.guard(scsi))
            .unplugger(guest.clone())
            .mounter(guest.clone())
            .combiner(guest)
            .mount_root("/run/mounts/kills");
        let journal = gate.journal(&self.directory.join("state"));
        builder.recover(journal).await.unwrap()
    }

    fn tree(&self) -> PathBuf {
        "/mnt/kills".into()
    }

    fn images(&self) -> &Path {
        &self.directory
    }

    async fn assert_attached(&self, disk: &Disk, locator: &DeviceLocator) {
        let (transport, _) = self.transports();
        let id = transport.identify(disk).await.unwrap();
        let there = blockmount_vpmem::Attacher::list(&self.vpmem).await.unwrap();
        let is_there = |wanted: &DeviceLocator| {
            let mut there = there.iter().filter(|found| found.id.as_ref() == Some(&id));
            there.any(|found| DeviceLocator::from(found.address) == *wanted)
        };
        assert!(is_there(locator), "{locator} is not in {there:?}");
    }

    async fn list(&self, directory: &Path, id: &str) -> Vec<String> {
        let tree = self.checker.lock().await.tree(directory).await.unwrap();
        let digest = digest_bytes(id.as_bytes());
        let files: Vec<_> = tree.files().collect();
        assert!(files.contains(&(Path::new("id"), &digest)), "{files:?}");
        files
            .iter()
            .map(|(name, _)| name.display().to_string())
            .collect()
    }

    async fn write(&self, file: &Path) {
        self.checker.lock().await.write(file, "x").await.unwrap();
    }
}

/// Beside the mount that the program has left in the machine, which nobody touches.
#[test]
fn vm_a_runtime_with_a_machine_that_is_killed_at_any_moment_loses_nothing() {
    if let Some(directory) = kills::runtime_directory() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        return runtime.block_on(async { kills::run(&Kept::reach(directory).await).await });
    }
    let _alone = alone();
    let dir = temp();
    let path = |name: &str| dir.path().join(name);
    image("erofs", path("layer.erofs"), &[("file", "x")]);
    image("erofs", path("0.img"), &[("id", "of 0")]);
    image("ext4", path("1.img"), &[("id", "of 1")]);
    image("ext4", path("scratch.img"), &[]);
    let layer = path("layer.erofs");
    let name = format!("library-{}", std::process::id());
    let held = hold(keeping(&name, layer.to_str().unwrap(), "auto"));
    let held = held.unwrap_or_else(|answer| panic!("{answer}"));
    let first = places(&held);
    let id = run_id(&held.kill()).unwrap().to_owned();
    let machine = directory_of(&id);
    std::fs::write(path("machine"), machine.to_str().unwrap()).unwrap();

    let state = || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async { Kept::reach(dir.path().to_owned()).await.state().await })
    };
    let test = "vm_a_runtime_with_a_machine_that_is_killed_at_any_moment_loses_nothing";
    let mut world = World::new(test, dir.path(), false, state);
    world.play(&Plan {
        kills: 16,
        gates: 100,
        moments: Duration::from_secs(4),
        longest: Duration::from_secs(60),
        rounds: 25,
    });

    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    assert_eq!(places(&held), first);
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}
