//! A guest that is killed at any moment and started again with the same journal: what it has mounted
//! is its own still, and what it was about to do is undone.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroU32;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::kit::{
    Image, KERNELS, Loop, TestDir, builder, mount, options, refused, run, short_wait, umount,
};
use blockmount::{
    DeviceLocator, ErrorKind, LayerCombiner, MountOptions, Mounter, Overlay, Presence,
};
use blockmount_linux::LinuxGuest;
use blockmount_linux::device::{self, DeviceNumber};
use tempfile::TempDir;

/// How the child is told what to do; without it, the child's test does nothing.
const ORDERS: &str = "BLOCKMOUNT_TEST_ORDERS";
/// At which change of the journal a child kills itself.
const KILLED_AT: &str = "BLOCKMOUNT_TEST_KILLED_AT";
/// Rounds of the test that kills at random.
const ROUNDS: u32 = 200;

/// The devices and the directory that a child works with.
struct Site {
    dir: TestDir,
    ext4: Loop,
    erofs: Loop,
    disk: Loop,
    #[expect(dead_code, reason = "held for what dropping it does")]
    memory: Memory,
}

/// A tmpfs for images and for what overlays write, because each unmounting synchronises the disk.
struct Memory(TempDir);

impl Memory {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        run("mount", &["-t", "tmpfs", "memory", path]);
        Memory(dir)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(done.unwrap().success() || std::thread::panicking());
    }
}

impl Site {
    fn new() -> Self {
        let mut dir = TestDir::new();
        let memory = Memory::new();
        let inside = memory.0.path();
        let ext4 = Loop::new(&Image::Ext4.copy(inside));
        let erofs = Loop::new(&Image::Erofs.copy(inside));
        let disk = Loop::new(&Image::Gpt.copy(inside));
        fs::create_dir(inside.join("scratch")).unwrap();
        symlink(inside.join("scratch"), dir.at("scratch")).unwrap();
        fs::create_dir(dir.at("journal")).unwrap();
        fs::set_permissions(dir.at("journal"), fs::Permissions::from_mode(0o700)).unwrap();
        dir.settle();
        Site {
            dir,
            ext4,
            erofs,
            disk,
            memory,
        }
    }

    fn journal(&self) -> PathBuf {
        self.dir.at("journal")
    }

    /// A guest in this process, as after a restart.
    async fn restart(&self, (major, minor): (u32, u32)) -> LinuxGuest {
        let builder = builder().as_on_linux(major, minor);
        builder.journal(self.journal()).await.unwrap()
    }

    /// Starts a process that works as on this kernel.
    fn start(&self, work: &str, kernel: (u32, u32)) -> Killable {
        let mut child = self.command(work, kernel).spawn().unwrap();
        let mut said = String::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        while !said.ends_with("ready\n") {
            said.clear();
            assert_ne!(lines.read_line(&mut said).unwrap(), 0, "the child failed");
        }
        Killable(child)
    }

    /// Runs a process that mounts and unmounts everything, and is killed at a change of its journal. True if it has
    /// ended before.
    fn killed_at(&self, change: u32, kernel: (u32, u32)) -> bool {
        let mut command = self.command("once", kernel);
        let status = command.env(KILLED_AT, change.to_string()).status().unwrap();
        assert!(status.success() || status.signal() == Some(9), "{status}");
        status.success()
    }

    fn command(&self, work: &str, (major, minor): (u32, u32)) -> Command {
        let node = |device: &Loop| device.node().to_str().unwrap().to_owned();
        let orders = [
            work.to_owned(),
            self.dir.path().to_str().unwrap().to_owned(),
            node(&self.ext4),
            node(&self.erofs),
            node(&self.disk),
            format!("{major}.{minor}"),
        ];
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "root_restart::a_child",
                "--exact",
                "--ignored",
                "--nocapture",
            ])
            .env(ORDERS, orders.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        command
    }

    /// How long it takes here to mount and unmount the layers, and the partitions.
    async fn durations(&self) -> (Duration, Duration) {
        let devices = [&self.ext4, &self.erofs, &self.disk];
        let worker = Worker {
            guest: self.restart(KERNELS[0]).await,
            dir: self.dir.path().to_owned(),
            devices: devices.map(Loop::locator),
        };
        let (mut layers, mut partitions) = (Duration::MAX, Duration::MAX);
        for _ in 0..4 {
            let start = Instant::now();
            worker.layers_up().await;
            worker.down().await;
            layers = layers.min(start.elapsed());
            let start = Instant::now();
            worker.partitions_up().await;
            worker.down().await;
            partitions = partitions.min(start.elapsed());
        }
        clear_scratch(&self.dir);
        (layers, partitions)
    }

    fn records(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.journal()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn partitions(&self) -> Vec<u32> {
        let disk = File::open(self.disk.node()).unwrap();
        let number = DeviceNumber::of(&disk).unwrap();
        device::partitions(number).unwrap().into_keys().collect()
    }

    /// Asserts that mounts, directories, partitions and records are as at the start.
    #[track_caller]
    fn assert_clean(&self) {
        assert!(self.partitions().is_empty(), "a partition is left");
        self.dir.assert_clean();
    }
}

