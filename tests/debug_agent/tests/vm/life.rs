//! A VM that stops, hangs or dies, and a host whose disk is full: whoever waits is told.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use blockmount::{Disk, ErrorKind, MountRequest};
use blockmount_qemu::qmp::NONE;
use serde_json::json;

use crate::rig::{self, Rig, read_only};
use blockmount_debug_agent::kit::images;

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
    let rig = Rig::start().await;
    let small = Small::at(&rig.path("small"), "8M");
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
    assert!(started.elapsed() < Duration::from_secs(10), "{error}");
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    let said = format!("{error}: {}", error.error().cause());
    assert!(said.contains("the VM is stopped"), "{said}");
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
    let ended = tokio::time::timeout(Duration::from_secs(2), ended).await;
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
