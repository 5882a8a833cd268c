//! Unmounting: what is in use stays as it is, and what others mounted is not touched.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::kit::{
    Image, KERNELS, Loop, TestDir, builder, guest, mount, mount_at, on_linux, refused, run,
    short_wait, umount,
};
use blockmount::{ErrorKind, Mounter};

fn tmpfs(path: &Path) {
    run("mount", &["-t", "tmpfs", "theirs", path.to_str().unwrap()]);
}

struct Sleeper(Child);

impl Sleeper {
    fn in_directory(dir: &Path) -> Self {
        let child = Command::new("sleep")
            .arg("60")
            .current_dir(dir)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Sleeper(child)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test]
async fn root_a_busy_mount_stays_and_its_users_are_named() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = short_wait().as_on_linux(kernel.0, kernel.1).build();
        mount(&guest, &device, &dir.at("a/mnt"), &[]).await.unwrap();
        let sleeper = Sleeper::in_directory(&dir.at("a/mnt"));
        let started = Instant::now();
        let message = refused(guest.unmount(&dir.at("a/mnt")).await, ErrorKind::Busy);
        assert!(started.elapsed() >= Duration::from_millis(100));
        assert!(
            message.contains(&format!("process {} (sleep)", sleeper.0.id())),
            "{message}"
        );
        drop(sleeper);
        let open = File::open(dir.at("a/mnt/hello")).unwrap();
        let message = refused(guest.unmount(&dir.at("a/mnt")).await, ErrorKind::Busy);
        assert!(
            message.contains(&format!("process {}", std::process::id())),
            "{message}"
        );
        assert_eq!(fs::read_to_string(dir.at("a/mnt/hello")).unwrap(), "ext4");
        drop(open);
        guest.unmount(&dir.at("a/mnt")).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_an_unmount_waits_for_a_user_who_is_about_to_leave() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = builder().busy_timeout(Duration::from_secs(30)).build();
    mount(&guest, &device, &dir.at("mnt"), &[]).await.unwrap();
    let open = File::open(dir.at("mnt/hello")).unwrap();
    let leave = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(150)).await;
        drop(open);
    });
    let started = Instant::now();
    guest.unmount(&dir.at("mnt")).await.unwrap();
    assert!(
        started.elapsed() >= Duration::from_millis(100)
            && started.elapsed() < Duration::from_secs(20)
    );
    leave.await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_g08_what_is_absent_is_unmounted() {
    let dir = TestDir::new();
    let guest = guest();
    fs::create_dir(dir.at("dir")).unwrap();
    fs::write(dir.at("dir/file"), "").unwrap();
    for name in ["nothing", "nothing/at/all", "dir"] {
        guest.unmount(&dir.at(name)).await.unwrap();
    }
    assert!(dir.at("dir/file").exists() && !dir.at("nothing").exists());
}

#[tokio::test]
async fn root_what_somebody_else_mounted_is_not_touched() {
    let dir = TestDir::new();
    fs::create_dir(dir.at("theirs")).unwrap();
    tmpfs(&dir.at("theirs"));
    fs::write(dir.at("theirs/file"), "").unwrap();
    let message = refused(
        guest().unmount(&dir.at("theirs")).await,
        ErrorKind::Conflict,
    );
    assert!(message.contains("somebody else mounted it"), "{message}");
    assert!(dir.at("theirs/file").exists());
    umount(dir.at("theirs"));
}