struct Killable(Child);

impl Killable {
    /// `SIGKILL`, and waits until nothing of the process is left.
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        let _dead_already = self.0.kill();
        let _reaped_already = self.0.wait();
    }
}

/// The other process: this test in a process of its own.
#[tokio::test]
#[ignore = "only the other tests start it"]
async fn a_child() {
    let Ok(orders) = std::env::var(ORDERS) else {
        return;
    };
    let orders: Vec<&str> = orders.split('\n').collect();
    let [work, dir, ext4, erofs, disk, kernel] = orders[..] else {
        panic!("these are no orders: {orders:?}");
    };
    let (major, minor) = kernel.split_once('.').unwrap();
    let guest = builder()
        .as_on_linux(major.parse().unwrap(), minor.parse().unwrap())
        .at_journal_change(killed_at_a_change)
        .journal(Path::new(dir).join("journal"))
        .await
        .unwrap();
    let locator = |node: &str| DeviceLocator::new("test", node).unwrap();
    let worker = Worker {
        guest,
        dir: dir.into(),
        devices: [locator(ext4), locator(erofs), locator(disk)],
    };
    if work == "once" {
        let (one, two) = (options(&["noatime"]), options(&["ro"]));
        tokio::join!(
            worker.mount(&worker.devices[0], "a/b/one", &one),
            worker.mount(&worker.devices[1], "a/b/two", &two),
        );
        let overlay = overlay(&worker.dir, "a/c/overlay");
        worker.guest.combine(&overlay).await.unwrap();
        worker.partitions_up().await;
        worker.down().await;
        return;
    }
    if let "layers" | "partitions" = work {
        say_ready();
        // Ends by a signal; or by itself, if the parent is gone.
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(10) {
            match work {
                "layers" => worker.layers_up().await,
                _ => worker.partitions_up().await,
            }
            worker.down().await;
        }
    } else {
        worker.layers_up().await;
        worker.partitions_up().await;
        if work == "part" {
            worker.guest.unmount(&worker.at("a/b/one")).await.unwrap();
        }
        say_ready();
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    }
}

fn say_ready() {
    let mut out = std::io::stdout();
    out.write_all(b"\nready\n").unwrap();
    out.flush().unwrap();
}

/// Mounts a bit of everything: directories that are shared, a partition, an overlay with a scratch.
struct Worker {
    guest: LinuxGuest,
    dir: PathBuf,
    devices: [DeviceLocator; 3],
}

/// The targets, in an order in which they can be unmounted.
const TARGETS: [&str; 5] = ["a/c/overlay", "a/b/one", "a/b/two", "p/q", "p/r"];

impl Worker {
    fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    async fn layers_up(&self) {
        let [ext4, erofs, _] = &self.devices;
        self.mount(ext4, "a/b/one", &options(&["noatime"])).await;
        self.mount(erofs, "a/b/two", &options(&["ro"])).await;
        let overlay = overlay(&self.dir, "a/c/overlay");
        self.guest.combine(&overlay).await.unwrap();
    }

    async fn partitions_up(&self) {
        let [_, _, disk] = &self.devices;
        self.mount(disk, "p/q", &partition(2)).await;
        self.mount(disk, "p/r", &partition(2)).await;
    }

    async fn mount(&self, device: &DeviceLocator, name: &str, options: &MountOptions) {
        let target = self.at(name);
        self.guest.mount(device, &target, options).await.unwrap();
    }

    async fn down(&self) {
        for name in TARGETS {
            self.guest.unmount(&self.at(name)).await.unwrap();
        }
    }
}

