//! What the tests of the managers share: a VM in memory and a manager over it.

// Each test binary uses its own part of this.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::future::Future;
use std::time::Duration;

use blockmount::testing::{FakeVm, VmStep};
use blockmount::{Disk, Manager, MountOptions, MountRequest};

/// A VM and a manager of it.
pub fn vm() -> (FakeVm, Manager) {
    over(FakeVm::new())
}

/// A manager of a VM that a test has prepared.
pub fn over(vm: FakeVm) -> (FakeVm, Manager) {
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(vm.clone())
        .mounter(vm.clone())
        .combiner(vm.clone())
        .binder(vm.clone())
        .mount_root("/run/m")
        .build();
    (vm, manager)
}

/// Disk number `n`, read-only.
pub fn layer(n: usize) -> Disk {
    Disk::virtual_disk(format!("/images/{n}.img")).read_only()
}

/// Disk number `n`, read-write.
pub fn scratch(n: usize) -> Disk {
    Disk::virtual_disk(format!("/images/{n}.img"))
}

/// A read-only mount at a path that is made up.
pub fn ro() -> MountRequest {
    MountRequest::new(MountOptions::read_only())
}

/// A read-write mount at a path that is made up.
pub fn rw() -> MountRequest {
    MountRequest::new(MountOptions::default())
}

/// A mount with options as they are said.
pub fn with<const N: usize>(options: [&str; N]) -> MountRequest {
    MountRequest::new(MountOptions::builder().options(options).build().unwrap())
}

/// How often each of the steps was called.
pub fn calls<const N: usize>(vm: &FakeVm, steps: [VmStep; N]) -> [usize; N] {
    steps.map(|step| vm.calls(step))
}

/// Nobody broke a contract, and nothing is left.
pub async fn clean(vm: &FakeVm, manager: &Manager) {
    let drained = manager.drain().await;
    assert!(drained.is_clean(), "{drained:?}");
    vm.check().unwrap();
    vm.assert_empty();
}

/// Waits until nothing moves any more, and gives up while the work is under way. For a paused clock.
pub async fn begin<F: Future>(future: F) {
    let moment = tokio::time::timeout(Duration::from_millis(1), future).await;
    assert!(
        moment.is_err(),
        "it was over before the caller could give up"
    );
}

/// Waits for something that must come; on a paused clock this takes no time.
pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future)
        .await
        .expect("nothing waits for ever")
}
