//! A runtime that is killed again and again: at named gates, which are before and after each write of its journal and each call
//! of a backend, and at random moments; and an onlooker that compares what it says with what it has said before.
//!
//! The onlooker starts the test itself once more as the runtime, and reads its lines. `BLOCKMOUNT_KILLS=n` sets how often it is
//! killed; `BLOCKMOUNT_SEED=n` replays a run as far as the kernel allows.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt::Display;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blockmount::journal::{Journal, Record, RecordKey};
use blockmount::{
    BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Held, HolderName, LayerCombiner, Manager,
    MountOptions, MountRequest, Mounter, Overlay, Presence, Recovery, StackRequest, Transport,
    Unplugger, Usage,
};
use blockmount_journal::FileJournal;
use rustix::process::{Signal, getpid, kill_process};

/// Where the runtime has its files, if this process is one.
const RUNTIME: &str = "BLOCKMOUNT_TEST_RUNTIME";
/// At which of its gates it kills itself, if at any.
const GATE: &str = "BLOCKMOUNT_TEST_GATE";
const SEED: &str = "BLOCKMOUNT_SEED";
/// The seed of a runtime that is not killed: everything is given back.
const LAST: &str = "last";
/// What there is to be held.
const NAMES: [&str; 3] = ["attachment", "mount", "stack"];

/// Numbers that depend on a seed (splitmix64).
pub struct Seed(u64);

impl Seed {
    /// That of a whole run.
    pub fn of_run() -> Self {
        Seed(number(SEED).unwrap_or(1))
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// A number from the environment.
pub fn number(name: &str) -> Option<u64> {
    Some(env::var(name).ok()?.parse().unwrap())
}

/// Where the files of the runtime are, if this process is one.
pub fn runtime_directory() -> Option<PathBuf> {
    env::var_os(RUNTIME).map(PathBuf::from)
}

/// How often, and when, runtimes are killed.
pub struct Plan {
    /// Unless `BLOCKMOUNT_KILLS` says otherwise.
    pub kills: u64,
    /// Behind how many gates one is killed, at most.
    pub gates: u64,
    /// After how long one is killed that is not killed at a gate, at most.
    pub moments: Duration,
    /// How long one may take to a gate that it may never reach.
    pub longest: Duration,
    /// After how many kills one runs to its end.
    pub rounds: u64,
}

/// What an onlooker knows.
pub struct World<'d, L> {
    test: &'static str,
    directory: &'d Path,
    /// What there is outside of the runtime.
    left: L,
    before: Vec<String>,
    /// Whether an attachment ends with its runtime, as the kernel unbinds a loop device that is not mounted.
    loses_attachments: bool,
    /// Who has been given what, and not asked for its release.
    held: BTreeMap<String, String>,
    /// Who has asked for something, or for its release, and was not told what came of it.
    unsure: BTreeSet<String>,
    /// What was written to the scratch.
    written: BTreeSet<String>,
    /// How often a runtime was killed at which gate.
    gates: BTreeMap<String, u64>,
    back: u64,
    gone: u64,
    restarts: u64,
}

impl<'d, L: Fn() -> Vec<String>> World<'d, L> {
    pub fn new(test: &'static str, directory: &'d Path, loses_attachments: bool, left: L) -> Self {
        World {
            test,
            directory,
            before: left(),
            left,
            loses_attachments,
            held: BTreeMap::new(),
            unsure: BTreeSet::new(),
            written: BTreeSet::new(),
            gates: BTreeMap::new(),
            back: 0,
            gone: 0,
            restarts: 0,
        }
    }

    /// Kills as planned, and ends with nothing left.
    pub fn play(&mut self, plan: &Plan) {
        let kills = number("BLOCKMOUNT_KILLS").unwrap_or(plan.kills);
        let mut seed = Seed::of_run();
        for kill in 1..=kills {
            self.run_and_kill(plan, &mut seed);
            if kill % plan.rounds == 0 {
                self.run_to_the_end();
            }
        }
        self.run_to_the_end();
        let (back, gone, restarts) = (self.back, self.gone, self.restarts);
        println!("{kills} kills, {restarts} runtimes: {back} handles came back, {gone} had gone");
        println!("at gates: {:?}", self.gates);
        assert!(back >= kills / 2, "{back}");
    }