fn partition(number: u32) -> MountOptions {
    let number = NonZeroU32::new(number).unwrap();
    let builder = MountOptions::builder().partition(number).read_only();
    builder.build().unwrap()
}

fn overlay(dir: &Path, target: &str) -> Overlay {
    // The engine follows no link to a scratch; this one is for the names of the test.
    let scratch = fs::read_link(dir.join("scratch")).unwrap();
    Overlay::new([dir.join("a/b/two")], dir.join(target)).with_scratch(scratch)
}

/// What an overlay has left in its scratch stays, and is removed here: both or neither directory.
fn clear_scratch(dir: &TestDir) {
    let upper = dir.at("scratch/upper");
    assert_eq!(upper.exists(), dir.at("scratch/work").exists());
    if upper.exists() {
        fs::remove_dir(upper).unwrap();
        fs::remove_dir_all(dir.at("scratch/work")).unwrap();
    }
}

#[tokio::test]
async fn root_what_a_killed_process_has_mounted_is_ours_still() {
    for kernel in KERNELS {
        let site = Site::new();
        let child = site.start("hold", kernel);
        let before = site.dir.mounts();
        assert_eq!(before.len(), TARGETS.len());
        child.kill();
        let guest = site.restart(kernel).await;
        assert_eq!(site.dir.mounts(), before, "recovery changes no mount");
        assert_eq!(site.partitions(), [2]);

        let (dir, at) = (&site.dir, |name: &str| site.dir.at(name));
        let again = mount(&guest, &site.ext4, &at("a/b/one"), &["noatime"]).await;
        refused(again, ErrorKind::Conflict);
        let otherwise = mount(&guest, &site.ext4, &at("x"), &["ro"]).await;
        let message = refused(otherwise, ErrorKind::Conflict);
        assert!(message.contains("options that exclude these"), "{message}");
        mount(&guest, &site.erofs, &at("y"), &["ro"]).await.unwrap();
        let message = refused(
            guest.combine(&overlay(dir.path(), "z")).await,
            ErrorKind::Conflict,
        );
        assert!(message.contains("in use by another overlay"), "{message}");
        guest.unmount(&at("never")).await.unwrap();

        guest.unmount(&at("y")).await.unwrap();
        guest.separate(&at("a/c/overlay")).await.unwrap();
        for name in &TARGETS[1..] {
            guest.unmount(&at(name)).await.unwrap();
        }
        clear_scratch(dir);
        site.assert_clean();
        mount(&guest, &site.ext4, &at("x"), &["ro"]).await.unwrap();
        guest.unmount(&at("x")).await.unwrap();
        site.assert_clean();
    }
}

#[tokio::test]
async fn root_what_a_killed_process_has_mounted_is_adopted() {
    for kernel in KERNELS {
        let site = Site::new();
        site.start("hold", kernel).kill();
        let guest = site.restart(kernel).await;
        let before = site.dir.mounts();
        let (ext4, erofs, disk) = (&site.ext4, &site.erofs, &site.disk);
        let adopt = async |device: &Loop, name: &str, options: &MountOptions| {
            let (device, target) = (device.locator(), site.dir.at(name));
            Mounter::adopt(&guest, &device, &target, options)
                .await
                .unwrap()
        };
        let (noatime, read_only) = (options(&["noatime"]), options(&["ro"]));
        for (device, name, options) in [
            (ext4, "a/b/one", &noatime),
            (erofs, "a/b/two", &read_only),
            (disk, "p/q", &partition(2)),
        ] {
            assert_eq!(adopt(device, name, options).await, Presence::Present(()));
        }
        let overlay = overlay(site.dir.path(), "a/c/overlay");
        let found = LayerCombiner::adopt(&guest, &overlay).await.unwrap();
        assert_eq!(found, Presence::Present(()));
        // Another device, other options, another kind, and a target that is free.
        for (device, name, options) in [
            (ext4, "a/b/two", &read_only),
            (ext4, "a/b/one", &read_only),
            (erofs, "a/c/overlay", &read_only),
            (ext4, "never", &noatime),
        ] {
            assert_eq!(
                adopt(device, name, options).await,
                Presence::Absent,
                "{name}"
            );
        }
        assert_eq!(site.dir.mounts(), before);
        // What is gone behind the guest's back has directories left, which the tear-down removes.
        umount(site.dir.at("p/r"));
        assert_eq!(adopt(disk, "p/r", &partition(2)).await, Presence::Unknown);
        for name in TARGETS {
            guest.unmount(&site.dir.at(name)).await.unwrap();
        }
        clear_scratch(&site.dir);
        site.assert_clean();
    }
}

