//! Overlays: of few and many layers, with and without a scratch, on every kind of kernel.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

mod kit;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use blockmount::{ErrorKind, LayerCombiner, Mounter, Overlay};
use kit::{Image, KERNELS, Loop, Room, builder, guest, mount, mount_at, on_linux, refused};

/// Layers `l0` (the topmost) and so on: each has its own file and its number in `who`.
fn layers(room: &Room, count: usize) -> Vec<PathBuf> {
    let make = |index: usize| {
        let layer = room.at(format!("l{index}"));
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
            let mut room = Room::new();
            let stack = layers(&room, count);
            fs::create_dir(room.at("scratch")).unwrap();
            room.settle();
            let guest = on_linux(kernel);
            let target = room.at("deep/root");
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
            room.assert_clean();

            guest
                .combine(&overlay(
                    stack.clone(),
                    Some(room.at("scratch")),
                    target.clone(),
                ))
                .await
                .unwrap();
            fs::write(target.join("who"), "copied up").unwrap();
            fs::remove_file(target.join(format!("f{}", count - 1))).unwrap();
            fs::write(target.join("new"), "").unwrap();
            assert_eq!(fs::read_dir(&target).unwrap().count(), count + 1);
            guest.separate(&target).await.unwrap();
            assert!(!room.at("deep").exists() && room.mounts().is_empty());
            assert_eq!(
                fs::read_to_string(room.at("scratch/upper/who")).unwrap(),
                "copied up"
            );
            let whiteout =
                fs::symlink_metadata(room.at(format!("scratch/upper/f{}", count - 1))).unwrap();
            assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
            assert_eq!(fs::read_to_string(room.at("l0/who")).unwrap(), "0");
            // What was written is there when the scratch is used again.
            guest
                .combine(&overlay(stack, Some(room.at("scratch")), target.clone()))
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
        let mut room = Room::new();
        let odd = |name: &[u8]| room.at(OsStr::from_bytes(name));
        let names: [&[u8]; 6] = [b"a:b", b"c,d=e", b"f\\:g", b"h i", b"j\nk", b"l\xff"];
        let stack: Vec<PathBuf> = names.iter().map(|name| odd(name)).collect();
        let scratch = odd(b"s:c,r\\a\xffp");
        for (index, dir) in stack.iter().chain([&scratch]).enumerate() {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join(format!("f{index}")), "").unwrap();
        }
        let target = odd(b"t:,\\\xff");
        room.settle();
        let guest = on_linux(kernel);
        guest
            .combine(&overlay(stack.clone(), None, target.clone()))
            .await
            .unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), names.len());
        guest.separate(&target).await.unwrap();
        room.assert_clean();
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
        let mut room = Room::new();
        let deep: PathBuf = std::iter::repeat_n("a:long,name=\\".repeat(18), 17).collect();
        let below = |name: String| room.at(&deep).join(name);
        let stack: Vec<PathBuf> = (0..40).map(|index| below(format!("l{index}"))).collect();
        let scratch = below("scratch".to_owned());
        assert!((3_900..4_090).contains(&stack[0].as_os_str().len()));
        for (index, dir) in stack.iter().chain([&scratch]).enumerate() {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join(format!("f{index}")), "").unwrap();
        }
        let target = below("t".to_owned());
        room.settle();
        let guest = on_linux(kernel);
        let without = overlay(stack.clone(), None, target.clone());
        guest.combine(&without).await.unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), stack.len());
        guest.separate(&target).await.unwrap();
        room.assert_clean();
        let with = overlay(stack, Some(scratch), target.clone());
        guest.combine(&with).await.unwrap();
        fs::write(target.join("new"), "").unwrap();
        guest.separate(&target).await.unwrap();
        assert_eq!(room.mounts(), []);
    }
}

#[tokio::test]
async fn root_layers_are_devices_and_go_after_their_overlay() {
    for kernel in KERNELS {
        let mut room = Room::new();
        let devices = [Image::Erofs, Image::Squashfs, Image::Ext4]
            .map(|image| Loop::new(&image.copy(room.path())));
        room.settle();
        let guest = on_linux(kernel);
        for (index, device) in devices.iter().enumerate() {
            let access: &[&str] = if index == 2 { &[] } else { &["ro"] };
            mount(&guest, device, &room.at(format!("m{index}")), access)
                .await
                .unwrap();
        }
        fs::create_dir(room.at("m2/scratch")).unwrap();
        let both = overlay(
            vec![room.at("m0"), room.at("m1")],
            Some(room.at("m2/scratch")),
            room.at("root"),
        );
        guest.combine(&both).await.unwrap();
        assert_eq!(fs::read_to_string(room.at("root/hello")).unwrap(), "erofs");
        fs::write(room.at("root/hello"), "changed").unwrap();
        refused(
            guest
                .separate(&room.at("m9"))
                .await
                .and(guest.combine(&both).await),
            ErrorKind::Conflict,
        );
        guest.separate(&room.at("root")).await.unwrap();
        for index in [2, 1, 0] {
            guest.unmount(&room.at(format!("m{index}"))).await.unwrap();
        }
        room.assert_clean();
    }
}

