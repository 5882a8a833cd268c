//! What the kernel refuses is explained in its own words, and what a filter of system calls refuses is done otherwise.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]
#![allow(unsafe_code, reason = "a filter of system calls has no safe wrapper")]

#[path = "integration/kit/mod.rs"]
mod kit;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockmount::{ErrorKind, LayerCombiner, Mounter, Overlay};
use blockmount_linux::mountinfo;
use crc::{CRC_32_ISCSI, Crc};
use kit::{Image, KERNELS, Loop, TestDir, guest, mount, mount_at, on_linux, refused, short_wait};

/// Where the superblock of a filesystem has its incompatible features, and its checksum.
struct Layout {
    start: u64,
    length: usize,
    features: usize,
    is_big_endian: bool,
    checksum: usize,
    /// Whether the checksum covers its own field, as zeros; else it ends before.
    covers_itself: bool,
    /// Whether it is inverted in the end.
    is_inverted: bool,
}

/// Sets a feature that no kernel knows, with a checksum that fits.
fn add_feature(image: &Path, layout: &Layout, feature: u32) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut block = vec![0; layout.length];
    file.read_exact_at(&mut block, layout.start).unwrap();
    let field = layout.features..layout.features + 4;
    let bytes: [u8; 4] = block[field.clone()].try_into().unwrap();
    let bytes = match layout.is_big_endian {
        true => (u32::from_be_bytes(bytes) | feature).to_be_bytes(),
        false => (u32::from_le_bytes(bytes) | feature).to_le_bytes(),
    };
    block[field].copy_from_slice(&bytes);
    let field = layout.checksum..layout.checksum + 4;
    block[field.clone()].fill(0);
    let covered = match layout.covers_itself {
        true => &block[..],
        false => &block[..layout.checksum],
    };
    let crc = Crc::<u32>::new(&CRC_32_ISCSI).checksum(covered);
    let crc = if layout.is_inverted { crc } else { !crc };
    block[field].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&block, layout.start).unwrap();
}

#[tokio::test]
async fn root_u10_an_unknown_feature_is_named_in_the_kernels_words_and_in_ours() {
    let ext4 = Layout {
        start: 1024,
        length: 1024,
        features: 0x60,
        is_big_endian: false,
        checksum: 1020,
        covers_itself: false,
        is_inverted: false,
    };
    let xfs = Layout {
        start: 0,
        length: 512,
        features: 216,
        is_big_endian: true,
        checksum: 224,
        covers_itself: true,
        is_inverted: true,
    };
    let erofs = Layout {
        start: 1024,
        length: 3072,
        features: 80,
        is_big_endian: false,
        checksum: 4,
        covers_itself: true,
        is_inverted: false,
    };
    for (image, layout, kernels_words) in [
        (Image::Ext4, ext4, "unsupported optional features"),
        (Image::Xfs, xfs, "unknown incompatible features"),
        (Image::Erofs, erofs, "unidentified incompatible feature"),
    ] {
        for kernel in KERNELS {
            let mut dir = TestDir::new();
            let path = image.copy(dir.path());
            add_feature(&path, &layout, 0x80000);
            let device = Loop::read_only(&path);
            dir.settle();
            let tried = mount(&on_linux(kernel), &device, &dir.at("mnt"), &["ro"]).await;
            let message = refused(tried, ErrorKind::Invalid);
            assert!(message.contains(kernels_words), "{message}");
            assert!(message.contains("incompat 0x80000"), "{message}");
            dir.assert_clean();
        }
    }
}

/// What this kernel knows of it or not, the option reaches it whole.
#[tokio::test]
async fn root_u14_a_label_with_commas_reaches_the_kernel() {
    let has_selinux = Path::new("/sys/fs/selinux/enforce").exists();
    let label = "context=system_u:object_r:svirt_sandbox_file_t:s0:c1,c2";
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        let tried = mount(&guest, &device, &dir.at("mnt"), &[label]).await;
        if has_selinux {
            tried.unwrap();
            guest.unmount(&dir.at("mnt")).await.unwrap();
        } else {
            let message = refused(tried, ErrorKind::Invalid);
            assert!(message.contains("context"), "{message}");
            assert!(!message.contains("'c2"), "{message}");
        }
        dir.assert_clean();
    }
}