#[tokio::test]
async fn root_without_a_journal_only_what_is_not_there_is_known() {
    let site = Site::new();
    let (first, second) = (builder().build(), builder().build());
    let (device, target) = (site.ext4.locator(), site.dir.at("x"));
    let ro = options(&["ro"]);
    let adopt =
        async |guest: &LinuxGuest| Mounter::adopt(guest, &device, &target, &ro).await.unwrap();
    assert_eq!(adopt(&second).await, Presence::Absent);
    first.mount(&device, &target, &ro).await.unwrap();
    assert_eq!(adopt(&second).await, Presence::Unknown);
    assert_eq!(adopt(&first).await, Presence::Present(()));
    refused(second.unmount(&target).await, ErrorKind::Conflict);
    first.unmount(&target).await.unwrap();
    site.assert_clean();
}

/// Kills in the middle of whatever it is: the kernel's tables, the directories and the journal must be
/// as at the start after each.
#[tokio::test]
async fn root_killed_at_any_moment_it_leaves_what_the_next_can_undo() {
    let site = Site::new();
    // A partition is added when the kernel has had a tenth of a second to find it by itself.
    const WAIT: Duration = Duration::from_millis(98);
    let (layers, partitions) = site.durations().await;
    let seed = u64::from(std::process::id());
    let mut random = seed;
    let mut mounts = 0;
    for round in 0..ROUNDS {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let kernel = KERNELS[round as usize % KERNELS.len()];
        let within = |time: Duration| time.mul_f64((random >> 33) as f64 / (1u64 << 31) as f64);
        let (work, moment) = match round % 10 {
            0 => (
                "partitions",
                WAIT + within(2 * partitions.saturating_sub(WAIT)),
            ),
            _ => ("layers", within(2 * layers)),
        };
        let child = site.start(work, kernel);
        // The moment of the signal is what is to be random, and nothing is waited for here.
        std::thread::sleep(moment);
        child.kill();
        mounts += site.dir.mounts().len();
        let guest = site.restart(kernel).await;
        let aside = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "aside");
        assert!(
            !site.records().iter().any(aside),
            "seed {seed}, round {round}"
        );
        for name in TARGETS {
            let done = guest.unmount(&site.dir.at(name)).await;
            done.unwrap_or_else(|error| panic!("seed {seed}, round {round}: {name}: {error}"));
        }
        drop(guest);
        clear_scratch(&site.dir);
        assert_eq!(
            site.records(),
            [] as [PathBuf; 0],
            "seed {seed}, round {round}"
        );
        site.assert_clean();
    }
    assert!(mounts > 0, "every kill came before the first mount");
}

/// What is let go of on purpose stays mounted, and is as well known to the next.
#[tokio::test]
async fn root_a_guest_that_is_dropped_leaves_its_records() {
    for kernel in KERNELS {
        let site = Site::new();
        let guest = site.restart(kernel).await;
        let target = site.dir.at("p/q");
        guest
            .mount(&site.disk.locator(), &target, &partition(2))
            .await
            .unwrap();
        let before = (site.dir.mounts(), site.records());
        drop(guest);
        assert_eq!((site.dir.mounts(), site.records()), before);
        site.restart(kernel).await.unmount(&target).await.unwrap();
        site.assert_clean();
    }
}

/// `/a` and `/a/b` were made for the first mount, which is gone; the others need them.
#[tokio::test]
async fn root_directories_that_mounts_share_go_with_the_last_of_them() {
    let site = Site::new();
    site.start("part", KERNELS[3]).kill();
    let guest = site.restart(KERNELS[3]).await;
    assert!(!site.dir.at("a/b/one").exists() && site.dir.at("a/b/two").exists());
    for name in TARGETS {
        guest.unmount(&site.dir.at(name)).await.unwrap();
    }
    clear_scratch(&site.dir);
    site.assert_clean();
}

