//! Overlays: of few and many layers, with and without a scratch, on every kind of kernel.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::kit::{
    self, Image, KERNELS, Loop, TestDir, guest, mount, mount_at, on_linux, refused, short_wait,
};
use blockmount::{
    ErrorKind, FsGroup, IdMap, LayerCombiner, MountOptions, Mounter, Overlay, OverlayOptions,
};
use blockmount_linux::LinuxGuest;

/// Layers `l0` (the topmost) and so on: each has its own file and its number in `who`.
fn layers(dir: &TestDir, count: usize) -> Vec<PathBuf> {
    let make = |index: usize| {
        let layer = dir.at(format!("l{index}"));
        fs::create_dir_all(&layer).unwrap();
        fs::write(layer.join(format!("f{index}")), "").unwrap();
        fs::write(layer.join("who"), index.to_string()).unwrap();
        layer
    };
    (0..count).map(make).collect()
}

fn overlay(layers: Vec<PathBuf>, scratch: Option<PathBuf>, target: PathBuf) -> Overlay {
    let mut overlay = Overlay::new(layers, target);
    overlay.scratch = scratch;
    overlay
}

#[tokio::test]
async fn root_any_number_of_layers_with_and_without_a_scratch() {
    for kernel in KERNELS {
        // All in one string, in both of its lengths, and by descriptor.
        let most = if kernel == (6, 1) || kernel.0 == u32::MAX {
            500
        } else {
            300
        };
        for count in [1, 2, 40, most] {
            let mut dir = TestDir::new();
            let stack = layers(&dir, count);
            fs::create_dir(dir.at("scratch")).unwrap();
            dir.settle();
            let guest = on_linux(kernel);
            let target = dir.at("deep/root");
            guest
                .combine(&overlay(stack.clone(), None, target.clone()))
                .await
                .unwrap_or_else(|error| {
                    panic!(
                        "{count} on {kernel:?}: {error} {:?}",
                        std::error::Error::source(&error)
                    )
                });
            assert_eq!(fs::read_to_string(target.join("who")).unwrap(), "0");
            assert_eq!(fs::read_dir(&target).unwrap().count(), count + 1);
            let error = fs::write(target.join("new"), "").unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            let mounted = mount_at(&target);
            assert_eq!(
                (&*mounted.filesystem, mounted.source.as_os_str()),
                ("overlay", OsStr::new("blockmount"))
            );
            guest.separate(&target).await.unwrap();
            dir.assert_clean();

            guest
                .combine(&overlay(
                    stack.clone(),
                    Some(dir.at("scratch")),
                    target.clone(),
                ))
                .await
                .unwrap();
            fs::write(target.join("who"), "copied up").unwrap();
            fs::remove_file(target.join(format!("f{}", count - 1))).unwrap();
            fs::write(target.join("new"), "").unwrap();
            assert_eq!(fs::read_dir(&target).unwrap().count(), count + 1);
            guest.separate(&target).await.unwrap();
            assert!(!dir.at("deep").exists() && dir.mounts().is_empty());
            assert_eq!(
                fs::read_to_string(dir.at("scratch/upper/who")).unwrap(),
                "copied up"
            );
            let whiteout =
                fs::symlink_metadata(dir.at(format!("scratch/upper/f{}", count - 1))).unwrap();
            assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
            assert_eq!(fs::read_to_string(dir.at("l0/who")).unwrap(), "0");
            // What was written is there when the scratch is used again.
            guest
                .combine(&overlay(stack, Some(dir.at("scratch")), target.clone()))
                .await
                .unwrap();
            assert_eq!(fs::read_to_string(target.join("who")).unwrap(), "copied up");
            guest.separate(&target).await.unwrap();
        }
    }
}