/// From now on, the kernel answers EPERM to these system calls of this thread, and of those that it starts.
fn forbid(calls: &[libc::c_long]) {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // The number of the call is the first field of what the filter is given.
    let mut program = vec![step(LOAD, 0, 0, 0)];
    for call in calls {
        program.push(step(JUMP_IF_EQUAL, 0, 1, u32::try_from(*call).unwrap()));
        let answer = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
        program.push(step(RETURN, 0, 0, answer));
    }
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program and what it points to outlive the calls, which keep neither.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
        libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// On this thread, so that what is forbidden to it is forbidden to those that it starts.
fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

/// Mounts a layer, one as shared, and an overlay with a scratch, where some system calls are forbidden.
fn works_without(calls: &'static [libc::c_long]) {
    let work = move || {
        let mut dir = TestDir::new();
        let layer = Loop::read_only(&Image::Erofs.copy(dir.path()));
        let scratch = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        forbid(calls);
        runtime().block_on(async {
            let guest = guest();
            mount(&guest, &layer, &dir.at("layer"), &["ro"])
                .await
                .unwrap();
            mount(&guest, &scratch, &dir.at("scratch"), &["shared"])
                .await
                .unwrap();
            assert_eq!(mount_at(&dir.at("scratch")).propagation.len(), 1);
            fs::create_dir(dir.at("scratch/s")).unwrap();
            let overlay =
                Overlay::new([dir.at("layer")], dir.at("tree")).with_scratch(dir.at("scratch/s"));
            guest.combine(&overlay).await.unwrap();
            assert_eq!(fs::read_to_string(dir.at("tree/hello")).unwrap(), "erofs");
            fs::write(dir.at("tree/new"), "x").unwrap();
            for target in ["tree", "scratch", "layer"] {
                guest.unmount(&dir.at(target)).await.unwrap();
            }
        });
        dir.assert_clean();
    };
    std::thread::spawn(work).join().unwrap();
}

#[test]
fn root_u11_each_new_mount_call_may_be_forbidden_alone() {
    works_without(&[]);
    works_without(&[libc::SYS_fsopen]);
    works_without(&[libc::SYS_fsconfig]);
    works_without(&[libc::SYS_fsmount]);
    works_without(&[libc::SYS_move_mount]);
    works_without(&[libc::SYS_open_tree]);
    works_without(&[libc::SYS_mount_setattr]);

    works_without(&[
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_mount_setattr,
    ]);
}

#[test]
fn root_u11_where_no_mount_is_permitted_the_reason_is_said() {
    let work = || {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        forbid(&[libc::SYS_fsopen, libc::SYS_mount]);
        let tried = runtime().block_on(mount(&guest(), &device, &dir.at("mnt"), &[]));
        let message = refused(tried, ErrorKind::Other);
        assert!(message.contains("seccomp"), "{message}");
        dir.assert_clean();
    };
    std::thread::spawn(work).join().unwrap();
}

/// What keeps a layer in use after its overlay is gone from here, told by the error of the layer's device.
async fn who_keeps_a_layer(keep: impl AsyncFnOnce(&TestDir)) -> String {
    let dir = TestDir::new();
    let layer = Loop::read_only(&Image::Erofs.copy(dir.path()));
    // With its directory, a mount is gone in other namespaces too.
    for target in ["layer", "tree"] {
        fs::create_dir(dir.at(target)).unwrap();
    }
    let guest = short_wait().build();
    mount(&guest, &layer, &dir.at("layer"), &["ro"])
        .await
        .unwrap();
    let overlay = Overlay::new([dir.at("layer")], dir.at("tree"));
    guest.combine(&overlay).await.unwrap();
    keep(&dir).await;
    guest.unmount(&dir.at("tree")).await.unwrap();
    guest.unmount(&dir.at("layer")).await.unwrap();
    let error = blockmount_linux::device::prove_free(layer.node()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    // The test ends it with the processes and mounts that it has made.
    let at = dir.at("bind");
    if at.exists() {
        kit::run("umount", &[at.to_str().unwrap()]);
    }
    error.message().to_owned()
}

#[tokio::test]
async fn root_u12_a_bind_mount_of_an_overlay_is_named_as_the_user_of_its_layers() {
    let said = who_keeps_a_layer(async |dir| {
        let (tree, bind) = (dir.at("tree"), dir.at("bind"));
        fs::create_dir(&bind).unwrap();
        kit::run(
            "mount",
            &["--bind", tree.to_str().unwrap(), bind.to_str().unwrap()],
        );
    })
    .await;
    assert!(said.contains("overlay") && said.contains("/bind"), "{said}");
}

#[tokio::test]
async fn root_u12_a_copy_in_another_mount_namespace_is_named_with_its_process() {
    let mut other = None;
    let said = who_keeps_a_layer(async |dir| {
        let mut command = std::process::Command::new("unshare");
        command.args(["-m", "--propagation", "private", "sleep", "60"]);
        let child = command.spawn().unwrap();
        let table = format!("/proc/{}/mountinfo", child.id());
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        let theirs = format!("/proc/{}/ns/mnt", child.id());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let tree = dir.at("tree");
        // The copy is made before it is private.
        let is_there = || {
            let table = mountinfo::parse(&fs::read(&table).unwrap_or_default());
            fs::read_link(&theirs).is_ok_and(|theirs| theirs != own)
                && mountinfo::at(&table, &tree)
                    .iter()
                    .any(|mount| mount.propagation.is_empty())
        };
        while !is_there() {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        other = Some(child);
    })
    .await;
    let mut other = other.unwrap();
    let pid = other.id();
    other.kill().unwrap();
    other.wait().unwrap();
    for words in [&format!("process {pid} ("), "mount namespace 4", "/layer"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}