#[tokio::test]
async fn root_what_others_unmounted_in_between_is_undone_at_the_start() {
    for kernel in KERNELS {
        let site = Site::new();
        site.start("hold", kernel).kill();
        for name in TARGETS {
            umount(site.dir.at(name));
        }
        fs::write(site.dir.at("p/theirs"), "").unwrap();
        let guest = site.restart(kernel).await;
        assert!(site.partitions().is_empty() && !site.dir.at("a").exists());
        // One directory is not empty, and is removed by the last who needs it.
        assert_eq!(site.records().len(), 1);
        assert!(site.dir.at("p/theirs").exists() && !site.dir.at("p/q").exists());
        fs::remove_file(site.dir.at("p/theirs")).unwrap();
        drop(guest);
        drop(site.restart(kernel).await);
        clear_scratch(&site.dir);
        site.assert_clean();
    }
}

#[tokio::test]
async fn root_what_others_mounted_in_between_is_not_touched() {
    for kernel in KERNELS {
        let site = Site::new();
        site.start("hold", kernel).kill();
        let at = |name: &str| site.dir.at(name).to_str().unwrap().to_owned();
        let tmpfs = |name: &str| run("mount", &["-t", "tmpfs", "theirs", &at(name)]);
        // One over ours, and one in its place.
        tmpfs("a/b/one");
        umount(at("p/q"));
        tmpfs("p/q");
        fs::write(at("p/q/file"), "").unwrap();
        let before = site.dir.mounts();
        let builder = short_wait().as_on_linux(kernel.0, kernel.1);
        let guest = builder.journal(site.journal()).await.unwrap();
        assert_eq!(site.dir.mounts(), before);

        let covered = guest.unmount(&site.dir.at("a/b/one")).await;
        let message = refused(covered, ErrorKind::Busy);
        assert!(message.contains("it is covered by"), "{message}");
        let replaced = guest.unmount(&site.dir.at("p/q")).await;
        let message = refused(replaced, ErrorKind::Conflict);
        assert!(message.contains("somebody else mounted it"), "{message}");
        assert!(site.dir.at("p/q/file").exists());
        umount(at("a/b/one"));
        umount(at("p/q"));
        for name in TARGETS {
            guest.unmount(&site.dir.at(name)).await.unwrap();
        }
        // The directory that was in use by others was ours, and on record.
        assert!(!site.dir.at("p").exists() && !site.dir.at("a").exists());
        drop(guest);
        drop(site.restart(kernel).await);
        clear_scratch(&site.dir);
        site.assert_clean();
    }
}

#[tokio::test]
async fn root_damaged_and_foreign_records_are_set_aside() {
    let mut site = Site::new();
    site.start("hold", KERNELS[4]).kill();
    let target = "a/b/one";
    let is_of_target = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        text.contains(&format!("{target}\",\"steps\""))
    };
    let damaged = site.records().into_iter().find(is_of_target).unwrap();
    let intact = fs::read_to_string(&damaged).unwrap();
    fs::write(&damaged, &intact[..intact.len() / 2]).unwrap();
    let journal = site.journal();
    let put = |name: &str, text: &str| fs::write(journal.join(name), text).unwrap();
    put("900.json", "");
    put(
        "901.json",
        &intact.replace("\"version\":2", "\"version\":7"),
    );
    put(
        "902.json",
        &intact.replace("\"origin\":\"", "\"origin\":\"0"),
    );
    put("903.json", &intact.replace(target, "../../etc"));
    put("904.new", &intact);
    put("notes.txt", "somebody's");
    put("0905.json", &intact);
    fs::create_dir(journal.join("906.json")).unwrap();
    symlink("/etc/passwd", journal.join("907.json")).unwrap();

    let guest = site.restart(KERNELS[4]).await;
    let left = |ending: &str| {
        let names = site.records();
        names
            .iter()
            .filter(|path| path.to_str().unwrap().ends_with(ending))
            .count()
    };
    assert_eq!(
        (left(".aside"), left(".new")),
        (7, 0),
        "{:?}",
        site.records()
    );
    assert!(journal.join("notes.txt").exists() && journal.join("0905.json").exists());
    // Without a record, it is somebody else's.
    let message = refused(
        guest.unmount(&site.dir.at(target)).await,
        ErrorKind::Conflict,
    );
    assert!(message.contains("somebody else mounted it"), "{message}");
    umount(site.dir.at(target));
    for name in TARGETS {
        guest.unmount(&site.dir.at(name)).await.unwrap();
    }
    // The numbers of new records are beyond all that were found.
    mount(&guest, &site.ext4, &site.dir.at("x"), &[])
        .await
        .unwrap();
    assert!(
        site.records()
            .iter()
            .any(|path| path.ends_with("910.json") || path.ends_with("909.json"))
    );
    guest.unmount(&site.dir.at("x")).await.unwrap();
    // The directory of the mount that was not ours any more is on no list, and was in use until now.
    fs::remove_dir(site.dir.at("a/b/one")).unwrap();
    drop(guest);
    drop(site.restart(KERNELS[4]).await);
    assert!(!site.dir.at("a").exists());
    clear_scratch(&site.dir);
    fs::remove_dir_all(site.journal()).unwrap();
    site.dir.settle();
    site.assert_clean();
}