#[tokio::test]
async fn root_g18_names_need_no_escape() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let odd = |name: &[u8]| dir.at(OsStr::from_bytes(name));
        let names: [&[u8]; 6] = [b"a:b", b"c,d=e", b"f\\:g", b"h i", b"j\nk", b"l\xff"];
        let stack: Vec<PathBuf> = names.iter().map(|name| odd(name)).collect();
        let scratch = odd(b"s:c,r\\a\xffp");
        for (index, dir) in stack.iter().chain([&scratch]).enumerate() {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join(format!("f{index}")), "").unwrap();
        }
        let target = odd(b"t:,\\\xff");
        dir.settle();
        let guest = on_linux(kernel);
        guest
            .combine(&overlay(stack.clone(), None, target.clone()))
            .await
            .unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), names.len());
        guest.separate(&target).await.unwrap();
        dir.assert_clean();
        guest
            .combine(&overlay(stack, Some(scratch), target.clone()))
            .await
            .unwrap();
        fs::write(target.join("new"), "").unwrap();
        guest.separate(&target).await.unwrap();
    }
}

/// Kernels before 6.8 take all layers in one string of at most a page, which one such path fills.
#[tokio::test]
async fn root_forty_layers_whose_paths_are_as_long_as_paths_can_be() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let deep: PathBuf = std::iter::repeat_n("a:long,name=\\".repeat(18), 17).collect();
        let below = |name: String| dir.at(&deep).join(name);
        let stack: Vec<PathBuf> = (0..40).map(|index| below(format!("l{index}"))).collect();
        let scratch = below("scratch".to_owned());
        assert!((3_900..4_090).contains(&stack[0].as_os_str().len()));
        for (index, dir) in stack.iter().chain([&scratch]).enumerate() {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join(format!("f{index}")), "").unwrap();
        }
        let target = below("t".to_owned());
        dir.settle();
        let guest = on_linux(kernel);
        let without = overlay(stack.clone(), None, target.clone());
        guest.combine(&without).await.unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), stack.len());
        guest.separate(&target).await.unwrap();
        dir.assert_clean();
        let with = overlay(stack, Some(scratch), target.clone());
        guest.combine(&with).await.unwrap();
        fs::write(target.join("new"), "").unwrap();
        guest.separate(&target).await.unwrap();
        assert_eq!(dir.mounts(), []);
    }
}

