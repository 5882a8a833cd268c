//! Writes that the device beneath did not take: the unmount says so.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

#[path = "integration/kit/mod.rs"]
mod kit;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use blockmount::{ErrorKind, LayerCombiner, Mounter, Overlay};
use kit::{KERNELS, Loop, TestDir, blank, mount, noise, on_linux, refused, run, short_wait};

/// A filesystem of memory that is full after three megabytes, gone with the value.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=3m", "small", path]);
        Small(dir)
    }

    /// An image that is larger than what is beneath it.
    fn image(&self) -> PathBuf {
        let image = self.0.path().join("image");
        blank(&image, 32 << 20);
        let options = ["-q", "-O", "^has_journal", "-E", "lazy_itable_init=1"];
        run(
            "mkfs.ext4",
            &[&options[..], &[image.to_str().unwrap()]].concat(),
        );
        image
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(done.unwrap().success() || std::thread::panicking());
    }
}

#[tokio::test]
async fn root_x07_an_unmount_that_lost_writes_says_so_and_is_done() {
    for kernel in KERNELS {
        let (small, dir) = (Small::new(), TestDir::new());
        let device = Loop::new(&small.image());
        let (guest, target) = (on_linux(kernel), dir.at("m"));
        mount(&guest, &device, &target, &[]).await.unwrap();
        // The page cache takes it.
        fs::write(target.join("large"), noise(8 << 20)).unwrap();
        let message = refused(guest.unmount(&target).await, ErrorKind::LostWrites);
        assert!(message.contains("did not take all"), "{message}");
        dir.assert_clean();
        guest.unmount(&target).await.unwrap();
    }
}

#[tokio::test]
async fn root_x07_an_unmount_that_is_busy_first_still_says_what_was_lost() {
    let (small, dir) = (Small::new(), TestDir::new());
    let device = Loop::new(&small.image());
    let (guest, target) = (short_wait().build(), dir.at("m"));
    mount(&guest, &device, &target, &[]).await.unwrap();
    fs::write(target.join("large"), noise(8 << 20)).unwrap();
    let open = fs::File::open(target.join("large")).unwrap();
    refused(guest.unmount(&target).await, ErrorKind::Busy);
    drop(open);
    // A process that another test starts has this one's descriptors for a moment.
    let deadline = Instant::now() + kit::PATIENT;
    let ended = loop {
        match guest.unmount(&target).await {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {}
            ended => break ended,
        }
    };
    refused(ended, ErrorKind::LostWrites);
    dir.assert_clean();
}

#[tokio::test]
async fn root_x07_what_an_overlay_above_was_told_of_is_lost_all_the_same() {
    for kernel in [(5, 4), (6, 1), (u32::MAX, 0)] {
        let (small, dir) = (Small::new(), TestDir::new());
        let device = Loop::new(&small.image());
        let (guest, scratch, target) = (on_linux(kernel), dir.at("scratch"), dir.at("tree"));
        let layer = tempfile::tempdir().unwrap();
        mount(&guest, &device, &scratch, &[]).await.unwrap();
        let mut overlay = Overlay::new(vec![layer.path().to_owned()], &target);
        overlay.scratch = Some(scratch.clone());
        guest.combine(&overlay).await.unwrap();
        fs::write(target.join("large"), noise(8 << 20)).unwrap();
        // Somebody asks, and is told.
        let path = target.to_str().unwrap();
        let sync = || Command::new("sync").args(["-f", path]).output().unwrap();
        assert!(!sync().status.success());
        assert!(sync().status.success());
        guest.separate(&target).await.unwrap();
        let message = refused(guest.unmount(&scratch).await, ErrorKind::LostWrites);
        assert!(message.contains("did not take all"), "{message}");
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_x07_a_filesystem_that_stopped_by_itself_has_lost_writes() {
    for kernel in KERNELS {
        let (small, dir) = (Small::new(), TestDir::new());
        let device = Loop::new(&small.image());
        let (guest, target) = (on_linux(kernel), dir.at("m"));
        mount(&guest, &device, &target, &["errors=remount-ro"])
            .await
            .unwrap();
        let name = device.node().file_name().unwrap().to_str().unwrap();
        let trigger = format!("/sys/fs/ext4/{name}/trigger_fs_error");
        fs::write(trigger, "a test").unwrap();
        assert!(fs::write(target.join("file"), "x").is_err());
        let message = refused(guest.unmount(&target).await, ErrorKind::LostWrites);
        assert!(message.contains("turned read-only"), "{message}");
        assert!(message.contains("counted new errors"), "{message}");
        dir.assert_clean();
        // The count stays on the device, and is no error of the next mount.
        mount(&guest, &device, &target, &[]).await.unwrap();
        guest.unmount(&target).await.unwrap();
    }
}

#[tokio::test]
async fn root_x07_who_remounts_read_only_loses_nothing() {
    let (small, dir) = (Small::new(), TestDir::new());
    let device = Loop::new(&small.image());
    let (guest, target) = (kit::guest(), dir.at("m"));
    mount(&guest, &device, &target, &[]).await.unwrap();
    run("mount", &["-o", "remount,ro", target.to_str().unwrap()]);
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_x07_the_device_is_free_as_soon_as_the_mount_is_gone() {
    let (small, dir) = (Small::new(), TestDir::new());
    let device = Loop::new(&small.image());
    let (guest, target) = (kit::guest(), dir.at("m"));
    for by_hand in [false, true] {
        mount(&guest, &device, &target, &[]).await.unwrap();
        fs::write(target.join("file"), "x").unwrap();
        if by_hand {
            run("umount", &[target.to_str().unwrap()]);
        }
        guest.unmount(&target).await.unwrap();
        kit::free(device.node()).await;
    }
    dir.assert_clean();
}

#[tokio::test]
async fn root_x07_what_was_written_and_fits_is_not_lost() {
    for kernel in KERNELS {
        let (small, dir) = (Small::new(), TestDir::new());
        let device = Loop::new(&small.image());
        let (guest, target) = (on_linux(kernel), dir.at("m"));
        for _ in 0..2 {
            mount(&guest, &device, &target, &[]).await.unwrap();
            fs::write(target.join("file"), noise(100_000)).unwrap();
            guest.unmount(&target).await.unwrap();
        }
        mount(&guest, &device, &target, &["ro"]).await.unwrap();
        assert_eq!(fs::read(target.join("file")).unwrap(), noise(100_000));
        guest.unmount(&target).await.unwrap();
        dir.assert_clean();
    }
}