/// Killed between `mount(2)` and the record of what the mount turned out to be, it has told what the
/// kernel's table would say.
#[tokio::test]
async fn root_a_mount_without_an_identity_on_record_is_recognised() {
    for kernel in KERNELS {
        let site = Site::new();
        site.start("hold", kernel).kill();
        let mounts = site.dir.mounts();
        for path in site.records() {
            let text = fs::read_to_string(&path).unwrap();
            let mut whole: serde_json::Value = serde_json::from_str(&text).unwrap();
            let record = &mut whole["record"];
            let target = record["target"].as_str().unwrap().to_owned();
            let steps = record["steps"].as_array_mut().unwrap();
            let on_record = &mut steps.last_mut().unwrap()["unmount"];
            let line = mounts.iter().find(|m| m.mount_point == Path::new(&target));
            let line = line.unwrap();
            let is_overlay = line.filesystem == "overlay";
            let given = line.super_options.to_str().unwrap().split(',');
            let given = given.filter(|option| is_overlay && option.contains("dir="));
            // One of them was never made, and another one by somebody else.
            let source = match target.ends_with("p/q") {
                true => "/dev/another",
                false => line.source.to_str().unwrap(),
            };
            on_record["mount"] = serde_json::json!({ "expected": {
                "filesystem": line.filesystem,
                "source": source,
                "options": given.collect::<Vec<_>>(),
            }});
            fs::write(&path, whole.to_string()).unwrap();
        }
        let at = |name: &str| site.dir.at(name);
        umount(at("p/r"));
        let builder = short_wait().as_on_linux(kernel.0, kernel.1);
        let guest = builder.journal(site.journal()).await.unwrap();
        let message = refused(guest.unmount(&at("p/q")).await, ErrorKind::Conflict);
        assert!(message.contains("somebody else mounted it"), "{message}");
        for name in &TARGETS[..3] {
            guest.unmount(&at(name)).await.unwrap();
        }
        drop(guest);
        assert_eq!(site.dir.mounts().len(), 1);
        umount(at("p/q"));
        drop(site.restart(kernel).await);
        clear_scratch(&site.dir);
        site.assert_clean();
    }
}

#[tokio::test]
async fn root_a_journal_has_one_process_at_a_time() {
    let site = Site::new();
    let child = site.start("hold", KERNELS[5]);
    let before = (site.dir.mounts(), site.records());
    let second = short_wait().journal(site.journal()).await;
    let message = refused(second, ErrorKind::Busy);
    assert!(message.contains("another process is using it"), "{message}");
    assert_eq!((site.dir.mounts(), site.records()), before);
    // One that starts while the other is being killed waits for its end.
    let soon = builder().busy_timeout(Duration::from_secs(30));
    let waiting = tokio::spawn(soon.journal(site.journal()));
    tokio::task::yield_now().await;
    child.kill();
    let guest = waiting.await.unwrap().unwrap();
    let clone = guest.clone();
    drop(guest);
    refused(short_wait().journal(site.journal()).await, ErrorKind::Busy);
    for name in TARGETS {
        clone.unmount(&site.dir.at(name)).await.unwrap();
    }
    drop(clone);
    drop(builder().journal(site.journal()).await.unwrap());
    clear_scratch(&site.dir);
    site.assert_clean();
}