#[tokio::test]
async fn root_layers_are_devices_and_go_after_their_overlay() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let devices = [Image::Erofs, Image::Squashfs, Image::Ext4]
            .map(|image| Loop::new(&image.copy(dir.path())));
        dir.settle();
        let guest = on_linux(kernel);
        for (index, device) in devices.iter().enumerate() {
            let access: &[&str] = if index == 2 { &[] } else { &["ro"] };
            mount(&guest, device, &dir.at(format!("m{index}")), access)
                .await
                .unwrap();
        }
        fs::create_dir(dir.at("m2/scratch")).unwrap();
        let both = overlay(
            vec![dir.at("m0"), dir.at("m1")],
            Some(dir.at("m2/scratch")),
            dir.at("root"),
        );
        guest.combine(&both).await.unwrap();
        assert_eq!(fs::read_to_string(dir.at("root/hello")).unwrap(), "erofs");
        fs::write(dir.at("root/hello"), "changed").unwrap();
        refused(
            guest
                .separate(&dir.at("m9"))
                .await
                .and(guest.combine(&both).await),
            ErrorKind::Conflict,
        );
        guest.separate(&dir.at("root")).await.unwrap();
        for index in [2, 1, 0] {
            guest.unmount(&dir.at(format!("m{index}"))).await.unwrap();
        }
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_g18_a_failed_overlay_removes_only_what_it_made() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let stack = layers(&dir, 2);
        fs::create_dir_all(dir.at("fresh")).unwrap();
        fs::create_dir_all(dir.at("half/upper/data")).unwrap();
        fs::create_dir_all(dir.at("broken")).unwrap();
        fs::write(dir.at("broken/work"), "").unwrap();
        fs::create_dir(dir.at("full")).unwrap();
        fs::write(dir.at("full/x"), "").unwrap();
        dir.settle();
        let guest = on_linux(kernel);
        // The same layer twice is refused by the kernel, after everything was prepared.
        let twice = vec![stack[0].clone(), stack[0].clone()];
        for scratch in ["fresh", "half"] {
            let bad = overlay(twice.clone(), Some(dir.at(scratch)), dir.at("x/root"));
            refused(guest.combine(&bad).await, ErrorKind::Invalid);
            dir.assert_clean();
        }
        let cases = [
            (vec![], None, "x/root", ErrorKind::Invalid),
            (vec![dir.at("none")], None, "x/root", ErrorKind::NotFound),
            (vec![dir.at("l0/who")], None, "x/root", ErrorKind::Invalid),
            (vec!["relative".into()], None, "x/root", ErrorKind::Invalid),
            (
                vec![stack[0].clone(); 501],
                None,
                "x/root",
                ErrorKind::Invalid,
            ),
            (stack.clone(), Some("none"), "x/root", ErrorKind::NotFound),
            (stack.clone(), Some("broken"), "x/root", ErrorKind::Invalid),
            (stack.clone(), Some("fresh"), "full", ErrorKind::Conflict),
        ];
        for (layers, scratch, target, kind) in cases {
            let bad = overlay(layers, scratch.map(|name| dir.at(name)), dir.at(target));
            refused(guest.combine(&bad).await, kind);
            dir.assert_clean();
        }
        let bad = overlay(stack.clone(), None, PathBuf::from("/etc/x"));
        refused(guest.combine(&bad).await, ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn root_one_scratch_takes_the_changes_of_one_overlay() {
    let dir = TestDir::new();
    let stack = layers(&dir, 2);
    fs::create_dir(dir.at("scratch")).unwrap();
    let guest = guest();
    let one = overlay(stack.clone(), Some(dir.at("scratch")), dir.at("one"));
    let other = overlay(stack, Some(dir.at("scratch/../scratch")), dir.at("other"));
    guest.combine(&one).await.unwrap();
    refused(guest.combine(&other).await, ErrorKind::Conflict);
    assert!(dir.at("scratch/upper").exists() && !dir.at("other").exists());
    guest.separate(&dir.at("one")).await.unwrap();
    guest.combine(&other).await.unwrap();
    guest.separate(&dir.at("other")).await.unwrap();
}

#[tokio::test]
async fn root_the_mark_and_the_look_of_the_root() {
    let dir = TestDir::new();
    let stack = layers(&dir, 1);
    fs::create_dir(dir.at("scratch")).unwrap();
    fs::set_permissions(&stack[0], fs::Permissions::from_mode(0o1751)).unwrap();
    std::os::unix::fs::chown(&stack[0], Some(12), Some(34)).unwrap();
    let guest = short_wait().overlay_mark("a mark of ours").build();
    let with = overlay(stack, Some(dir.at("scratch")), dir.at("root"));
    guest.combine(&with).await.unwrap();
    assert_eq!(mount_at(&dir.at("root")).source, "a mark of ours");
    let look = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    assert_eq!(look(&dir.at("root")), (0o1751, 12, 34));
    let open = fs::File::open(dir.at("root/who")).unwrap();
    refused(guest.separate(&dir.at("root")).await, ErrorKind::Busy);
    drop(open);
    guest.separate(&dir.at("root")).await.unwrap();
}

/// A link in the scratch image to a directory outside, in place of each directory that the engine opens or makes.
#[tokio::test]
async fn root_x03_a_link_in_the_scratch_leads_nowhere() {
    for kernel in KERNELS {
        for link in ["upper", "work", ".", ".."] {
            for is_relative in [false, true] {
                let mut dir = TestDir::new();
                let stack = layers(&dir, 1);
                fs::create_dir_all(dir.at("outside/c1")).unwrap();
                fs::create_dir_all(dir.at("image/deep")).unwrap();
                let scratch = dir.at("image/deep/c1");
                // The scratch itself and its parent are links too, as a hostile image has them.
                let (at, to) = match link {
                    "." => (scratch.clone(), "outside/c1"),
                    ".." => (dir.at("image/deep"), "outside"),
                    name => (scratch.join(name), "outside"),
                };
                if link == ".." {
                    fs::remove_dir(&at).unwrap();
                } else {
                    fs::create_dir_all(at.parent().unwrap()).unwrap();
                }
                let to = match is_relative {
                    false => dir.at(to),
                    true => {
                        let depth = at.strip_prefix(dir.path()).unwrap().iter().count() - 1;
                        Path::new(&"../".repeat(depth)).join(to)
                    }
                };
                std::os::unix::fs::symlink(&to, &at).unwrap();
                assert!(at.canonicalize().unwrap().starts_with(dir.at("outside")));
                dir.settle();
                let guest = on_linux(kernel);
                let combined = guest
                    .combine(&overlay(stack, Some(scratch), dir.at("root")))
                    .await;
                refused(combined, ErrorKind::Invalid);
                let outside = fs::read_dir(dir.at("outside")).unwrap();
                let names: Vec<_> = outside.map(|entry| entry.unwrap().file_name()).collect();
                assert_eq!(names, ["c1"], "{link} on {kernel:?}");
                assert_eq!(fs::read_dir(dir.at("outside/c1")).unwrap().count(), 0);
                dir.assert_clean();
            }
        }
    }
}

fn with(options: &[&str]) -> OverlayOptions {
    OverlayOptions::new(options.iter().copied()).unwrap()
}

#[tokio::test]
async fn root_overlays_have_the_options_that_were_asked_for() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let stack = layers(&dir, 2);
        let names = [
            "volatile",
            "metacopy=on",
            "redirect_dir=on",
            "userxattr",
            "verity=require",
            "xino=off",
            "index=off",
        ];
        for name in names {
            fs::create_dir(dir.at(name)).unwrap();
        }
        dir.settle();
        let guest = on_linux(kernel);
        let target = dir.at("root");
        for name in names {
            let wanted = Overlay::new(stack.clone(), &target).with_scratch(dir.at(name));
            let wanted = wanted.with_options(with(&[name]));
            guest.combine(&wanted).await.unwrap();
            // What is off, the kernel shows only where it would be on.
            // The newest kernels have another word for it.
            let is_shown = |name: &str| mount_at(&target).has_option(name);
            let newer = is_shown(&format!("fsync={name}"));
            let shown = name.ends_with("=off") || is_shown(name) || newer;
            let table = mount_at(&target).super_options;
            assert!(shown, "{name} on {kernel:?}: {table:?}");
            let opposite = name.replace("=off", "=on");
            assert!(opposite == name || !mount_at(&target).has_option(&opposite));
            fs::write(target.join("who"), "changed").unwrap();
            guest.separate(&target).await.unwrap();
            assert!(!target.exists() && dir.mounts().is_empty());
        }
        // What a volatile overlay wrote may be in part on the disk: the kernel does not take it for whole.
        let again = Overlay::new(stack, &target).with_scratch(dir.at("volatile"));
        let message = refused(guest.combine(&again).await, ErrorKind::Invalid);
        assert!(message.contains("volatile"), "{message}");
        assert!(!target.exists() && dir.mounts().is_empty());
    }
}

