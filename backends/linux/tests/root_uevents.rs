//! Waiting for events of the kernel, which these tests have it send.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockmount::BackendError;
use blockmount_linux::uevent::{NotReady, Probe, wait_for};

/// Shorter than a wait goes without a look when it hears nothing.
const SOON: Duration = Duration::from_millis(900);

/// Has the kernel announce a device again.
fn announce(device: &str) {
    fs::write(format!("/sys/class/mem/{device}/uevent"), "change").unwrap();
}

fn is_about(device: &'static str) -> impl Fn(&[u8]) -> bool {
    move |path| path.ends_with(format!("/mem/{device}").as_bytes())
}

/// Something that is looked for.
#[derive(Debug, Clone, Default)]
struct Wanted {
    looks: Arc<AtomicUsize>,
    is_there: Arc<AtomicBool>,
}

impl Wanted {
    fn look(&self) -> Probe<()> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        match self.is_there.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(NotReady::not_found("it is not there")),
        }
    }

    async fn wait(self, device: &'static str) -> Result<(), BackendError> {
        let deadline = Instant::now() + Duration::from_secs(60);
        wait_for(deadline, is_about(device), move || self.look()).await
    }

    /// Until it waits: there is a look before it starts to listen, and one after.
    async fn listened(&self) {
        while self.looks.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn root_an_event_is_a_reason_to_look_for_those_whom_it_concerns() {
    let (wanted, other) = (Wanted::default(), Wanted::default());
    let waiting = tokio::spawn(wanted.clone().wait("full"));
    let others = tokio::spawn(other.clone().wait("random"));
    wanted.listened().await;
    other.listened().await;
    let started = Instant::now();
    wanted.is_there.store(true, Ordering::SeqCst);
    announce("full");
    waiting.await.unwrap().unwrap();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    let looks = other.looks.load(Ordering::SeqCst);
    assert!(looks <= 3, "{looks} looks for what nobody has announced");
    others.abort();
}

#[tokio::test]
async fn root_many_wait_with_one_socket() {
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let all: Vec<Wanted> = (0..200).map(|_| Wanted::default()).collect();
    let waiting: Vec<_> = all
        .iter()
        .map(|one| tokio::spawn(one.clone().wait("urandom")))
        .collect();
    for one in &all {
        one.listened().await;
    }
    // Other tests have their own.
    assert!(descriptors() < before + 50);
    let started = Instant::now();
    for one in &all {
        one.is_there.store(true, Ordering::SeqCst);
    }
    announce("urandom");
    for one in waiting {
        one.await.unwrap().unwrap();
    }
    assert!(started.elapsed() < Duration::from_secs(10));
}

/// Whoever listened first may be gone, with his runtime and all its tasks.
#[test]
fn root_who_listens_depends_on_no_runtime() {
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let first = runtime();
    let gone = Wanted::default();
    first.spawn(gone.clone().wait("zero"));
    first.block_on(gone.listened());
    let second = runtime();
    let wanted = Wanted::default();
    let waiting = second.spawn(wanted.clone().wait("zero"));
    second.block_on(wanted.listened());
    first.shutdown_background();
    let started = Instant::now();
    wanted.is_there.store(true, Ordering::SeqCst);
    announce("zero");
    second.block_on(waiting).unwrap().unwrap();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
}