#[tokio::test]
async fn root_a_journal_is_private() {
    let dir = TestDir::new();
    let journal = dir.at("run/agent");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let image = tempfile::tempdir().unwrap();
    let device = Loop::new(&Image::Ext4.copy(image.path()));
    let guest = builder().journal(&journal).await.unwrap();
    assert_eq!(mode(&journal), 0o700);
    mount(&guest, &device, &dir.at("mnt"), &[]).await.unwrap();
    for entry in fs::read_dir(&journal).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
    guest.unmount(&dir.at("mnt")).await.unwrap();
    drop(guest);
    fs::set_permissions(&journal, fs::Permissions::from_mode(0o770)).unwrap();
    let message = refused(builder().journal(&journal).await, ErrorKind::Invalid);
    assert!(message.contains("others can write to it"), "{message}");
    symlink(&journal, dir.at("link")).unwrap();
    refused(builder().journal(dir.at("link")).await, ErrorKind::Invalid);
}

/// A record that cannot be written is a mount that is not made.
#[tokio::test]
async fn root_a_full_journal_refuses_mounts_and_leaves_nothing() {
    for kernel in KERNELS {
        let site = Site::new();
        let journal = site.journal();
        let path = journal.to_str().unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", "size=4k,mode=700", "journal", path],
        );
        let guest = site.restart(kernel).await;
        fs::write(journal.join("full"), [0; 4096]).unwrap();
        let result = mount(&guest, &site.ext4, &site.dir.at("x/y"), &[]).await;
        let message = refused(result, ErrorKind::Other);
        assert!(message.contains("cannot write to the journal"), "{message}");
        fs::create_dir(site.dir.at("x")).unwrap();
        let result = mount(&guest, &site.ext4, &site.dir.at("x"), &[]).await;
        refused(result, ErrorKind::Other);
        fs::remove_dir(site.dir.at("x")).unwrap();
        assert_eq!(site.records().len(), 1, "{:?}", site.records());
        drop(guest);
        umount(path);
        site.assert_clean();
    }
}

/// At how many changes of the journal the child that kills itself there has been.
static CHANGES: AtomicU32 = AtomicU32::new(0);

/// Kills this process at the change that the orders name.
fn killed_at_a_change() {
    let at = std::env::var(KILLED_AT).unwrap_or_default();
    if Ok(CHANGES.fetch_add(1, Ordering::Relaxed)) == at.parse() {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .unwrap();
        loop {
            std::thread::park();
        }
    }
}

/// Kills before and after each change of the journal, of mounts that share what is missing on their way: two at once,
/// a partition, and an overlay with a scratch.
#[tokio::test]
async fn root_x09_killed_at_each_change_of_the_journal_it_leaves_nothing() {
    for kernel in [KERNELS[0], KERNELS[5]] {
        let site = Site::new();
        let mut at = 0;
        loop {
            let ended = site.killed_at(at, kernel);
            let guest = site.restart(kernel).await;
            for name in TARGETS {
                let done = guest.unmount(&site.dir.at(name)).await;
                done.unwrap_or_else(|error| panic!("change {at}: {name}: {error}"));
            }
            drop(guest);
            clear_scratch(&site.dir);
            assert_eq!(site.records(), [] as [PathBuf; 0], "change {at}");
            site.assert_clean();
            if ended {
                break;
            }
            at += 1;
        }
        assert!(at > 60, "it had only {at} changes to be killed at");
    }
}

/// Two records about one directory, of which the last one, or the first one, is true.
#[tokio::test]
async fn root_x09_any_record_that_fits_is_believed() {
    let site = Site::new();
    let write = |name: &str, text: String| {
        fs::write(site.journal().join(name), text).unwrap();
    };
    let envelope = {
        let guest = site.restart(KERNELS[5]).await;
        mount(&guest, &site.ext4, &site.dir.at("x/a"), &[])
            .await
            .unwrap();
        let text = fs::read_to_string(&site.records()[0]).unwrap();
        guest.unmount(&site.dir.at("x/a")).await.unwrap();
        text
    };
    for order in [["1.json", "2.json"], ["2.json", "1.json"]] {
        fs::create_dir(site.dir.at("x")).unwrap();
        fs::create_dir(site.dir.at("x/.staged")).unwrap();
        let directory = fs::metadata(site.dir.at("x")).unwrap();
        let staged = fs::metadata(site.dir.at("x/.staged")).unwrap();
        fs::rename(site.dir.at("x/.staged"), site.dir.at(".staged")).unwrap();
        let records = [("x/a", &directory, ".other"), ("x/b", &staged, ".staged")];
        for (name, (target, meta, staged)) in order.iter().zip(records) {
            let mut whole: serde_json::Value = serde_json::from_str(&envelope).unwrap();
            whole["record"]["target"] = site.dir.at(target).to_str().unwrap().into();
            whole["record"]["steps"] = serde_json::json!([{ "remove-directory": {
                "path": site.dir.at("x"),
                "staged": staged,
                "id": { "device": meta.dev(), "inode": meta.ino() },
            }}]);
            write(name, whole.to_string());
        }
        drop(site.restart(KERNELS[5]).await);
        assert_eq!(site.records(), [] as [PathBuf; 0]);
        site.assert_clean();
    }
}