#[tokio::test]
async fn root_overlay_options_that_a_kernel_does_not_have_are_refused() {
    assert!(!Path::new("/sys/fs/selinux/enforce").exists());
    let label = "a".repeat(200);
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let stack = layers(&dir, 2);
        fs::create_dir(dir.at("scratch")).unwrap();
        dir.settle();
        let guest = on_linux(kernel);
        let overlay = Overlay::new(stack, dir.at("root")).with_scratch(dir.at("scratch"));
        let options = with(&[&format!("context={label}")]);
        let message = refused(
            guest.combine(&overlay.with_options(options)).await,
            ErrorKind::Invalid,
        );
        assert!(message.contains("context"), "{kernel:?}: {message}");
        dir.assert_clean();
    }
    // One string for all of it has an end, which is found before anything is mounted.
    let mut dir = TestDir::new();
    let stack = layers(&dir, 500);
    dir.settle();
    let options = with(&[&format!("context={}", label.repeat(15))]);
    let overlay = Overlay::new(stack, dir.at("root")).with_options(options);
    let tried = on_linux((5, 4)).combine(&overlay).await;
    let message = refused(tried, ErrorKind::Unsuitable);
    assert!(message.contains("in one string of 4095 bytes"), "{message}");
    dir.assert_clean();
}

