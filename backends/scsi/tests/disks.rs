//! Disks as text.

use std::ffi::OsStr;

use blockmount::Disk;
use blockmount_scsi::{format_disk, parse_disk};
use proptest::prelude::*;

#[test]
fn the_three_kinds_are_told_apart() {
    for (text, disk) in [
        ("evd://cas/layer", Disk::extensible("cas", "layer")),
        ("evd://cas//abs/path", Disk::extensible("cas", "/abs/path")),
        (
            r"evd://cas/C:\images\a.vhdx",
            Disk::extensible("cas", r"C:\images\a.vhdx"),
        ),
        ("/dev/sdb", Disk::physical_disk("/dev/sdb")),
        (
            "/dev/disk/by-id/x",
            Disk::physical_disk("/dev/disk/by-id/x"),
        ),
        (
            r"\\.\PHYSICALDRIVE1",
            Disk::physical_disk(r"\\.\PHYSICALDRIVE1"),
        ),
        (
            r"\\.\PhysicalDrive12",
            Disk::physical_disk(r"\\.\PhysicalDrive12"),
        ),
        ("/dev/shm/a.img", Disk::virtual_disk("/dev/shm/a.img")),
        ("/devices/a.img", Disk::virtual_disk("/devices/a.img")),
        ("/dev", Disk::virtual_disk("/dev")),
        (r"\\?\C:\a.vhdx", Disk::virtual_disk(r"\\?\C:\a.vhdx")),
        (
            r"\\.\PhysicalDrive",
            Disk::virtual_disk(r"\\.\PhysicalDrive"),
        ),
        (r"C:\a.vhdx", Disk::virtual_disk(r"C:\a.vhdx")),
        ("a b,c:d\ne", Disk::virtual_disk("a b,c:d\ne")),
        ("./x://y", Disk::virtual_disk("./x://y")),
        ("/x://y", Disk::virtual_disk("/x://y")),
    ] {
        assert_eq!(parse_disk(text).unwrap(), disk, "{text}");
        assert_eq!(format_disk(&disk).unwrap(), OsStr::new(text));
    }
}

#[test]
fn what_names_no_disk_is_refused_with_advice() {
    for (text, advice) in [
        ("", "it is empty"),
        ("a\0b", "NUL"),
        ("evd://", "no type"),
        ("evd:///p", "no type"),
        ("evd://t", "no path"),
        ("evd://t/", "no path"),
        (r"evd://t\p", "backslashes"),
        (r"evd://t\p/q", "backslashes"),
        (r"evd:\\t\p", "backslashes"),
        ("EVD://t/p", "the only scheme is evd"),
        ("http://t/p", "the only scheme is evd"),
        ("nbd+unix://t/p", "./ before"),
    ] {
        let error = parse_disk(text).unwrap_err().to_string();
        assert!(
            error.contains(advice) && error.contains("does not name a disk"),
            "{error}"
        );
    }
    let long = parse_disk(format!("evd://{}", "\\".repeat(4_000)))
        .unwrap_err()
        .to_string();
    assert!(long.len() < 512, "{}", long.len());
}

#[test]
fn what_would_read_as_another_disk_is_not_written() {
    for disk in [
        Disk::extensible("a/b", "c"),
        Disk::extensible("", "c"),
        Disk::extensible("a", ""),
        Disk::virtual_disk("/dev/sda"),
        Disk::virtual_disk("evd://a/b"),
        Disk::physical_disk("sda"),
    ] {
        format_disk(&disk).unwrap_err();
    }
}

#[cfg(unix)]
#[test]
fn paths_need_not_be_utf_8() {
    use std::os::unix::ffi::OsStrExt as _;

    let image = OsStr::from_bytes(b"/images/\xff.img");
    assert_eq!(parse_disk(image).unwrap(), Disk::virtual_disk(image));
    let error = parse_disk(OsStr::from_bytes(b"evd://t/\xff"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("UTF-8"), "{error}");
}

proptest! {
    #[test]
    fn what_is_read_is_written_the_same(text in "(evd://|/dev/|)[a-c/\\\\:.]{0,12}") {
        if let Ok(disk) = parse_disk(&text) {
            prop_assert!(!disk.is_read_only());
            prop_assert_eq!(format_disk(&disk).unwrap(), OsStr::new(&text));
        }
    }
}
