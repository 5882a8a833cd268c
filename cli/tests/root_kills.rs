//! A runtime that is killed again and again, at random moments and around each write of its journal, also while it recovers
//! from the kill before, and the next one that goes on.
//!
//! `BLOCKMOUNT_KILLS=n` sets how often; `BLOCKMOUNT_SEED=n` replays a run as far as the kernel allows.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blockmount::journal::{Journal, Record, RecordKey};
use blockmount::{
    BackendError, Disk, ErrorKind, Held, HolderName, Manager, MountOptions, MountRequest, Recovery,
    StackRequest,
};
use blockmount_journal::FileJournal;
use blockmount_linux::LinuxGuest;
use blockmount_loopback::{LoopTransport, LoopUnplugger, SCHEME};
use common::{image, in_kernel, temp};
use rustix::process::{Signal, getpid, kill_process};

const KILLS: u64 = 40;
/// Where the runtime has its files, if this process is one.
const RUNTIME: &str = "BLOCKMOUNT_TEST_RUNTIME";
/// Around which write of its journal it kills itself, if at any.
const GATE: &str = "BLOCKMOUNT_TEST_GATE";
const SEED: &str = "BLOCKMOUNT_SEED";
/// What a runtime does that is not killed: everything is given back.
const LAST: &str = "last";
const NAMES: [&str; 3] = ["attachment", "mount", "stack"];

/// Numbers that depend on a seed (splitmix64).
struct Seed(u64);

impl Seed {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

fn number(name: &str) -> Option<u64> {
    Some(env::var(name).ok()?.parse().unwrap())
}

#[test]
fn root_a_runtime_that_is_killed_at_any_moment_loses_nothing() {
    if let Some(directory) = env::var_os(RUNTIME) {
        return runtime(Path::new(&directory));
    }
    let directory = temp();
    let path = |name: &str| directory.path().join(name);
    image("erofs", path("0.img"), &[("id", "of 0")]);
    image("ext4", path("1.img"), &[("id", "of 1")]);
    image("ext4", path("scratch.img"), &[]);
    let mut world = World::new(directory.path());
    let kills = number("BLOCKMOUNT_KILLS").unwrap_or(KILLS);
    let mut seed = Seed(number(SEED).unwrap_or(1));
    for kill in 0..kills {
        world.run_and_kill(&mut seed);
        if kill % 25 == 24 {
            world.run_to_the_end();
        }
    }
    world.run_to_the_end();
    let World {
        back,
        gone,
        restarts,
        ..
    } = world;
    println!("{kills} kills, {restarts} runtimes: {back} handles came back, {gone} had gone");
    assert!(back >= kills / 2, "{back}");
}

/// What an onlooker knows.
struct World<'d> {
    directory: &'d Path,
    before: Vec<String>,
    /// Who has been given what, and not asked for its release.
    held: BTreeMap<String, String>,
    /// Who has asked for something, or for its release, and was not told what came of it.
    unsure: BTreeSet<String>,
    /// What was written to the scratch.
    written: BTreeSet<String>,
    back: u64,
    gone: u64,
    restarts: u64,
}

impl<'d> World<'d> {
    fn new(directory: &'d Path) -> Self {
        World {
            directory,
            before: in_kernel(directory.file_name().unwrap()),
            held: BTreeMap::new(),
            unsure: BTreeSet::new(),
            written: BTreeSet::new(),
            back: 0,
            gone: 0,
            restarts: 0,
        }
    }

    /// A runtime, which ends at a gate or at a random moment.
    fn run_and_kill(&mut self, seed: &mut Seed) {
        let mut command = self.command(&seed.below(u64::MAX).to_string());
        let after = match seed.below(2) {
            0 => {
                command.env(GATE, seed.below(70).to_string());
                Duration::from_secs(5)
            }
            _ => Duration::from_millis(seed.below(250)),
        };
        let killed = self.follow(command, after);
        assert!(killed, "a runtime goes on until it is killed");
    }

    fn run_to_the_end(&mut self) {
        let command = self.command(LAST);
        let killed = self.follow(command, common::LONGEST);
        assert!(!killed, "the last runtime has an end");
        assert!(
            self.held.is_empty() && self.unsure.is_empty(),
            "{:?}",
            self.held
        );
        let left = in_kernel(self.directory.file_name().unwrap());
        assert_eq!(left, self.before);
    }

