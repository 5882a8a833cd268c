//! VMs that do not come up: what is said, and that nothing is left.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount_qemu::{Accelerator, GuestImage, GuestKernel, Vm, VmBuilder};

/// A VM whose guest runs a program of this machine as its first.
async fn running(program: &str) -> VmBuilder {
    let kernel = GuestKernel::find().expect("tests/setup.sh fetches a kernel");
    let image = GuestImage::builder(kernel).program(program).build();
    Vm::builder(image.await.unwrap()).accelerator(Accelerator::Emulation)
}

/// The process of this machine whose command line has this word, once there is one.
async fn process_with(word: &str) -> PathBuf {
    let has_word = |process: &PathBuf| {
        let line = std::fs::read_to_string(process.join("cmdline")).unwrap_or_default();
        line.split('\0').any(|part| part == word)
    };
    loop {
        let mut processes = Path::new("/proc").read_dir().unwrap().flatten();
        if let Some(found) = processes.find(|process| has_word(&process.path())) {
            return found.path();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An error with its causes, on one line.
fn told(error: &dyn Error) -> String {
    let mut causes = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        causes.push(error.to_string());
        next = error.source();
    }
    causes.join(": ")
}

fn is_empty(directory: &Path) -> bool {
    directory.read_dir().unwrap().next().is_none()
}

#[tokio::test]
async fn a_guest_whose_program_ends_is_told_by_its_last_words() {
    let room = tempfile::tempdir().unwrap();
    let vm = running("/bin/true").await.directory(room.path());
    let error = told(&vm.start().await.unwrap_err());
    assert!(error.contains("QEMU has ended"), "{error}");
    assert!(error.contains("the guest printed last"), "{error}");
    assert!(error.contains("Attempted to kill init"), "{error}");
    assert!(is_empty(room.path()));
}

#[tokio::test]
async fn a_guest_that_opens_no_port_is_given_up_on() {
    let room = tempfile::tempdir().unwrap();
    // It waits for input that never comes.
    let vm = running("/bin/cat").await.directory(room.path());
    let vm = vm.timeout(Duration::from_secs(15));
    let error = told(&vm.start().await.unwrap_err());
    assert!(error.contains("the guest does not come up"), "{error}");
    assert!(is_empty(room.path()));
}

#[tokio::test]
async fn of_a_guest_that_does_not_come_up_no_state_is_kept() {
    let (room, states) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let states = states.path().join("states");
    let vm = running("/bin/true").await;
    let vm = vm.directory(room.path()).saved_states(&states);
    // The first try boots, because there is no state; its guest ends, so that none is saved.
    assert!(vm.start().await.is_err());
    let saved = states.read_dir().unwrap().flatten();
    let saved: Vec<_> = saved
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "state"))
        .collect();
    assert!(saved.is_empty(), "{saved:?}");
    assert!(is_empty(room.path()));
}

#[tokio::test]
async fn a_qemu_that_is_not_there_is_named() {
    let room = tempfile::tempdir().unwrap();
    let vm = running("/bin/true").await.directory(room.path());
    let error = told(&vm.qemu("/no/such/qemu").start().await.unwrap_err());
    assert!(error.contains("cannot run /no/such/qemu"), "{error}");
    assert!(error.contains("is QEMU for x86-64 installed?"), "{error}");
    assert!(is_empty(room.path()));
}

#[tokio::test]
async fn qemu_has_no_descriptor_that_other_code_has_left_open_on_exec() {
    let room = tempfile::tempdir().unwrap();
    let file = room.path().join("lock");
    std::fs::write(&file, "").unwrap();
    let (flags, mode) = (rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    let _left_open = rustix::fs::open(&file, flags, mode).unwrap();
    for detached in [false, true] {
        // It waits for input that never comes.
        let name = format!("descriptors-{detached}-{}", std::process::id());
        let vm = running("/bin/cat").await.directory(room.path());
        let vm = vm.arguments(["-name", &name]);
        let vm = if detached { vm.detached() } else { vm };
        let looking = async {
            let process = process_with(&name).await;
            let descriptors = process.join("fd").read_dir().unwrap().flatten();
            let open = descriptors.filter_map(|link| link.path().read_link().ok());
            (process, open.collect::<Vec<PathBuf>>())
        };
        let (process, open) = tokio::select! {
            ended = vm.start() => panic!("{ended:?}"),
            found = looking => found,
        };
        assert!(open.len() >= 3, "detached: {detached}: {open:?}");
        assert!(!open.contains(&file), "detached: {detached}: {open:?}");
        let ended = async {
            while process
                .join("fd")
                .read_dir()
                .is_ok_and(|mut open| open.next().is_some())
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        // One that nobody waits for does not live on.
        tokio::time::timeout(Duration::from_secs(10), ended)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_vm_that_cannot_be_is_refused_before_anything_is_started() {
    let vm = running("/bin/true").await;
    let error = vm.clone().controllers(9).start().await.unwrap_err();
    assert!(error.to_string().contains("9 SCSI controllers"), "{error}");
    let error = vm.controllers(0).start().await.unwrap_err();
    assert!(error.to_string().contains("0 SCSI controllers"), "{error}");
}

#[tokio::test]
async fn a_device_and_words_that_a_caller_adds_reach_qemu() {
    let room = tempfile::tempdir().unwrap();
    let vm = || async { running("/bin/true").await.directory(room.path()) };
    let with_device = vm().await.device("no-such-device");
    let error = told(&with_device.start().await.unwrap_err());
    assert!(error.contains("no-such-device"), "{error}");
    let with_words = vm().await.arguments(["-no-such-option"]);
    let error = told(&with_words.start().await.unwrap_err());
    assert!(error.contains("no-such-option"), "{error}");
    let error = told(
        &vm()
            .await
            .machine("no-such-machine")
            .start()
            .await
            .unwrap_err(),
    );
    assert!(error.contains("unsupported machine type"), "{error}");
}