#[tokio::test]
async fn root_u20_a_mount_that_is_covered_is_busy_until_the_cover_is_gone() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = short_wait().as_on_linux(kernel.0, kernel.1).build();
        mount(&guest, &device, &dir.at("a/mnt"), &[]).await.unwrap();
        for covered in ["a/mnt", "a"] {
            tmpfs(&dir.at(covered));
            let message = refused(guest.unmount(&dir.at("a/mnt")).await, ErrorKind::Busy);
            let by = format!("is covered by the mount at {}", dir.at(covered).display());
            assert!(message.contains(&by), "{message}");
            assert_eq!(dir.mounts().len(), 2);
            umount(dir.at(covered));
        }
        guest.unmount(&dir.at("a/mnt")).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_what_somebody_else_unmounted_is_done_and_its_directories_go() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        mount(&guest, &device, &dir.at("a/mnt"), &[]).await.unwrap();
        umount(dir.at("a/mnt"));
        guest.unmount(&dir.at("a/mnt")).await.unwrap();
        dir.assert_clean();
        mount(&guest, &device, &dir.at("a/mnt"), &[]).await.unwrap();
        umount(dir.at("a/mnt"));
        tmpfs(&dir.at("a/mnt"));
        fs::write(dir.at("a/mnt/file"), "").unwrap();
        let message = refused(guest.unmount(&dir.at("a/mnt")).await, ErrorKind::Conflict);
        assert!(message.contains("something else in its place"), "{message}");
        assert!(dir.at("a/mnt/file").exists());
        umount(dir.at("a/mnt"));
        guest.unmount(&dir.at("a/mnt")).await.unwrap();
        dir.assert_clean();
    }
}

/// Somebody takes the directory itself away.
#[tokio::test]
async fn root_a_target_that_was_unmounted_and_replaced_keeps_what_is_in_it() {
    let dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    let guest = guest();
    mount(&guest, &device, &dir.at("mnt"), &[]).await.unwrap();
    umount(dir.at("mnt"));
    fs::remove_dir(dir.at("mnt")).unwrap();
    fs::write(dir.at("mnt"), "precious").unwrap();
    let _ = guest.unmount(&dir.at("mnt")).await;
    assert_eq!(fs::read_to_string(dir.at("mnt")).unwrap(), "precious");
}

/// The device is gone before the unmount: what there is to undo is known without it.
#[tokio::test]
async fn root_g11_an_unmount_needs_no_device() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Erofs.copy(dir.path()));
    dir.settle();
    let guest = guest();
    mount(&guest, &device, &dir.at("mnt"), &["ro"])
        .await
        .unwrap();
    // The loop driver takes it away as soon as the mount is gone.
    drop(device);
    assert_eq!(mount_at(&dir.at("mnt")).filesystem, "erofs");
    guest.unmount(&dir.at("mnt")).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_g17_a_name_that_is_a_prefix_of_another_is_another() {
    let mut dir = TestDir::new();
    let one = Loop::new(&Image::Ext4.copy(dir.path()));
    let other = Loop::new(&Image::Erofs.copy(dir.path()));
    dir.settle();
    let guest = guest();
    mount(&guest, &one, &dir.at("a"), &[]).await.unwrap();
    mount(&guest, &other, &dir.at("ab"), &[]).await.unwrap();
    guest.unmount(&dir.at("a")).await.unwrap();
    assert_eq!(dir.mounts().len(), 1);
    guest.unmount(&dir.at("ab")).await.unwrap();
    dir.assert_clean();
}

/// However many mounts somebody lays over ours, none of them is touched, and nothing in any of them.
#[tokio::test]
async fn root_g02_a_stack_of_mounts_is_left_alone() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = short_wait().as_on_linux(kernel.0, kernel.1).build();
        let target = dir.at("mnt");
        mount(&guest, &device, &target, &[]).await.unwrap();
        for layer in 0..6 {
            tmpfs(&target);
            fs::write(target.join("theirs"), layer.to_string()).unwrap();
        }
        for layer in (0..6).rev() {
            refused(guest.unmount(&target).await, ErrorKind::Busy);
            let theirs = fs::read_to_string(target.join("theirs")).unwrap();
            assert_eq!(theirs, layer.to_string());
            assert_eq!(dir.mounts().len(), layer + 2);
            umount(&target);
        }
        assert_eq!(fs::read_to_string(target.join("hello")).unwrap(), "ext4");
        guest.unmount(&target).await.unwrap();
        dir.assert_clean();
    }
}