#[tokio::test]
async fn root_g18_a_failed_overlay_removes_only_what_it_made() {
    for kernel in KERNELS {
        let mut room = Room::new();
        let stack = layers(&room, 2);
        fs::create_dir_all(room.at("fresh")).unwrap();
        fs::create_dir_all(room.at("half/upper/data")).unwrap();
        fs::create_dir_all(room.at("broken")).unwrap();
        fs::write(room.at("broken/work"), "").unwrap();
        fs::create_dir(room.at("full")).unwrap();
        fs::write(room.at("full/x"), "").unwrap();
        room.settle();
        let guest = on_linux(kernel);
        // The same layer twice is refused by the kernel, after everything was prepared.
        let twice = vec![stack[0].clone(), stack[0].clone()];
        for scratch in ["fresh", "half"] {
            let bad = overlay(twice.clone(), Some(room.at(scratch)), room.at("x/root"));
            refused(guest.combine(&bad).await, ErrorKind::Invalid);
            room.assert_clean();
        }
        let cases = [
            (vec![], None, "x/root", ErrorKind::Invalid),
            (vec![room.at("none")], None, "x/root", ErrorKind::NotFound),
            (vec![room.at("l0/who")], None, "x/root", ErrorKind::Invalid),
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
            let bad = overlay(layers, scratch.map(|name| room.at(name)), room.at(target));
            refused(guest.combine(&bad).await, kind);
            room.assert_clean();
        }
        let bad = overlay(stack.clone(), None, PathBuf::from("/etc/x"));
        refused(guest.combine(&bad).await, ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn root_one_scratch_takes_the_changes_of_one_overlay() {
    let room = Room::new();
    let stack = layers(&room, 2);
    fs::create_dir(room.at("scratch")).unwrap();
    let guest = guest();
    let one = overlay(stack.clone(), Some(room.at("scratch")), room.at("one"));
    let other = overlay(stack, Some(room.at("scratch/../scratch")), room.at("other"));
    guest.combine(&one).await.unwrap();
    refused(guest.combine(&other).await, ErrorKind::Conflict);
    assert!(room.at("scratch/upper").exists() && !room.at("other").exists());
    guest.separate(&room.at("one")).await.unwrap();
    guest.combine(&other).await.unwrap();
    guest.separate(&room.at("other")).await.unwrap();
}

#[tokio::test]
async fn root_the_mark_and_the_look_of_the_root() {
    let room = Room::new();
    let stack = layers(&room, 1);
    fs::create_dir(room.at("scratch")).unwrap();
    fs::set_permissions(&stack[0], fs::Permissions::from_mode(0o1751)).unwrap();
    std::os::unix::fs::chown(&stack[0], Some(12), Some(34)).unwrap();
    let guest = builder().overlay_mark("a mark of ours").build();
    let with = overlay(stack, Some(room.at("scratch")), room.at("root"));
    guest.combine(&with).await.unwrap();
    assert_eq!(mount_at(&room.at("root")).source, "a mark of ours");
    let look = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    assert_eq!(look(&room.at("root")), (0o1751, 12, 34));
    let open = fs::File::open(room.at("root/who")).unwrap();
    refused(guest.separate(&room.at("root")).await, ErrorKind::Busy);
    drop(open);
    guest.separate(&room.at("root")).await.unwrap();
}

/// A link in the scratch image to a directory outside, in place of each directory that the engine opens or makes.
#[tokio::test]
async fn root_x03_a_link_in_the_scratch_leads_nowhere() {
    for kernel in KERNELS {
        for link in ["upper", "work", ".", ".."] {
            for is_relative in [false, true] {
                let mut room = Room::new();
                let stack = layers(&room, 1);
                fs::create_dir_all(room.at("outside/c1")).unwrap();
                fs::create_dir_all(room.at("image/deep")).unwrap();
                let scratch = room.at("image/deep/c1");
                // The scratch itself and its parent are links too, as a hostile image has them.
                let (at, to) = match link {
                    "." => (scratch.clone(), "outside/c1"),
                    ".." => (room.at("image/deep"), "outside"),
                    name => (scratch.join(name), "outside"),
                };
                if link == ".." {
                    fs::remove_dir(&at).unwrap();
                } else {
                    fs::create_dir_all(at.parent().unwrap()).unwrap();
                }
                let to = match is_relative {
                    false => room.at(to),
                    true => {
                        let depth = at.strip_prefix(room.path()).unwrap().iter().count() - 1;
                        Path::new(&"../".repeat(depth)).join(to)
                    }
                };
                std::os::unix::fs::symlink(&to, &at).unwrap();
                assert!(at.canonicalize().unwrap().starts_with(room.at("outside")));
                room.settle();
                let guest = on_linux(kernel);
                let combined = guest
                    .combine(&overlay(stack, Some(scratch), room.at("root")))
                    .await;
                refused(combined, ErrorKind::Invalid);
                let outside = fs::read_dir(room.at("outside")).unwrap();
                let names: Vec<_> = outside.map(|entry| entry.unwrap().file_name()).collect();
                assert_eq!(names, ["c1"], "{link} on {kernel:?}");
                assert_eq!(fs::read_dir(room.at("outside/c1")).unwrap().count(), 0);
                room.assert_clean();
            }
        }
    }
}