    /// A runtime, which ends at a gate or at a random moment.
    fn run_and_kill(&mut self, plan: &Plan, seed: &mut Seed) {
        let mut command = self.command(&seed.below(u64::MAX).to_string());
        let after = match seed.below(3) {
            0 => Duration::from_millis(seed.below(plan.moments.as_millis() as u64)),
            _ => {
                command.env(GATE, seed.below(plan.gates).to_string());
                plan.longest
            }
        };
        let killed = self.follow(command, after);
        assert!(killed, "a runtime goes on until it is killed");
    }

    fn run_to_the_end(&mut self) {
        let command = self.command(LAST);
        let killed = self.follow(command, super::LONGEST);
        assert!(!killed, "the last runtime has an end");
        let nobody = self.held.is_empty() && self.unsure.is_empty();
        assert!(nobody, "{:?}", self.held);
        assert_eq!((self.left)(), self.before);
    }

    fn command(&mut self, seed: &str) -> Command {
        self.restarts += 1;
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", self.test, "--nocapture", "--test-threads", "1"])
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
        let watch = super::kill_after(child.id(), after);
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
                let ends = self.loses_attachments && name == "attachment";
                let may_go = self.unsure.remove(&name) || ends;
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
            "killed" => *self.gates.entry(rest.to_owned()).or_default() += 1,
            other => panic!("{other} is new to this test"),
        }
    }
}

/// One line, in one write.
fn say(line: impl Display) {
    let line = format!("\n@ {line}\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

/// The gates of a runtime. At one of them it kills its process.
#[derive(Clone)]
pub struct Gate(Arc<AtomicUsize>);

impl Gate {
    pub fn of_run() -> Self {
        let left = number(GATE).map_or(usize::MAX, |gate| gate as usize);
        Gate(Arc::new(left.into()))
    }

    fn point(&self, when: &str, what: &str) {
        if self.0.fetch_sub(1, Ordering::Relaxed) == 0 {
            say(format_args!("killed {when} {what}"));
            kill_process(getpid(), Signal::KILL).unwrap();
            loop {
                std::thread::park();
            }
        }
    }

    async fn around<T>(&self, what: &str, call: impl Future<Output = T>) -> T {
        self.point("before", what);
        let done = call.await;
        self.point("after", what);
        done
    }

    /// A backend whose calls have gates.
    pub fn guard<T>(&self, backend: T) -> Gated<T> {
        Gated(self.clone(), backend)
    }

    /// A journal whose writes have gates.
    pub fn journal(&self, directory: &Path) -> GatedJournal {
        GatedJournal(self.clone(), FileJournal::open(directory).unwrap())
    }
}

#[derive(Clone)]
pub struct Gated<T>(Gate, T);

pub struct GatedJournal(Gate, FileJournal);

impl GatedJournal {
    fn write(
        &self,
        what: &str,
        write: impl FnOnce() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        self.0.point("before", what);
        let written = write();
        self.0.point("after", what);
        written
    }
}

impl Journal for GatedJournal {
    fn load(&self) -> Result<Vec<Record>, BackendError> {
        self.1.load()
    }

    fn put(&self, record: &Record) -> Result<(), BackendError> {
        self.write("put", || self.1.put(record))
    }

    fn remove(&self, key: &RecordKey) -> Result<(), BackendError> {
        self.write("remove", || self.1.remove(key))
    }
}

#[async_trait]
impl<T: Transport> Transport for Gated<T> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.1.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.0.around("attach", self.1.attach(disk, id)).await
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        self.0.around("detach", self.1.detach(disk)).await
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        self.1.resize(disk, bytes).await
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let adopt = self.1.adopt(disk, id, locator);
        self.0.around("adopting a disk", adopt).await
    }
}

