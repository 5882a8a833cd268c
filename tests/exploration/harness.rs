//! What the big tests of the managers share: a world to run in, what a handle promises, and how a
//! test ends.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use blockmount::testing::{FakeVm, VmStep};
use blockmount::{
    Attachment, Disk, ErrorKind, Manager, ManagerBuilder, Mount, MountOptions, MountRequest,
    ReleaseError, Stack,
};

/// How many drains may be needed once nothing fails any more.
const DRAINS: usize = 3;

/// A manager of a VM. `timeout` is how long its callers wait.
pub(crate) fn manager_of(vm: &FakeVm, timeout: Duration) -> Manager {
    builder_of(vm).timeout(timeout).build()
}

pub(crate) fn builder_of(vm: &FakeVm) -> ManagerBuilder {
    Manager::builder()
        .transport(vm.clone())
        .unplugger(vm.clone())
        .mounter(vm.clone())
        .combiner(vm.clone())
        .mount_root("/run/m")
}

/// Disk number `n`, read-only or not.
pub(crate) fn disk(n: usize, read_only: bool) -> Disk {
    let disk = Disk::virtual_disk(format!("/images/{n}.img"));
    if read_only { disk.read_only() } else { disk }
}

/// A mount with options by name, at a path or anywhere.
pub(crate) fn request(options: &[&str], target: Option<&str>) -> MountRequest {
    let options = MountOptions::builder()
        .options(options.iter().copied())
        .build()
        .unwrap();
    let request = MountRequest::new(options);
    match target {
        Some(target) => request.at(target),
        None => request,
    }
}

/// How often each step was called, in the order of [`VmStep::ALL`].
pub(crate) fn calls(vm: &FakeVm) -> [usize; VmStep::ALL.len()] {
    VmStep::ALL.map(|step| vm.calls(step))
}

/// Waits for what must come. The clock is paused, so this takes no time; the limit is longer than any
/// timeout in these tests.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(3_600), future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} waits for ever"),
    }
}

/// Polls a future so often (it is woken in between or not), and gives up.
pub(crate) async fn poll_and_give_up<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..polls {
        let once = poll_fn(|context| Poll::Ready(future.as_mut().poll(context)));
        if let Poll::Ready(output) = once.await {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// What a caller can get from a manager.
pub(crate) enum Held {
    Attachment(Attachment),
    Mount(Mount),
    Stack(Stack),
}

impl Held {
    /// What the handle says must be so in the VM. Not to be called when the VM or its guest are gone.
    pub(crate) fn check(&self, vm: &FakeVm) {
        match self {
            Held::Attachment(attachment) => {
                let there = vm.locator_of(attachment.disk());
                assert_eq!(
                    there.as_ref(),
                    Some(attachment.locator()),
                    "{attachment:?} is not true"
                );
            }
            Held::Mount(mount) => {
                let there = vm.device_at(mount.path());
                assert_eq!(
                    there.as_ref(),
                    Some(mount.locator()),
                    "{mount:?} is not true"
                );
                assert_attached(vm, mount.locator().as_str());
            }
            Held::Stack(stack) => {
                for point in stack.layers().iter().chain(stack.scratch()) {
                    let there = vm.device_at(point.path());
                    assert_eq!(
                        there.as_ref(),
                        Some(point.locator()),
                        "{point:?} of {stack:?}"
                    );
                }
                let tree = format!("{} overlays ", stack.target().display());
                let there = vm.left().iter().any(|line| line.starts_with(&tree));
                assert!(there, "{stack:?} is not true");
            }
        }
    }

    pub(crate) async fn release(self) -> Result<(), ReleaseError> {
        match self {
            Held::Attachment(attachment) => attachment.release().await,
            Held::Mount(mount) => mount.release().await,
            Held::Stack(stack) => stack.release().await,
        }
    }
}

fn assert_attached(vm: &FakeVm, locator: &str) {
    let holds = format!("{locator} holds ");
    assert!(
        vm.left().iter().any(|line| line.starts_with(&holds)),
        "{locator} is not attached"
    );
}

/// The end of a test: the gates are opened, everything that was got has been given back; it takes at
/// most a few drains until nothing is left, and nobody broke a contract. Answers with their number.
pub(crate) async fn clean(vm: &FakeVm, manager: &Manager) -> usize {
    let mut drained = soon("drain", manager.drain()).await;
    let mut drains = 1;
    while !drained.is_clean() && drains < DRAINS {
        tokio::time::sleep(Duration::from_secs(1)).await;
        drained = soon("drain", manager.drain()).await;
        drains += 1;
    }
    if let Err(violation) = vm.check() {
        panic!("{violation}");
    }
    assert!(
        drained.is_clean(),
        "{drained:?} after {drains} drains; left: {:?}",
        vm.left()
    );
    vm.assert_empty();
    assert_eq!(
        (manager.attachments().in_use(), manager.mounts().in_use()),
        (0, 0)
    );
    drains
}

/// Kinds that a backend answers with when nothing has happened.
pub(crate) const KINDS: [ErrorKind; 7] = [
    ErrorKind::Busy,
    ErrorKind::Full,
    ErrorKind::Unsuitable,
    ErrorKind::NotFound,
    ErrorKind::Conflict,
    ErrorKind::Invalid,
    ErrorKind::Other,
];
