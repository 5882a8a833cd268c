//! A manager whose process is killed, and the next one with the same file.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::journal::Journal;
use blockmount::testing::FakeVm;
use blockmount::{Disk, HolderName, Manager, ManagerBuilder, MountOptions, MountRequest};
use blockmount_journal::FileJournal;

fn builder(vm: &FakeVm) -> ManagerBuilder {
    let builder = Manager::builder().transport(vm.clone());
    builder.unplugger(vm.clone()).mounter(vm.clone())
}

#[tokio::test(start_paused = true)]
async fn a_holder_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| directory.path().join(name));
    let vm = FakeVm::new();
    let web = HolderName::new("web").unwrap();
    let journal = FileJournal::open(&first).unwrap();
    let recovery = builder(&vm).recover(journal).await.unwrap();
    let request = MountRequest::new(MountOptions::read_only()).held_by(web.clone());
    let disk = Disk::virtual_disk("/images/base.erofs").read_only();
    let mount = recovery.manager().add(&disk, &request).await.unwrap();
    let path = mount.path().to_owned();
    std::mem::forget((mount, recovery));
    // The file as it is when the process is killed.
    drop(FileJournal::open(&second).unwrap());
    std::fs::copy(first.join("journal"), second.join("journal")).unwrap();
    let vm = vm.restart();
    let journal = std::sync::Arc::new(FileJournal::open(&second).unwrap());
    let recovery = builder(&vm).recover(journal.clone()).await.unwrap();
    let mount = recovery.claim(&web).unwrap().into_mount().unwrap();
    assert_eq!(mount.path(), path);
    mount.release().await.unwrap();
    assert!(recovery.settle().await.is_clean());
    vm.assert_empty();
    assert_eq!(journal.load().unwrap(), []);
}
