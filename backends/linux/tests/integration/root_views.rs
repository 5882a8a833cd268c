//! One mount, seen at many places: flags, directories, owners, and what must not be left.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use crate::kit::{
    Image, KERNELS, Loop, TestDir, guest, mount, mount_at, on_linux, refused, run, short_wait,
    umount,
};
use blockmount::{
    BackendError, BindMount, Binder, ErrorKind, LayerCombiner, Mounter, NewDirectory, Overlay,
    Presence, ViewOptions,
};
use blockmount_linux::LinuxGuest;

fn options(names: &[&str]) -> ViewOptions {
    ViewOptions::new(names.iter().copied()).unwrap()
}

async fn bind(
    guest: &LinuxGuest,
    source: &Path,
    target: &Path,
    options: &ViewOptions,
) -> Result<(), BackendError> {
    let bind = BindMount::new(source, target, options.clone());
    guest.bind(&bind).await
}

#[tokio::test]
async fn root_u15_each_view_has_flags_of_its_own() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        let [volume, writer, reader] = ["volume", "c1/data", "c2/data"].map(|name| dir.at(name));
        mount(&guest, &device, &volume, &["nodev"]).await.unwrap();
        bind(&guest, &volume, &writer, &options(&[])).await.unwrap();
        let flags = ["ro", "nosuid", "noexec", "noatime"];
        bind(&guest, &volume, &reader, &options(&flags))
            .await
            .unwrap();
        // At once writable here and read-only there, over one filesystem.
        fs::write(writer.join("new"), "x").unwrap();
        assert_eq!(fs::read_to_string(reader.join("new")).unwrap(), "x");
        let error = fs::write(reader.join("other"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        // What the mount refuses, its views refuse as well.
        for flag in ["nodev", "ro", "nosuid", "noexec", "noatime"] {
            let has = |at: &Path| {
                let shown = mount_at(at).options.into_string().unwrap();
                shown.split(',').any(|option| option == flag)
            };
            assert_eq!(has(&writer), flag == "nodev", "{kernel:?} {flag}");
            assert!(has(&reader), "{kernel:?} {flag}");
        }
        for target in [&writer, &reader, &volume] {
            guest.unmount(target).await.unwrap();
        }
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u15_a_view_shows_a_directory_and_leaves_the_mount_nowhere() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        let other = Loop::new(&Image::Ext2.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        let (volume, view) = (dir.at("volume"), dir.at("view"));
        mount(&guest, &device, &volume, &[]).await.unwrap();
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::write(volume.join("a/b/file"), "in b").unwrap();
        fs::create_dir(volume.join("mounted")).unwrap();
        symlink("/etc", volume.join("out")).unwrap();
        symlink("a", volume.join("in")).unwrap();
        mount(&guest, &other, &volume.join("mounted"), &[])
            .await
            .unwrap();
        let part = options(&["ro"]).with_subpath("a/b").unwrap();
        bind(&guest, &volume, &view, &part).await.unwrap();
        assert_eq!(fs::read_to_string(view.join("file")).unwrap(), "in b");
        assert_eq!(mount_at(&view).root, Path::new("/a/b"));
        guest.unbind(&view).await.unwrap();
        assert!(!view.exists());
        for (subpath, kind, words) in [
            ("out", ErrorKind::Invalid, "a symbolic link"),
            ("in/b", ErrorKind::Invalid, "a symbolic link"),
            ("hello", ErrorKind::Invalid, "not a directory"),
            ("a/c", ErrorKind::NotFound, "a/c: it is not there"),
            ("mounted", ErrorKind::Invalid, "on another mount"),
        ] {
            let part = options(&[]).with_subpath(subpath).unwrap();
            let message = refused(bind(&guest, &volume, &view, &part).await, kind);
            assert!(message.contains(words), "{message}");
            assert!(!view.exists());
        }
        // What is mounted below the mount is in no view of it.
        bind(&guest, &volume, &view, &options(&[])).await.unwrap();
        assert_eq!(fs::read_dir(view.join("mounted")).unwrap().count(), 0);
        for target in [&view, &volume.join("mounted"), &volume] {
            guest.unmount(target).await.unwrap();
        }
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_a_view_makes_the_directory_that_it_shows() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        let (volume, view) = (dir.at("volume"), dir.at("view"));
        mount(&guest, &device, &volume, &[]).await.unwrap();
        let new = NewDirectory {
            mode: 0o2750,
            user: 1000,
            group: 2000,
        };
        let make = |path: &str| {
            let part = options(&[]).with_subpath(path).unwrap();
            part.with_new_directory(new).unwrap()
        };
        bind(&guest, &volume, &view, &make("upper")).await.unwrap();
        fs::write(view.join("file"), "kept").unwrap();
        let seen = volume.join("upper").metadata().unwrap();
        assert_eq!(
            (seen.mode() & 0o7777, seen.uid(), seen.gid()),
            (0o2750, 1000, 2000)
        );
        guest.unbind(&view).await.unwrap();
        // What is there is shown as it is.
        let other = NewDirectory { mode: 0o777, ..new };
        let again = make("upper").with_new_directory(other).unwrap();
        bind(&guest, &volume, &view, &again).await.unwrap();
        assert_eq!(fs::read_to_string(view.join("file")).unwrap(), "kept");
        guest.unbind(&view).await.unwrap();
        assert_eq!(
            volume.join("upper").metadata().unwrap().mode() & 0o7777,
            0o2750
        );
        // Only the last one is made, and none for a view that cannot be.
        let message = refused(
            bind(&guest, &volume, &view, &make("a/b")).await,
            ErrorKind::NotFound,
        );
        assert!(message.contains("a: it is not there"), "{message}");
        fs::write(&view, "in the way").unwrap();
        bind(&guest, &volume, &view, &make("new"))
            .await
            .unwrap_err();
        assert!(!volume.join("new").exists() && !volume.join("a").exists());
        fs::remove_file(&view).unwrap();
        guest.unmount(&volume).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u15_files_of_a_view_have_other_owners() {
    for image in [Image::Ext4, Image::Xfs, Image::Erofs] {
        let mut dir = TestDir::new();
        let device = Loop::new(&image.copy(dir.path()));
        dir.settle();
        let guest = guest();
        let (volume, view, plain) = (dir.at("volume"), dir.at("view"), dir.at("plain"));
        mount(&guest, &device, &volume, &[]).await.unwrap();
        let map = "u:0:100000:65536 g:0:200000:1000".parse().unwrap();
        let mapped = options(&[]).with_id_map(map);
        bind(&guest, &volume, &view, &mapped).await.unwrap();
        bind(&guest, &volume, &plain, &options(&[])).await.unwrap();
        let owner = |path: &Path| {
            let meta = path.metadata().unwrap();
            (meta.uid(), meta.gid())
        };
        assert_eq!(owner(&view.join("hello")), (100_000, 200_000), "{image:?}");
        assert_eq!(owner(&plain.join("hello")), (0, 0));
        if image.is_writable() {
            // A file of somebody who appears in the view belongs to whom that is in the filesystem.
            std::os::unix::fs::chown(view.join("hello"), Some(100_007), Some(200_008)).unwrap();
            assert_eq!(owner(&volume.join("hello")), (7, 8), "{image:?}");
            assert!(std::os::unix::fs::chown(view.join("hello"), Some(5), None).is_err());
        }
        for target in [&plain, &view, &volume] {
            guest.unmount(target).await.unwrap();
        }
        dir.assert_clean();
    }
    // A map of one kind leaves the other as it is.
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = guest();
    let (volume, view) = (dir.at("volume"), dir.at("view"));
    mount(&guest, &device, &volume, &[]).await.unwrap();
    let mapped = options(&[]).with_id_map("u:0:7:1".parse().unwrap());
    bind(&guest, &volume, &view, &mapped).await.unwrap();
    let meta = view.join("hello").metadata().unwrap();
    assert_eq!((meta.uid(), meta.gid()), (7, 0));
    guest.unbind(&view).await.unwrap();
    // Older kernels have no maps, and say so; nothing is left.
    let other = short_wait().as_on_linux(5, 10).build();
    mount(&other, &device, &dir.at("old"), &[])
        .await
        .unwrap_err();
    guest.unmount(&volume).await.unwrap();
    let old = on_linux((5, 10));
    mount(&old, &device, &volume, &[]).await.unwrap();
    let message = refused(
        bind(&old, &volume, &view, &mapped).await,
        ErrorKind::Unsuitable,
    );
    assert!(message.contains("Linux 5.12"), "{message}");
    old.unmount(&volume).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_u15_a_mount_stays_until_its_views_are_gone() {
    for kernel in [(4, 19), (u32::MAX, 0)] {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = short_wait().as_on_linux(kernel.0, kernel.1).build();
        let (volume, view) = (dir.at("volume"), dir.at("view"));
        mount(&guest, &device, &volume, &[]).await.unwrap();
        bind(&guest, &volume, &view, &options(&[])).await.unwrap();
        let message = refused(guest.unmount(&volume).await, ErrorKind::Busy);
        assert!(message.contains("there is a view of it at"), "{message}");
        // In use, the view stays as well, and who uses it is named.
        let open = fs::File::open(view.join("hello")).unwrap();
        let message = refused(guest.unbind(&view).await, ErrorKind::Busy);
        assert!(
            message.contains(&std::process::id().to_string()),
            "{message}"
        );
        drop(open);
        guest.unbind(&view).await.unwrap();
        guest.unbind(&view).await.unwrap();
        guest.unmount(&volume).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u15_only_what_is_mounted_by_the_engine_has_views() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    fs::create_dir(dir.at("theirs")).unwrap();
    fs::create_dir(dir.at("plain")).unwrap();
    dir.settle();
    let guest = guest();
    run(
        "mount",
        &["-t", "tmpfs", "none", dir.at("theirs").to_str().unwrap()],
    );
    let (volume, view) = (dir.at("volume"), dir.at("view"));
    mount(&guest, &device, &volume, &[]).await.unwrap();
    bind(&guest, &volume, &view, &options(&[])).await.unwrap();
    for source in [
        dir.at("theirs"),
        dir.at("plain"),
        dir.at("absent"),
        view.clone(),
        volume.join("lost+found"),
    ] {
        let tried = bind(&guest, &source, &dir.at("no"), &options(&[])).await;
        refused(tried, ErrorKind::NotFound);
    }
    // A target is taken only once.
    let taken = bind(&guest, &volume, &view, &options(&["ro"])).await;
    refused(taken, ErrorKind::Conflict);
    for target in [&view, &volume] {
        guest.unmount(target).await.unwrap();
    }
    umount(dir.at("theirs"));
    dir.assert_clean();
}

#[tokio::test]
async fn root_u15_mounts_do_not_spread_between_a_view_and_its_mount_unless_asked_to() {
    for kernel in [(4, 19), (u32::MAX, 0)] {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        let volume = dir.at("volume");
        mount(&guest, &device, &volume, &["shared"]).await.unwrap();
        fs::create_dir(volume.join("at")).unwrap();
        for (names, from_view, to_view) in [
            (&[][..], false, false),
            (&["private"], false, false),
            (&["slave"], false, true),
            (&["shared"], true, true),
        ] {
            let view = dir.at("view");
            bind(&guest, &volume, &view, &options(names)).await.unwrap();
            for (here, there, spreads) in [(&view, &volume, from_view), (&volume, &view, to_view)] {
                let [here, there] = [here, there].map(|path| path.join("at"));
                run("mount", &["-t", "tmpfs", "none", here.to_str().unwrap()]);
                fs::write(here.join("file"), "x").unwrap();
                assert_eq!(there.join("file").exists(), spreads, "{kernel:?} {names:?}");
                umount(here);
            }
            guest.unbind(&view).await.unwrap();
        }
        guest.unmount(&volume).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u15_an_engine_that_was_killed_takes_its_views_over() {
    for kernel in [(4, 19), (u32::MAX, 0)] {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        let journal = dir.at("journal");
        fs::create_dir(&journal).unwrap();
        fs::set_permissions(
            &journal,
            std::os::unix::fs::PermissionsExt::from_mode(0o700),
        )
        .unwrap();
        dir.settle();
        let builder = || short_wait().as_on_linux(kernel.0, kernel.1);
        let (volume, view) = (dir.at("volume"), dir.at("deep/view"));
        let first = builder().journal(&journal).await.unwrap();
        mount(&first, &device, &volume, &[]).await.unwrap();
        bind(&first, &volume, &view, &options(&["ro"]))
            .await
            .unwrap();
        drop(first);
        let second = builder().journal(&journal).await.unwrap();
        let found = async |options: &ViewOptions| {
            let bind = BindMount::new(&volume, &view, options.clone());
            Binder::adopt(&second, &bind).await.unwrap()
        };
        assert_eq!(found(&options(&["ro"])).await, Presence::Present(()));
        assert_eq!(found(&options(&[])).await, Presence::Absent);
        let message = refused(second.unmount(&volume).await, ErrorKind::Busy);
        assert!(message.contains("there is a view of it at"), "{message}");
        second.unbind(&view).await.unwrap();
        assert_eq!(found(&options(&["ro"])).await, Presence::Absent);
        second.unmount(&volume).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u15_the_tree_of_an_overlay_is_seen_at_several_places() {
    for kernel in KERNELS {
        let dir = TestDir::new();
        for (name, text) in [("l0/etc/top", "0"), ("l1/etc/base", "1")] {
            let path = dir.at(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir(dir.at("scratch")).unwrap();
        let guest = short_wait().as_on_linux(kernel.0, kernel.1).build();
        let [tree, reader, part] = ["tree", "reader", "deep/part"].map(|name| dir.at(name));
        let overlay = Overlay::new([dir.at("l0"), dir.at("l1")], &tree);
        let overlay = overlay.with_scratch(dir.at("scratch"));
        guest.combine(&overlay).await.unwrap();
        bind(&guest, &tree, &reader, &options(&["ro", "nosuid"]))
            .await
            .unwrap();
        let etc = options(&[]).with_subpath("etc").unwrap();
        bind(&guest, &tree, &part, &etc).await.unwrap();
        fs::write(part.join("new"), "through a view").unwrap();
        assert_eq!(
            fs::read_to_string(tree.join("etc/new")).unwrap(),
            "through a view"
        );
        assert_eq!(fs::read_dir(reader.join("etc")).unwrap().count(), 3);
        let error = fs::write(reader.join("etc/other"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        fs::remove_file(part.join("new")).unwrap();
        // An overlay has the owners of its layers.
        let mapped = options(&[]).with_id_map("0:100000:65536".parse().unwrap());
        let tried = bind(&guest, &tree, &dir.at("mapped"), &mapped).await;
        let message = refused(tried, ErrorKind::Unsuitable);
        let words = match kernel >= (5, 12) {
            true => "map its layers",
            false => "Linux 5.12",
        };
        assert!(message.contains(words), "{message}");
        let message = refused(guest.separate(&tree).await, ErrorKind::Busy);
        assert!(message.contains("there is a view of it at"), "{message}");
        for target in [&part, &reader] {
            guest.unbind(target).await.unwrap();
        }
        guest.separate(&tree).await.unwrap();
        fs::remove_dir_all(dir.at("scratch")).unwrap();
        assert_eq!(dir.mounts(), []);
        assert!(!tree.exists() && !reader.exists() && !dir.at("deep").exists());
    }
}