/// A tree over one layer, with some options, as long as somebody looks at it and at what is in its scratch.
async fn while_stacked(
    guest: &LinuxGuest,
    layer: &Path,
    options: &[&str],
    look: impl FnOnce(&Path, &Path),
) {
    let dir = TestDir::new();
    fs::create_dir(dir.at("scratch")).unwrap();
    let tree = dir.at("tree");
    let stacked = Overlay::new([layer.to_owned()], &tree).with_scratch(dir.at("scratch"));
    let stacked = stacked.with_options(with(options));
    guest.combine(&stacked).await.unwrap();
    look(&tree, &dir.at("scratch/upper"));
    guest.separate(&tree).await.unwrap();
    assert!(dir.mounts().is_empty() && !tree.exists());
}

fn has_attribute(path: &Path, name: &str) -> bool {
    let mut value = [0; 256];
    rustix::fs::lgetxattr(path, name, &mut value).is_ok()
}

/// What each option does, beside what another value of it does.
#[tokio::test]
async fn root_overlay_options_do_what_their_documentation_says() {
    for kernel in KERNELS {
        let guest = on_linux(kernel);
        let dir = TestDir::new();
        let layer = dir.at("layer");
        fs::create_dir_all(layer.join("sub")).unwrap();
        fs::write(layer.join("sub/inside"), "").unwrap();
        fs::write(layer.join("bulk"), kit::noise(40_000)).unwrap();
        fs::hard_link(layer.join("bulk"), layer.join("link")).unwrap();
        // A change of the mode alone copies no data, unless the data could not be checked later.
        for (options, is_without_data) in [
            (&["metacopy=on"][..], true),
            (&["metacopy=on", "verity=on"], true),
            (&["metacopy=on", "verity=require"], false),
            (&["metacopy=off"], false),
        ] {
            let look = |tree: &Path, upper: &Path| {
                fs::set_permissions(tree.join("bulk"), PermissionsExt::from_mode(0o600)).unwrap();
                let marked = has_attribute(&upper.join("bulk"), "trusted.overlay.metacopy");
                let blocks = upper.join("bulk").metadata().unwrap().blocks();
                let found = (marked, blocks == 0);
                let expected = (is_without_data, is_without_data);
                assert_eq!(found, expected, "{options:?} on {kernel:?}");
            };
            while_stacked(&guest, &layer, options, look).await;
        }
        // A directory of a layer can be moved, or is not.
        for (options, is_moved) in [("redirect_dir=on", true), ("redirect_dir=nofollow", false)] {
            let look = |tree: &Path, upper: &Path| {
                let moved = fs::rename(tree.join("sub"), tree.join("moved"));
                let code = moved.err().and_then(|error| error.raw_os_error());
                let expected = (!is_moved).then_some(libc::EXDEV);
                assert_eq!(code, expected, "{options} on {kernel:?}");
                let marked = has_attribute(&upper.join("moved"), "trusted.overlay.redirect");
                assert_eq!(marked, is_moved, "{options} on {kernel:?}");
            };
            while_stacked(&guest, &layer, &[options], look).await;
        }
        // Two names of one file stay that when it is written to, or become two files.
        for (options, is_one) in [("index=on", true), ("index=off", false)] {
            let look = |tree: &Path, _: &Path| {
                fs::write(tree.join("bulk"), "changed").unwrap();
                let other = fs::read(tree.join("link")).unwrap();
                assert_eq!(other == b"changed", is_one, "{options} on {kernel:?}");
            };
            while_stacked(&guest, &layer, &[options], look).await;
        }
        // The marks of the scratch are those that a user without rights could have made, or those of root.
        for (options, prefix, other) in [
            (&["userxattr"][..], "user", "trusted"),
            (&[], "trusted", "user"),
        ] {
            let look = |tree: &Path, upper: &Path| {
                fs::remove_dir_all(tree.join("sub")).unwrap();
                fs::create_dir(tree.join("sub")).unwrap();
                let marked =
                    |by: &str| has_attribute(&upper.join("sub"), &format!("{by}.overlay.opaque"));
                assert_eq!((marked(prefix), marked(other)), (true, false), "{kernel:?}");
            };
            while_stacked(&guest, &layer, options, look).await;
        }
        // The filesystem has an identity of its own, or that of the scratch's.
        for (options, is_own) in [("uuid=on", true), ("uuid=null", false)] {
            let look = |tree: &Path, upper: &Path| {
                let id = |path: &Path| rustix::fs::statvfs(path).unwrap().f_fsid;
                assert_eq!(id(tree) != id(upper), is_own, "{options} on {kernel:?}");
            };
            while_stacked(&guest, &layer, &[options], look).await;
        }
        let look = |tree: &Path, _: &Path| {
            let table = mount_at(tree);
            assert!(table.has_option("nfs_export=on"), "{table:?} on {kernel:?}");
        };
        let options = ["nfs_export=on", "index=on", "metacopy=off"];
        while_stacked(&guest, &layer, &options, look).await;
    }
}

