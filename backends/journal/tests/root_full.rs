//! A journal on a disk that is full. A program of its own, since what it starts has the locks of all open journals for a moment.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::error::Error as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use blockmount::journal::Journal as _;
use blockmount::testing::FakeVm;
use blockmount::{
    Disk, Error, ErrorKind, HolderName, Manager, ManagerBuilder, MountOptions, MountRequest, Step,
};
use blockmount_journal::FileJournal;

/// A tmpfs of four pages.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = ["-t", "tmpfs", "-o", "size=16k,mode=700", "tmpfs"];
        let mount = Command::new("mount")
            .args(options)
            .arg(directory.path())
            .status();
        assert!(mount.unwrap().success());
        Small(directory)
    }

    fn journal(&self) -> PathBuf {
        self.0.path().join("vm1")
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("filler")
    }

    fn fill(&self) {
        let mut filler = fs::File::create(self.filler()).unwrap();
        while filler.write_all(&[1; 512]).is_ok() {}
    }

    fn empty(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Tasks that are about to end may have the file open for a moment.
        let mut unmount = Command::new("umount");
        let unmounted = unmount.arg("--lazy").arg(self.0.path()).status();
        assert!(unmounted.unwrap().success() || std::thread::panicking());
    }
}

fn builder(vm: &FakeVm) -> ManagerBuilder {
    let builder = Manager::builder().transport(vm.clone());
    builder.unplugger(vm.clone()).mounter(vm.clone())
}

async fn manager(vm: &FakeVm, journal: &Arc<FileJournal>) -> Manager {
    let recovery = builder(vm).recover(journal.clone()).await.unwrap();
    recovery.manager().clone()
}

fn disk(number: usize) -> Disk {
    Disk::virtual_disk(format!("/images/{number}.erofs")).read_only()
}

fn request(number: usize) -> MountRequest {
    let name = HolderName::new(format!("holder {number}")).unwrap();
    MountRequest::new(MountOptions::read_only()).held_by(name)
}

#[track_caller]
fn assert_says_why(error: &Error) {
    assert_eq!(error.step(), Step::Record, "{error}");
    let mut said = error.cause().to_string();
    let mut source = error.cause().source();
    while let Some(cause) = source {
        said.push_str(&cause.to_string());
        source = cause.source();
    }
    let words = ["No space left", "journal"];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
}

/// The journal could not be told of it; it is as soon as there is space.
async fn assert_only_the_journal_is_behind(manager: &Manager, small: &Small) {
    let drained = manager.drain().await;
    assert_eq!(drained.in_use, 0);
    assert!(!drained.failed.is_empty());
    drained.failed.iter().for_each(assert_says_why);
    small.empty();
    assert!(manager.drain().await.is_clean());
}

#[tokio::test]
async fn root_an_add_to_a_full_journal_fails_and_leaves_nothing() {
    let (small, vm) = (Small::new(), FakeVm::new());
    let journal = Arc::new(FileJournal::open(small.journal()).unwrap());
    let manager = manager(&vm, &journal).await;
    small.fill();
    // What is left of the page that the file has begun takes some of them.
    let mut held = Vec::new();
    let refused = loop {
        match manager.add(&disk(held.len()), &request(held.len())).await {
            Ok(mount) => held.push(mount),
            Err(error) => break error,
        }
    };
    assert_says_why(&refused);
    assert_eq!(vm.left().len(), 2 * held.len(), "{:?}", vm.left());
    for mount in held {
        mount.release().await.unwrap();
    }
    vm.assert_empty();
    assert_only_the_journal_is_behind(&manager, &small).await;
    let mount = manager.add(&disk(0), &request(0)).await.unwrap();
    mount.release().await.unwrap();
    vm.check().unwrap();
    assert_eq!(journal.load().unwrap(), []);
}

#[tokio::test]
async fn root_a_journal_that_fills_between_an_add_and_its_release_keeps_nothing_up() {
    let (small, vm) = (Small::new(), FakeVm::new());
    let journal = Arc::new(FileJournal::open(small.journal()).unwrap());
    let manager = manager(&vm, &journal).await;
    let mut held = Vec::new();
    for number in 0..5 {
        held.push(manager.add(&disk(number), &request(number)).await.unwrap());
    }
    small.fill();
    for mount in held {
        mount.release().await.unwrap();
    }
    vm.assert_empty();
    let refused = manager.attach(&disk(9)).await.unwrap_err();
    assert_says_why(&refused);
    // A process that is killed now leaves records of what is gone, which the next one finds out.
    let copy = tempfile::tempdir().unwrap();
    let next = copied(&small.journal(), copy.path());
    assert_ne!(next.load().unwrap(), []);
    assert_only_the_journal_is_behind(&manager, &small).await;
    vm.check().unwrap();
    assert_eq!(journal.load().unwrap(), []);

    let recovery = builder(&vm.restart()).recover(next.clone()).await.unwrap();
    let lost = recovery.claim(&HolderName::new("holder 4").unwrap());
    assert_eq!(lost.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(recovery.settle().await.is_clean());
    assert_eq!(next.load().unwrap(), []);
}

/// The journal as it is when its process is killed.
fn copied(from: &Path, to: &Path) -> Arc<FileJournal> {
    let to = to.join("copy");
    drop(FileJournal::open(&to).unwrap());
    fs::copy(from.join("journal"), to.join("journal")).unwrap();
    Arc::new(FileJournal::open(to).unwrap())
}

#[test]
fn root_a_journal_cannot_begin_on_a_full_disk_and_says_so() {
    let small = Small::new();
    small.fill();
    let error = FileJournal::open(small.journal()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    let draft = small.journal().join("journal.new");
    assert!(!draft.exists(), "a draft takes up space");
    small.empty();
    assert_eq!(
        FileJournal::open(small.journal()).unwrap().load().unwrap(),
        []
    );
}