    fn command(&mut self, seed: &str) -> Command {
        self.restarts += 1;
        let mut command = Command::new(env::current_exe().unwrap());
        let test = "root_a_runtime_that_is_killed_at_any_moment_loses_nothing";
        command
            .args(["--exact", test, "--nocapture", "--test-threads", "1"])
            .env(RUNTIME, self.directory)
            .env(SEED, seed)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Notes what a runtime says until it ends. Whether it was killed.
    fn follow(&mut self, mut command: Command, after: Duration) -> bool {
        use std::os::unix::process::ExitStatusExt as _;
        let mut child = command.spawn().unwrap();
        let watch = common::kill_after(child.id(), after);
        let stdout = BufReader::new(child.stdout.take().unwrap());
        for line in stdout.lines().map_while(Result::ok) {
            if let Some(said) = line.strip_prefix("@ ") {
                self.note(said);
            }
        }
        let said = child.wait_with_output().unwrap();
        drop(watch);
        let killed = said.status.signal() == Some(9);
        let stderr = String::from_utf8_lossy(&said.stderr);
        assert!(killed || said.status.success(), "{stderr}");
        killed
    }

    /// Compares with what is known, and learns.
    fn note(&mut self, said: &str) {
        let (what, rest) = said.split_once(' ').unwrap();
        let (name, place) = rest.split_once(' ').unwrap_or((rest, ""));
        let (name, place) = (name.to_owned(), place.to_owned());
        match what {
            "back" => {
                if let Some(before) = self.held.get(&name) {
                    assert_eq!(*before, place, "{name} is elsewhere");
                }
                self.unsure.remove(&name);
                self.held.insert(name, place);
                self.back += 1;
            }
            "gone" => {
                // The kernel unbinds a loop device that is not mounted when its process ends.
                let may_go = self.unsure.remove(&name) || name == "attachment";
                let held = self.held.remove(&name);
                assert!(held.is_none() || may_go, "{name} has lost {held:?}");
                self.gone += 1;
            }
            "asking" => drop(self.unsure.insert(name)),
            "has" => {
                self.unsure.remove(&name);
                self.held.insert(name, place);
            }
            "released" => {
                self.unsure.remove(&name);
                self.held.remove(&name);
            }
            "wrote" => drop(self.written.insert(name)),
            "reads" => {
                let read: BTreeSet<String> = rest.split(' ').map(str::to_owned).collect();
                let lost: Vec<_> = self.written.difference(&read).collect();
                assert!(lost.is_empty(), "{lost:?} were written");
            }
            other => panic!("{other} is new to this test"),
        }
    }
}

/// Kills its process before or after a write.
struct Killing {
    journal: FileJournal,
    left: AtomicUsize,
}

impl Killing {
    fn point(&self) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            kill_process(getpid(), Signal::KILL).unwrap();
            loop {
                std::thread::park();
            }
        }
    }

    fn write(&self, write: impl FnOnce() -> Result<(), BackendError>) -> Result<(), BackendError> {
        self.point();
        let written = write();
        self.point();
        written
    }
}

impl Journal for Killing {
    fn load(&self) -> Result<Vec<Record>, BackendError> {
        self.journal.load()
    }

    fn put(&self, record: &Record) -> Result<(), BackendError> {
        self.write(|| self.journal.put(record))
    }

    fn remove(&self, key: &RecordKey) -> Result<(), BackendError> {
        self.write(|| self.journal.remove(key))
    }
}