/// A file of a layer on another filesystem than the scratch has the device number of the tree, or one of its own.
#[tokio::test]
async fn root_overlay_inodes_are_of_one_device_if_that_was_asked_for() {
    let dir = TestDir::new();
    let device = Loop::new(&Image::Erofs.copy(dir.path()));
    let layer = dir.at("layer");
    let owner = guest();
    mount(&owner, &device, &layer, &["ro"]).await.unwrap();
    for kernel in KERNELS {
        for (options, is_one) in [("xino=on", true), ("xino=off", false)] {
            let look = |tree: &Path, _: &Path| {
                let device = |path: &Path| path.metadata().unwrap().dev();
                let same = device(tree) == device(&tree.join("hello"));
                assert_eq!(same, is_one, "{options} on {kernel:?}");
            };
            while_stacked(&on_linux(kernel), &layer, &[options], look).await;
        }
    }
    owner.unmount(&layer).await.unwrap();
}

fn mapped(read_only: bool) -> MountOptions {
    let map: IdMap = "0:100000:65536".parse().unwrap();
    let options = MountOptions::builder().id_map(map);
    let options = if read_only {
        options.read_only()
    } else {
        options
    };
    options.build().unwrap()
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = path.symlink_metadata().unwrap();
    (meta.uid(), meta.gid())
}

