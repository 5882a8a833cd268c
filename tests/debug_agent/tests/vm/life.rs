//! A VM that stops, hangs or dies, and a host whose disk is full: whoever waits is told.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use blockmount::{
    Disk, ErrorKind, Manager, MountOptions, MountRequest, Mounter as _, Presence, Transport,
    Unplugger as _,
};
use blockmount_qemu::qmp::NONE;
use blockmount_qemu::{QemuScsi, QemuVpmem};
use blockmount_scsi::ScsiTransport;
use blockmount_vpmem::{Mode, VpmemTransport};
use serde_json::json;

use crate::rig::{self, Rig, read_only};
use blockmount_debug_agent::kit::{images, temp};

/// Longer than an agent is waited for, also on a busy machine.
const LONG: Duration = Duration::from_secs(240);

/// A file system of the host that is nearly full, unmounted when dropped.
struct Small(std::path::PathBuf);

impl Small {
    fn at(path: &Path, size: &str) -> Self {
        fs::create_dir(path).unwrap();
        let size = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "small"]).arg(path);
        assert!(mount.status().unwrap().success());
        Small(path.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(status.unwrap().success());
    }
}

async fn is_running(rig: &Rig) -> bool {
    let status = rig.vm.qmp().execute("query-status", NONE).await.unwrap();
    status["running"] == true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u05_a_full_host_disk_is_an_io_error_of_the_guest_and_does_not_stop_the_vm() {
    // Dropped in the other order: the VM is gone before its disk, and that before the directory.
    let dir = temp();
    let small = Small::at(&dir.path().join("small"), "8M");
    let rig = Rig::start().await;
    let image = small.0.join("scratch.ext4");
    images::image("ext4", &image, &[]);
    fs::File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let disk = Disk::virtual_disk(&image);
    let mount = rig
        .manager
        .add(&disk, &MountRequest::default())
        .await
        .unwrap();
    // The last of the host's space goes to somebody else.
    let mut filler = fs::File::create(small.0.join("filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
    let content = "x".repeat(512 << 10);
    for n in 0..4 {
        let path = mount.path().join(format!("file-{n}"));
        // It may fail at once, or be in the guest's cache.
        let write = json!({ "write": { "path": path, "content": content } });
        rig.ask_and_see(write).await;
    }
    let started = Instant::now();
    let released = mount.release().await;
    assert!(started.elapsed() < Duration::from_secs(60), "{released:?}");
    assert!(is_running(&rig).await);
    let health = rig.vm.qmp().health().borrow().clone();
    let errors: Vec<(&str, &str)> = health.io_errors().collect();
    assert!(
        errors
            .iter()
            .any(|(disk, error)| disk.starts_with("bm-scsi-")
                && error.contains("the host's disk is full")),
        "{health:?}, {released:?}"
    );
    // The guest itself goes on.
    let layer = rig.manager.add(&rig.layer("layer"), &read_only()).await;
    layer.unwrap().release().await.unwrap();
    rig.end_as_it_is().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u05_a_release_that_waits_for_a_stopped_vm_is_told_and_can_be_retried() {
    let rig = Rig::start().await;
    let layer = rig.layer("layer");
    let mount = rig.manager.add(&layer, &read_only()).await.unwrap();
    rig.vm.qmp().execute("stop", NONE).await.unwrap();
    let started = Instant::now();
    let error = mount.release().await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(60), "{error}");
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    let said = format!("{error}: {}", error.error().cause());
    assert!(said.contains("the VM is stopped"), "{said}");
    // It could be retried, and keeps the VM for that.
    drop(error);
    // The disk is still there, since nothing is known of the guest's side.
    let blocks = rig.vm.qmp().execute("query-block", NONE).await.unwrap();
    assert!(!blocks.as_array().unwrap().is_empty());
    rig.vm.qmp().execute("cont", NONE).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u06_the_end_of_a_vm_is_an_event() {
    let rig = Rig::start().await;
    let mount = rig
        .manager
        .add(&rig.layer("layer"), &read_only())
        .await
        .unwrap();
    let mut health = rig.vm.qmp().health();
    assert!(health.borrow().is_good());
    rig.vm.kill();
    let ended = health.wait_for(|health| health.ended().is_some());
    let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
    assert!(
        ended
            .unwrap()
            .unwrap()
            .to_string()
            .contains("the VM is gone")
    );
    mount.release().await.unwrap();
    let drained = rig.manager.drain().await;
    assert!(drained.is_clean(), "{drained:?}");
    rig.end_as_it_is().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u06_an_agent_that_cannot_be_reached_again_is_noticed_without_a_request() {
    let rig = Rig::start().await;
    let layer = rig.layer("layer");
    let mount = rig.manager.add(&layer, &read_only()).await.unwrap();
    let mut lost = Box::pin(rig.guest.channel().lost());
    // One that is started again is none that is lost: it answers over a new line.
    rig.ask(json!("kill_agent")).await;
    let comes_back = async {
        let options = MountOptions::read_only();
        let ask = || rig.guest.adopt(mount.locator(), mount.path(), &options);
        let found = match ask().await {
            // It was on its way when the line was lost.
            Err(error) if error.kind() == ErrorKind::Uncertain => ask().await,
            found => found,
        };
        assert_eq!(found.unwrap(), Presence::Present(()));
    };
    tokio::select! {
        error = &mut lost => panic!("{error:?}"),
        () = comes_back => {}
    }
    // The next one is another host's, which takes the port as soon as the line is lost.
    rig.ask(json!("kill_agent")).await;
    let other = rig.vm.guest("blockmount.agent").await.unwrap();
    let error = tokio::time::timeout(LONG, &mut lost).await.unwrap();
    drop(lost);
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error:?}");
    assert!(rig.vm.is_running());
    drop(other);
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_x06_a_start_that_is_stopped_is_not_taken_for_a_bad_state() {
    // There is a state from here on.
    rig::start().await.shut_down().await;
    let states = || {
        let entries = fs::read_dir(rig::states()).unwrap().map(Result::unwrap);
        let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    let before = states();
    assert!(
        before
            .iter()
            .any(|name| name.to_str().unwrap().ends_with(".state"))
    );
    let dir = tempfile::tempdir().unwrap();
    let stopped = dir.path().join("stopped-qemu");
    let script = "#!/bin/sh\n\
                  [ \"$1\" = --version ] || kill -STOP $$\n\
                  exec qemu-system-x86_64 \"$@\"\n";
    fs::write(&stopped, script).unwrap();
    fs::set_permissions(&stopped, fs::Permissions::from_mode(0o755)).unwrap();
    let error = rig::builder()
        .await
        .qemu(&stopped)
        .start()
        .await
        .unwrap_err();
    assert_eq!(states(), before, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u18_a_vm_starts_where_no_state_can_be_saved() {
    let dir = tempfile::tempdir().unwrap();
    let full = Small::at(&dir.path().join("full"), "16M");
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).unwrap();
    // A state of a guest has some 100 MB; others could put one of theirs in place of ours; there is no such directory.
    for states in [full.0.join("states"), shared, "/proc/states".into()] {
        let vm = rig::builder().await.saved_states(&states);
        let vm = vm.start().await.unwrap();
        vm.guest("blockmount.agent").await.unwrap();
        vm.shut_down().await;
        assert!(!states.join("draft").exists(), "{}", states.display());
    }
}

/// A manager that knows nothing of what is in the VM, as after a restart without a journal.
fn stranger(rig: &Rig, transport: impl Transport) -> Manager {
    Manager::builder()
        .transport(transport)
        .unplugger(rig.guest.clone())
        .mounter(rig.guest.clone())
        .combiner(rig.guest.clone())
        .mount_root("/run/containers/second")
        .build()
}

fn scsi_of(rig: &Rig) -> ScsiTransport<QemuScsi> {
    let attacher = rig.vm.scsi();
    let geometry = attacher.geometry();
    ScsiTransport::new(attacher, geometry, &[]).unwrap()
}

fn vpmem_of(rig: &Rig, mode: Mode) -> VpmemTransport<QemuVpmem> {
    let attacher = rig.vm.vpmem(rig::MEMORY_SIZE, rig.dir.path()).unwrap();
    let geometry = attacher.geometry();
    VpmemTransport::new(attacher, geometry, mode, &[]).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u03_a_new_manager_leaves_a_disk_alone_that_another_has_mounted() {
    let rig = Rig::start().await;
    let scratch = rig.scratch("first");
    let first = rig
        .manager
        .add(&scratch, &MountRequest::default())
        .await
        .unwrap();
    let file = first.path().join("file");
    rig.ask(json!({ "write": { "path": file, "content": "written" } }))
        .await;
    let before = rig.state().await;
    let second = stranger(&rig, scsi_of(&rig));
    let mount = second
        .add(&rig.layer("second"), &read_only())
        .await
        .unwrap();
    assert_ne!(mount.locator(), first.locator());
    rig.assert_content(&mount.path().join("id"), "second").await;
    mount.release().await.unwrap();
    assert!(second.drain().await.is_clean());
    drop(second);
    assert_eq!(rig.state().await, before);
    rig.assert_content(&file, "written").await;
    first.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u03_a_new_manager_leaves_persistent_memory_alone_that_another_has_mounted() {
    let rig = Rig::start_with_vpmem(Mode::WholeDevices).await;
    let first = rig
        .manager
        .add(&rig.layer("first"), &read_only())
        .await
        .unwrap();
    assert_eq!(first.locator().as_str(), "vpmem:0");
    let before = rig.state().await;
    for mode in [Mode::WholeDevices, Mode::Packed] {
        let second = stranger(&rig, vpmem_of(&rig, mode));
        let mount = second
            .add(&rig.layer("second"), &read_only())
            .await
            .unwrap();
        assert!(
            !mount.locator().as_str().starts_with("vpmem:0"),
            "{mount:?}"
        );
        rig.assert_content(&mount.path().join("id"), "second").await;
        mount.release().await.unwrap();
        assert!(second.drain().await.is_clean());
        if mode == Mode::WholeDevices {
            assert_eq!(rig.state().await, before);
        }
    }
    rig.assert_content(&first.path().join("id"), "first").await;
    first.release().await.unwrap();
    assert!(rig.manager.drain().await.is_clean());
    rig.end_as_it_is().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u03_disks_of_an_earlier_attacher_are_adopted_and_detached() {
    let rig = Rig::start().await;
    let target = Path::new("/run/containers/adopted");
    for vpmem in [false, true] {
        let disk = rig.layer(if vpmem { "vpmem" } else { "scsi" });
        let (id, locator) = {
            let transport: Box<dyn Transport> = match vpmem {
                true => Box::new(vpmem_of(&rig, Mode::WholeDevices)),
                false => Box::new(scsi_of(&rig)),
            };
            let id = transport.identify(&disk).await.unwrap();
            let locator = transport.attach(&disk, &id).await.unwrap();
            let options = MountOptions::read_only();
            rig.guest.mount(&locator, target, &options).await.unwrap();
            (id, locator)
        };
        let transport: Box<dyn Transport> = match vpmem {
            true => Box::new(vpmem_of(&rig, Mode::WholeDevices)),
            false => Box::new(scsi_of(&rig)),
        };
        let adopted = transport.adopt(&disk, &id, Some(&locator)).await.unwrap();
        assert_eq!(adopted, Presence::Present(locator.clone()));
        rig.guest.unmount(target).await.unwrap();
        rig.guest.unplug(&locator).await.unwrap();
        transport.detach(&disk).await.unwrap();
        rig.assert_as_at_first().await;
    }
    rig.end().await;
}
