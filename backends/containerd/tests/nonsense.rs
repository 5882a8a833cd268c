//! Lists that make no sense: which mount is named, and why.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blockmount_containerd::{InvalidMount, MAX_MOUNTS, Mount, plan};
use proptest::prelude::*;

const ROOT: &str = "/run/x";

fn refused(list: &[Mount]) -> InvalidMount {
    plan(list, Path::new(ROOT)).unwrap_err()
}

fn layer() -> Mount {
    Mount::new("erofs", "/a.erofs").option("loop")
}

fn overlay(options: &[&str]) -> Mount {
    let mount = Mount::new("format/mkdir/overlay", "overlay");
    options
        .iter()
        .fold(mount, |mount, option| mount.option(*option))
}

#[test]
fn each_mount_that_makes_no_sense_is_named_with_the_reason() {
    let made = |options: &[&str]| {
        let mount = Mount::new("mkfs/ext4", "/a.img");
        options
            .iter()
            .fold(mount, |mount, option| mount.option(*option))
    };
    let size = "X-containerd.mkfs.size=1MiB";
    for (mount, reason) in [
        (
            overlay(&["lowerdir={{ overlay 0 7 }}"]),
            "names mount 7; those before are 0 to 0",
        ),
        // Itself.
        (overlay(&["lowerdir={{ mount 1 }}"]), "names mount 1"),
        (
            overlay(&["lowerdir=/run/x/1"]),
            "below no mount that comes before",
        ),
        (
            overlay(&["lowerdir={{ mount 0 }}/../.."]),
            "leads out of mount 0",
        ),
        (
            overlay(&["lowerdir={{ mount 0 }}:/etc"]),
            "\"/etc\" is on the host",
        ),
        (overlay(&["upperdir={{ mount 0 }}/u"]), "need each other"),
        (
            overlay(&[
                "lowerdir={{ mount 0 }}",
                "upperdir={{ mount 0 }}/u",
                "workdir={{ mount 0 }}/u/w",
            ]),
            "two directories beside each other",
        ),
        (
            overlay(&["lowerdir={{ mount 0 }}", "X-containerd.mkdir.path=/etc/x"]),
            "not in what an earlier mount has",
        ),
        (
            overlay(&[
                "lowerdir={{ mount 0 }}",
                "X-containerd.mkdir.path={{ mount 0 }}/x:0999",
            ]),
            "no octal permissions",
        ),
        (
            overlay(&[
                "lowerdir={{ mount 0 }}",
                "X-containerd.mkdir.path={{ mount 0 }}/x:0755:0",
            ]),
            "a user without a group",
        ),
        (
            overlay(&["lowerdir={{ mount 0 }}", "X-containerd.mkfs.size=1"]),
            "is unknown here",
        ),
        (
            Mount::new("format/ext4", "{{ mount 0 }}"),
            "the source is mount 0, in the guest",
        ),
        (
            Mount::new("ext4", "{{ source 0 }}"),
            "must begin with format/",
        ),
        (Mount::new("ext4", "a.img"), "is no absolute path"),
        (Mount::new("erofs", "/a\n.erofs"), "has a control character"),
        (layer().option("ro\nsuid"), "has a control character"),
        (layer().option("X-containerd.wonder=1"), "is unknown here"),
        (made(&[]), "mkfs/ needs X-containerd.mkfs.size"),
        (made(&["X-containerd.mkfs.size=big"]), "is no size"),
        (made(&["X-containerd.mkfs.size=0"]), "is no size"),
        (
            made(&[size, "X-containerd.mkfs.fs=btrfs"]),
            "cannot be made",
        ),
        (
            made(&[size, "X-containerd.mkfs.fs=xfs"]),
            "mkfs/ makes xfs, and ext4 is mounted",
        ),
        (made(&[size, "X-containerd.mkfs.uuid=1"]), "is no UUID"),
        (
            made(&[size, "X-containerd.mkfs.speed=1"]),
            "mkfs.speed=1 is unknown",
        ),
        (made(&[size, "ro"]), "and it is mounted read-only"),
        (
            made(&[size, "X-containerd.dmverity=/v"]),
            "what is verified cannot be written",
        ),
    ] {
        let refused = refused(&[layer(), mount.clone()]);
        assert_eq!((refused.index, &refused.kind), (1, &mount.kind));
        assert!(refused.reason.contains(reason), "{mount:?}: {refused}");
    }
}

#[test]
fn lists_have_a_limit_in_mounts_and_in_bytes() {
    let many = vec![layer(); 10_000];
    assert!(refused(&many).reason.contains("10000 mounts"));
    assert!(plan(&many[..MAX_MOUNTS], Path::new(ROOT)).is_ok());
    let long = layer().option("x".repeat(1 << 20));
    assert!(refused(&[long]).reason.contains("bytes"));
    let growing = overlay(&[&format!("lowerdir={}", "{{ overlay 0 999 }}".repeat(1_000))]);
    let mut list = vec![layer(); 1_000];
    list.push(growing);
    assert!(refused(&list).reason.contains("becomes longer"));
}

#[test]
fn an_error_is_one_line_with_the_number_and_the_type() {
    let error = refused(&[Mount::new("ext4", "x")]).to_string();
    assert_eq!(
        error,
        "mount 0 of the list (\"ext4\"): \"x\" is no absolute path"
    );
}

proptest! {
    #[test]
    fn any_list_is_planned_or_refused(
        list in prop::collection::vec(
            (
                "(format/|mkdir/|mkfs/){0,3}(erofs|ext4|loop|bind|overlay|tmpfs)",
                "(/a|\\{\\{ ?(mount|source|overlay|target) -?[0-3] ?[0-3]? ?\\}\\}(/[a.]{0,2})?)",
                prop::collection::vec(
                    "(lowerdir=|upperdir=|workdir=|device=|X-containerd\\.(mkdir\\.path|mkfs\\.size|mkfs\\.fs|dmverity)=)?\
                     (\\{\\{ ?(mount|overlay) [0-3] ?[0-3]? ?\\}\\}|[a-z0-9:/. \\\\]{0,5}){0,2}",
                    0..4,
                ),
            ),
            0..5,
        ),
    ) {
        let list: Vec<Mount> = list
            .into_iter()
            .map(|(kind, source, options)| Mount { kind, source, options, ..Mount::default() })
            .collect();
        match plan(&list, Path::new(ROOT)) {
            Ok(plan) => {
                prop_assert_eq!(plan.steps.len() + plan.system.len(), list.len());
                let written = serde_json::to_string(&plan).unwrap();
                prop_assert_eq!(serde_json::from_str::<blockmount_containerd::Plan>(&written).unwrap(), plan);
            }
            Err(error) => prop_assert!(error.index < list.len() && !error.reason.is_empty()),
        }
    }
}