/// The files of the layers appear as those of a container's root, who writes to the tree; the scratch has them as they appear.
#[tokio::test]
async fn root_u21_layers_are_mapped_before_they_are_stacked() {
    for kernel in [(5, 12), (6, 1), (6, 8), (u32::MAX, 0)] {
        let mut dir = TestDir::new();
        let [upper, lower, scratch] = [Image::Erofs, Image::Squashfs, Image::Ext4]
            .map(|image| Loop::new(&image.copy(dir.path())));
        let own = dir.path().join("own");
        fs::create_dir(&own).unwrap();
        let ext4 = Loop::new(&Image::Ext4.copy(&own));
        dir.settle();
        let guest = on_linux(kernel);
        let [a, b, c, s, tree] = ["a", "b", "c", "s", "tree"].map(|name| dir.at(name));
        for (device, target) in [(&upper, &a), (&lower, &b), (&ext4, &c)] {
            guest
                .mount(&device.locator(), target, &mapped(true))
                .await
                .unwrap();
            assert_eq!(
                owner(&target.join("hello")),
                (100_000, 100_000),
                "{kernel:?}"
            );
        }
        mount(&guest, &scratch, &s, &[]).await.unwrap();
        let layers = [a.clone(), b.clone(), c.clone()].to_vec();
        let stacked = overlay(layers, Some(s.clone()), tree.clone());
        guest.combine(&stacked).await.unwrap();
        assert_eq!(owner(&tree), (100_000, 100_000), "{kernel:?}");
        assert_eq!(owner(&tree.join("bulk")), (100_000, 100_000));
        // What is written is as it appears, in the tree and in the scratch.
        fs::write(tree.join("hello"), "copied up").unwrap();
        fs::write(tree.join("new"), "").unwrap();
        chown(tree.join("new"), Some(100_007), Some(100_008)).unwrap();
        guest.separate(&tree).await.unwrap();
        assert_eq!(owner(&s.join("upper/hello")), (100_000, 100_000));
        assert_eq!(owner(&s.join("upper/new")), (100_007, 100_008));
        fs::remove_dir_all(s.join("upper")).unwrap();
        fs::remove_dir_all(s.join("work")).unwrap();
        for target in [&s, &c, &b, &a] {
            guest.unmount(target).await.unwrap();
        }
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u21_a_single_mount_is_mapped_or_refused_and_nothing_is_left() {
    for image in Image::FILESYSTEMS {
        let mut dir = TestDir::new();
        let device = Loop::new(&image.copy(dir.path()));
        dir.settle();
        let target = dir.at("mnt");
        let new = guest();
        let read_only = !image.is_writable();
        let options = mapped(read_only);
        new.mount(&device.locator(), &target, &options)
            .await
            .unwrap();
        assert_eq!(
            owner(&target.join("hello")),
            (100_000, 100_000),
            "{image:?}"
        );
        if !read_only {
            chown(target.join("hello"), Some(100_007), None).unwrap();
            assert!(chown(target.join("hello"), Some(5), None).is_err());
            // Who does not appear there can own no file.
            assert!(fs::write(target.join("new"), "").is_err());
        }
        new.unmount(&target).await.unwrap();
        let access = if read_only { "ro" } else { "rw" };
        mount(&new, &device, &target, &[access]).await.unwrap();
        let stored = if read_only { 0 } else { 7 };
        assert_eq!(owner(&target.join("hello")), (stored, 0), "{image:?}");
        // Two mounts of one device differ in their owners.
        if read_only {
            let other = dir.at("other");
            new.mount(&device.locator(), &other, &options)
                .await
                .unwrap();
            assert_eq!(owner(&other.join("hello")), (100_000, 100_000));
            new.unmount(&other).await.unwrap();
        }
        new.unmount(&target).await.unwrap();
        for kernel in [(4, 19), (5, 10)] {
            let old = on_linux(kernel);
            let tried = old.mount(&device.locator(), &target, &options).await;
            let message = refused(tried, ErrorKind::Unsuitable);
            assert!(message.contains("Linux 5.12"), "{message}");
            dir.assert_clean();
        }
    }
    // A volume is given to a group as the filesystem has it, before it is mapped.
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    let map: IdMap = "0:100000:65536".parse().unwrap();
    let both = MountOptions::builder()
        .id_map(map)
        .fs_group(FsGroup::new(20));
    let both = both.build().unwrap();
    guest
        .mount(&device.locator(), &target, &both)
        .await
        .unwrap();
    assert_eq!(owner(&target.join("hello")), (100_000, 100_020));
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}