#[async_trait]
impl<T: Unplugger> Unplugger for Gated<T> {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.0.around("unplug", self.1.unplug(device)).await
    }
}

#[async_trait]
impl<T: Mounter> Mounter for Gated<T> {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let mount = self.1.mount(device, target, options);
        self.0.around("mount", mount).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.0.around("unmount", self.1.unmount(target)).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.1.usage(target).await
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        self.1.trim(target).await
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        self.1.grow(target, bytes).await
    }

    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        let adopt = self.1.adopt(device, target, options);
        self.0.around("adopting a mount", adopt).await
    }
}

#[async_trait]
impl<T: LayerCombiner> LayerCombiner for Gated<T> {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.0.around("combine", self.1.combine(overlay)).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.0.around("separate", self.1.separate(target)).await
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        let adopt = self.1.adopt(overlay);
        self.0.around("adopting a stack", adopt).await
    }
}

/// What a runtime works on.
pub trait Runtime {
    /// Recovers, with gates.
    async fn recover(&self, gate: Gate) -> Recovery;
    /// Where the stack is.
    fn tree(&self) -> PathBuf;
    /// Where the images are: `0.img` and `1.img`, each with a file `id`, and `scratch.img`.
    fn images(&self) -> &Path;
    /// Asserts that a disk is there.
    async fn assert_attached(&self, disk: &Disk, locator: &DeviceLocator);
    /// The names of the files in a directory; asserts that `id` has this content.
    async fn list(&self, directory: &Path, id: &str) -> Vec<String>;
    /// Makes a file.
    async fn write(&self, file: &Path);
}

/// The process that is killed.
pub async fn run(runtime: &impl Runtime) {
    let recovery = runtime.recover(Gate::of_run()).await;
    let mut held = come_back(&recovery, runtime).await;
    let manager = recovery.manager().clone();
    let settled = recovery.settle().await;
    assert!(settled.failed.is_empty(), "{settled:?}");
    let seed = env::var(SEED).unwrap();
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
                check(&handle, runtime).await;
                held.insert(name.to_owned(), handle);
            }
            Some(handle) if seed.below(3) == 0 => {
                give_up(name, handle);
                assert!(manager.drain().await.failed.is_empty());
            }
            Some(handle) => release(name, handle).await,
            None => {
                let handle = ask(&manager, name, runtime).await;
                check(&handle, runtime).await;
                held.insert(name.to_owned(), handle);
            }
        }
    }
}

async fn come_back(recovery: &Recovery, runtime: &impl Runtime) -> BTreeMap<String, Held> {
    let mut held = BTreeMap::new();
    for name in NAMES {
        match recovery.claim(&HolderName::new(name).unwrap()) {
            Ok(handle) => {
                say(format_args!("back {name} {}", place(&handle)));
                check(&handle, runtime).await;
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

async fn ask(manager: &Manager, name: &str, runtime: &impl Runtime) -> Held {
    let holder = HolderName::new(name).unwrap();
    let disk = |name: &str| Disk::virtual_disk(runtime.images().join(name));
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
            let stack = StackRequest::new(runtime.tree())
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
async fn check(held: &Held, runtime: &impl Runtime) {
    match held {
        Held::Attachment(attachment) => {
            let disk = Disk::virtual_disk(runtime.images().join("0.img")).read_only();
            runtime.assert_attached(&disk, attachment.locator()).await;
        }
        Held::Mount(mount) => drop(runtime.list(mount.path(), "of 1").await),
        Held::Stack(stack) => {
            let names = runtime.list(stack.target(), "of 0").await;
            say(format_args!("reads {}", names.join(" ")));
            let new = format!("file-{}", std::process::id());
            runtime.write(&stack.target().join(&new)).await;
            say(format_args!("wrote {new}"));
        }
        held => panic!("{held:?} is new to this test"),
    }
}