/// What an agent of an earlier version has written is not guessed at.
#[tokio::test]
async fn root_a_journal_of_an_earlier_version_is_set_aside() {
    let mut site = Site::new();
    let old = r#"{"version":1,"origin":"x mnt:[1]","record":{"directory":{"path":"/run/x","staged":".x"}}}"#;
    fs::write(site.journal().join("5.json"), old).unwrap();
    drop(site.restart(KERNELS[5]).await);
    assert_eq!(site.records(), [site.journal().join("5.aside")]);
    site.dir.settle();
    site.assert_clean();
}

/// A guest in another namespace of mounts cannot undo what is in this one.
#[tokio::test]
async fn root_r04_a_journal_of_another_namespace_is_left_as_it_is() {
    let site = Site::new();
    let kernel = KERNELS[4];
    let (guest, target) = (site.restart(kernel).await, site.dir.at("x"));
    mount(&guest, &site.ext4, &target, &["ro"]).await.unwrap();
    drop(guest);
    let contents = || {
        let records = site.records().into_iter();
        let records = records.map(|path| (path.clone(), fs::read_to_string(path).unwrap()));
        records.collect::<Vec<_>>()
    };
    let here = contents();
    for (path, text) in &here {
        fs::write(path, text.replace("mnt:[", "mnt:[1")).unwrap();
    }
    fs::write(site.journal().join("99.new"), "cut off").unwrap();
    let there = contents();
    let builder = builder().as_on_linux(kernel.0, kernel.1);
    let message = refused(builder.journal(site.journal()).await, ErrorKind::Conflict);
    assert!(
        message.contains("is about the mount namespace mnt:[1"),
        "{message}"
    );
    assert_eq!(contents(), there);
    for (path, text) in &here {
        fs::write(path, text).unwrap();
    }
    let guest = site.restart(kernel).await;
    guest.unmount(&target).await.unwrap();
    site.assert_clean();
}

/// The journal is full from the restart on.
#[tokio::test]
async fn root_r05_a_tear_down_after_a_restart_waits_for_no_journal() {
    for kernel in KERNELS {
        let site = Site::new();
        let journal = site.journal();
        let path = journal.to_str().unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", "size=64k,mode=700", "journal", path],
        );
        let guest = site.restart(kernel).await;
        let (one, two) = (site.dir.at("a/b/one"), site.dir.at("a/b/two"));
        mount(&guest, &site.ext4, &one, &["ro"]).await.unwrap();
        mount(&guest, &site.erofs, &two, &["ro"]).await.unwrap();
        drop(guest);
        let mut full = File::create(journal.join("full")).unwrap();
        while full.write_all(&[0; 4096]).is_ok() {}
        drop(full);
        let guest = site.restart(kernel).await;
        for target in [&one, &two] {
            guest.unmount(target).await.unwrap();
        }
        drop(guest);
        umount(path);
        site.assert_clean();
    }
}

/// The device has lost its capacity, as one that was taken out has.
#[tokio::test]
async fn root_r03_a_mount_whose_device_is_lost_is_not_present() {
    let dir = TestDir::new();
    let images = tempfile::tempdir().unwrap();
    let image = Image::Ext4.copy(images.path());
    let device = Loop::read_only(&image);
    let (guest, target) = (builder().build(), dir.at("x"));
    let ro = options(&["ro"]);
    mount(&guest, &device, &target, &["ro"]).await.unwrap();
    let adopt = async || Mounter::adopt(&guest, &device.locator(), &target, &ro).await;
    assert_eq!(adopt().await.unwrap(), Presence::Present(()));
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(0)
        .unwrap();
    run("losetup", &["-c", device.node().to_str().unwrap()]);
    assert_eq!(adopt().await.unwrap(), Presence::Unknown);
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}
