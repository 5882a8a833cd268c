//! A process that is killed at the n-th point: a write to the journal, or a call of a backend before it has its effect.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockmount::journal::{Journal, Record, RecordKey};
use blockmount::testing::{Call, FakeVm, Gate, MemoryJournal};
use blockmount::{BackendError, Manager, ManagerBuilder, Recovery};
use tokio::sync::Notify;

/// What outlives a process: the VM and the journal.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) vm: FakeVm,
    pub(crate) journal: MemoryJournal,
    /// The process that has this world was killed.
    over: Arc<AtomicBool>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::over(FakeVm::new())
    }

    pub(crate) fn over(vm: FakeVm) -> Self {
        let journal = MemoryJournal::new();
        let over = Arc::default();
        World { vm, journal, over }
    }

    /// Nothing is up, nothing is remembered, and no rule was broken on the way.
    #[track_caller]
    pub(crate) fn assert_all_down(&self) {
        assert!(self.journal.is_empty());
        self.vm.check().unwrap();
        self.vm.assert_empty();
    }

    /// What a process was answered, unless it was killed: then it never comes to that.
    pub(crate) async fn alive<T, E: std::fmt::Debug>(&self, answer: Result<T, E>) -> T {
        if self.over.load(SeqCst) {
            std::future::pending().await
        }
        answer.unwrap()
    }

    /// The world as the next process finds it.
    pub(crate) fn restart(&self) -> Self {
        let (vm, journal) = (self.vm.restart(), self.journal.restart());
        let over = Arc::default();
        World { vm, journal, over }
    }

    pub(crate) fn builder(&self) -> ManagerBuilder {
        let builder = Manager::builder().transport(self.vm.clone());
        let builder = builder.unplugger(self.vm.clone()).mounter(self.vm.clone());
        let builder = builder.combiner(self.vm.clone()).binder(self.vm.clone());
        builder.mount_root("/run/m")
    }

    pub(crate) async fn recover(&self) -> Recovery {
        self.builder().recover(self.journal.clone()).await.unwrap()
    }
}

/// Ends its process at a point.
#[derive(Clone)]
struct Killer(Arc<Shared>);

struct Shared {
    world: World,
    /// How many points are passed before the end.
    left: Mutex<usize>,
    next: Mutex<Option<World>>,
    ended: Notify,
}

impl Killer {
    fn point(&self) {
        let mut left = self.0.left.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            return;
        }
        let mut next = self.0.next.lock().unwrap();
        if next.is_none() {
            *next = Some(self.0.world.restart());
            self.0.world.over.store(true, SeqCst);
            self.0.ended.notify_one();
        }
    }
}

/// The journal of a process that may be killed.
pub(crate) struct Killing(Killer);

impl Journal for Killing {
    fn load(&self) -> Result<Vec<Record>, BackendError> {
        self.0.0.world.journal.load()
    }

    fn put(&self, record: &Record) -> Result<(), BackendError> {
        self.0.point();
        self.0.0.world.journal.put(record)
    }

    fn remove(&self, key: &RecordKey) -> Result<(), BackendError> {
        self.0.point();
        self.0.0.world.journal.remove(key)
    }
}

/// Runs a process that is killed after so many points. The next process's world if it was, what it answered if it came
/// to its end.
pub(crate) fn run<T, F: Future<Output = T>>(
    world: &World,
    points: usize,
    main: impl FnOnce(World, Killing) -> F,
) -> Result<T, World> {
    run_with(world, points, |_| Gate::Ok, main)
}

/// The same with faults: how each call ends if the process lives on.
pub(crate) fn run_with<T, F: Future<Output = T>>(
    world: &World,
    points: usize,
    faults: impl Fn(&Call<'_>) -> Gate + Send + Sync + 'static,
    main: impl FnOnce(World, Killing) -> F,
) -> Result<T, World> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let killer = Killer(Arc::new(Shared {
        world: world.clone(),
        left: Mutex::new(points),
        next: Mutex::new(None),
        ended: Notify::new(),
    }));
    let at_calls = killer.clone();
    world.vm.gate_by(move |call| {
        at_calls.point();
        faults(call)
    });
    let main = main(world.clone(), Killing(killer.clone()));
    let outcome = runtime.block_on(async {
        let deadline = tokio::time::sleep(Duration::from_secs(3_600));
        tokio::select! {
            biased;
            () = killer.0.ended.notified() => None,
            output = main => Some(output),
            () = deadline => panic!("it waits for ever, {points} points after its start"),
        }
    });
    // Tasks and handles are dropped here: the process has ended, so nothing that they do has an effect.
    drop(runtime);
    let next = killer.0.next.lock().unwrap().take();
    match (next, outcome) {
        (Some(next), _) => Err(next),
        (None, Some(output)) => Ok(output),
        (None, None) => unreachable!("it was notified of its end"),
    }
}