/// One line, in one write.
fn say(line: impl std::fmt::Display) {
    use std::io::Write as _;
    let line = format!("\n@ {line}\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

/// The process that is killed.
fn runtime(directory: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let seed = env::var(SEED).unwrap();
    runtime.block_on(async {
        let recovery = recover(directory).await;
        let mut held = come_back(&recovery, directory).await;
        let manager = recovery.manager().clone();
        let settled = recovery.settle().await;
        assert!(settled.failed.is_empty(), "{settled:?}");
        if seed == LAST {
            for (name, held) in held {
                release(&name, held).await;
            }
            assert!(manager.drain().await.is_clean());
            return;
        }
        let mut seed = Seed(seed.parse().unwrap());
        loop {
            let name = NAMES[seed.below(3) as usize];
            match held.remove(name) {
                Some(handle) if seed.below(3) > 0 => {
                    check(name, &handle, directory).await;
                    held.insert(name.to_owned(), handle);
                }
                Some(handle) if seed.below(3) == 0 => give_up(name, handle),
                Some(handle) => release(name, handle).await,
                None => {
                    let handle = ask(&manager, name, directory).await;
                    check(name, &handle, directory).await;
                    held.insert(name.to_owned(), handle);
                }
            }
        }
    });
}

async fn recover(directory: &Path) -> Recovery {
    let mark = directory.file_name().unwrap().to_str().unwrap();
    let loops = Arc::new(LoopTransport::builder().mark(mark).build().unwrap());
    let engine = LinuxGuest::builder()
        .resolver(SCHEME, loops.clone())
        .unplugger(SCHEME, Arc::new(LoopUnplugger::default()))
        .overlay_mark(mark);
    let engine = engine.journal(directory.join("engine")).await.unwrap();
    let journal = FileJournal::open(directory.join("state")).unwrap();
    let left = number(GATE).map_or(usize::MAX, |gate| gate as usize).into();
    let builder = Manager::builder()
        .transport(loops)
        .unplugger(engine.clone())
        .mounter(engine.clone())
        .combiner(engine)
        .mount_root(directory.join("mounts"));
    builder.recover(Killing { journal, left }).await.unwrap()
}

async fn come_back(recovery: &Recovery, directory: &Path) -> BTreeMap<String, Held> {
    let mut held = BTreeMap::new();
    for name in NAMES {
        match recovery.claim(&HolderName::new(name).unwrap()) {
            Ok(handle) => {
                say(format_args!("back {name} {}", place(&handle)));
                check(name, &handle, directory).await;
                held.insert(name.to_owned(), handle);
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
                say(format_args!("gone {name}"));
            }
        }
    }
    held
}

async fn ask(manager: &Manager, name: &str, directory: &Path) -> Held {
    let holder = HolderName::new(name).unwrap();
    let disk = |name: &str| Disk::virtual_disk(directory.join(name));
    let read_only = || MountRequest::new(MountOptions::read_only());
    say(format_args!("asking {name}"));
    let held = match name {
        "attachment" => {
            let disk = disk("0.img").read_only();
            let attached = manager.attach_held_by(&disk, &holder).await;
            attached.map(Held::Attachment)
        }
        "mount" => {
            let request = read_only().held_by(holder);
            let added = manager.add(&disk("1.img").read_only(), &request).await;
            added.map(Held::Mount)
        }
        _ => {
            let stack = StackRequest::new(directory.join("tree"))
                .layer(disk("0.img").read_only(), read_only())
                .layer(disk("1.img").read_only(), read_only())
                .scratch(disk("scratch.img"), MountRequest::default())
                .held_by(holder);
            manager.stack(&stack).await.map(Held::Stack)
        }
    };
    let held = held.unwrap_or_else(|error| panic!("{name}: {error}: {:?}", error.cause()));
    say(format_args!("has {name} {}", place(&held)));
    held
}

async fn release(name: &str, held: Held) {
    say(format_args!("asking {name}"));
    held.release().await.unwrap();
    say(format_args!("released {name}"));
}

/// A handle that is dropped is torn down in the background; the next request for it waits.
fn give_up(name: &str, held: Held) {
    say(format_args!("asking {name}"));
    drop(held);
    say(format_args!("released {name}"));
}

fn place(held: &Held) -> String {
    match held {
        Held::Attachment(attachment) => attachment.locator().to_string(),
        Held::Mount(mount) => mount.path().display().to_string(),
        Held::Stack(stack) => stack.target().display().to_string(),
        held => panic!("{held:?} is new to this test"),
    }
}

/// What a handle says is there, with its content; a stack gets one more file.
async fn check(name: &str, held: &Held, directory: &Path) {
    let read = |path: PathBuf| fs::read_to_string(path).unwrap();
    match held {
        Held::Attachment(attachment) => {
            let number = attachment.locator().address();
            let file = read(format!("/sys/block/loop{number}/loop/backing_file").into());
            assert_eq!(
                Path::new(file.trim_end()),
                directory.join("0.img"),
                "{name}"
            );
        }
        Held::Mount(mount) => assert_eq!(read(mount.path().join("id")), "of 1"),
        Held::Stack(stack) => {
            assert_eq!(read(stack.target().join("id")), "of 0");
            let files = fs::read_dir(stack.target()).unwrap();
            let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
            let names: Vec<String> = names.collect();
            say(format_args!("reads {}", names.join(" ")));
            let new = format!("file-{}", std::process::id());
            fs::write(stack.target().join(&new), "x").unwrap();
            say(format_args!("wrote {new}"));
        }
        held => panic!("{held:?} is new to this test"),
    }
}
