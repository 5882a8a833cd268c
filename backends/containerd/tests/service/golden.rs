//! The lists that containerd's erofs snapshotter makes, performed.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use blockmount::ErrorKind;
use blockmount_containerd::{Mount, PerformError, Performed, perform};

use crate::kit::{Machine, layer, overlay, read, writable};
use crate::merged_erofs::{self, Merged};

async fn done(machine: &Machine, list: &[Mount]) -> Performed {
    let manager = machine.manager().await;
    let plan = machine.plan(list, "one");
    perform(&manager, &plan, "one").await.unwrap()
}

/// Where the last mount of a list is.
fn tree(performed: &Performed) -> &Path {
    performed.points().last().unwrap()
}

#[tokio::test]
async fn root_an_active_snapshot_is_written_to_and_keeps_its_layers() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base"), ("b", "base")]);
    let app = machine.erofs("app", &[("b", "app")]);
    let image = machine.at("rw.img");
    let list = [writable(&image), layer(&app), layer(&base), overlay(2)];
    let performed = done(&machine, &list).await;
    assert_eq!(tree(&performed), machine.root().join("one/3"));
    assert_eq!(read(tree(&performed).join("a")), "base");
    assert_eq!(read(tree(&performed).join("b")), "app");
    fs::write(tree(&performed).join("b"), "written").unwrap();
    let upper = performed.points()[0].join("upper");
    assert_eq!(upper.metadata().unwrap().mode() & 0o7777, 0o755);
    assert_eq!(read(upper.join("b")), "written");
    assert_eq!(read(performed.points()[1].join("b")), "app");
    performed.release().await.unwrap();
    machine.assert_clean();

    // The snapshot is there still.
    let performed = done(&machine, &list).await;
    assert_eq!(read(tree(&performed).join("b")), "written");
    performed.release().await.unwrap();
    machine.assert_clean();
}

#[tokio::test]
async fn root_an_active_snapshot_without_parents_is_a_directory_of_the_file() {
    let machine = Machine::new();
    let bind = Mount::new("format/mkdir/bind", "{{ mount 0 }}/upper")
        .option("X-containerd.mkdir.path={{ mount 0 }}/upper:0750:7:8")
        .option("rw")
        .option("rbind");
    let list = [writable(&machine.at("rw.img")), bind];
    let performed = done(&machine, &list).await;
    fs::write(tree(&performed).join("file"), "written").unwrap();
    let seen = tree(&performed).metadata().unwrap();
    assert_eq!(
        (seen.mode() & 0o7777, seen.uid(), seen.gid()),
        (0o750, 7, 8)
    );
    assert_eq!(read(performed.points()[0].join("upper/file")), "written");
    performed.release().await.unwrap();
    machine.assert_clean();
}

#[tokio::test]
async fn root_a_view_is_read_only() {
    let machine = Machine::new();
    let [one, two] = ["one", "two"].map(|name| machine.erofs(name, &[("a", name), (name, name)]));
    let bind = Mount::new("format/bind", "{{ mount 0 }}")
        .option("ro")
        .option("rbind");
    let over = |lower: &str| Mount::new("format/mkdir/overlay", "overlay").option(lower);
    for (list, a) in [
        (vec![layer(&one)], "one"),
        (vec![layer(&two), bind], "two"),
        (
            vec![layer(&two), layer(&one), over("lowerdir={{ overlay 0 1 }}")],
            "two",
        ),
        (
            vec![layer(&two), layer(&one), over("lowerdir={{ overlay 1 0 }}")],
            "one",
        ),
        (vec![layer(&two), over("lowerdir={{ mount 0 }}")], "two"),
    ] {
        let performed = done(&machine, &list).await;
        assert_eq!(read(tree(&performed).join("a")), a, "{list:?}");
        let error = fs::write(tree(&performed).join("new"), "").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        performed.release().await.unwrap();
        machine.assert_clean();
    }
}

#[tokio::test]
async fn root_merged_metadata_has_the_files_of_its_images() {
    let machine = Machine::new();
    let contents = ["1", "2"].map(|byte| byte.repeat(4096));
    let names = ["first", "second"];
    let image = |index: usize| machine.erofs(names[index], &[(names[index], &contents[index])]);
    let images = [image(0), image(1)];
    let files = [0, 1].map(|index| Merged {
        name: names[index],
        image: index,
        content: contents[index].as_bytes(),
    });
    let merged = machine.at("merged.erofs");
    merged_erofs::write(&merged, &[&images[0], &images[1]], &files, true);
    let devices = images.iter().fold(layer(&merged), |mount, image| {
        mount.option(format!("device={}", image.display()))
    });
    let performed = done(&machine, &[devices]).await;
    for (name, content) in names.iter().zip(&contents) {
        assert_eq!(&read(tree(&performed).join(name)), content);
    }
    performed.release().await.unwrap();
    machine.assert_clean();
}

#[tokio::test]
async fn root_a_loop_is_a_device_until_a_later_mount_takes_it() {
    let machine = Machine::new();
    let image = machine.at("fs.img");
    let made = Mount::new("mkfs/loop", image.to_str().unwrap())
        .option("X-containerd.mkfs.size=16MiB")
        .option("X-containerd.mkfs.fs=ext4");
    let performed = done(&machine, std::slice::from_ref(&made)).await;
    let device = performed.points()[0].metadata().unwrap();
    assert!(device.file_type().is_block_device());
    performed.release().await.unwrap();
    machine.assert_clean();
    for source in ["{{ mount 0 }}", "{{ source 0 }}"] {
        fs::remove_file(&image).unwrap();
        let list = [made.clone(), Mount::new("format/ext4", source)];
        let performed = done(&machine, &list).await;
        assert_eq!(performed.points()[0], Path::new(""));
        fs::write(tree(&performed).join("file"), "written").unwrap();
        performed.release().await.unwrap();
        machine.assert_clean();
    }
}

#[tokio::test]
async fn root_what_fails_leaves_no_mount_no_device_and_no_file() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let (image, other) = (machine.at("rw.img"), machine.at("other.img"));
    fs::write(machine.at("noise.erofs"), [7; 8192]).unwrap();
    fs::write(machine.at("x.dmverity"), "{}").unwrap();
    let sealed = layer(&base).option(format!(
        "X-containerd.dmverity={}",
        machine.at("x.dmverity").display()
    ));
    let mkdir = Mount::new("format/mkdir/bind", "{{ mount 0 }}/a/b")
        .option("X-containerd.mkdir.path={{ mount 0 }}/a/b");
    let option = Mount::new("format/overlay", "overlay")
        .option("lowerdir={{ mount 1 }}")
        .option("wonder=on");
    for (list, kind, said) in [
        (
            vec![
                writable(&image),
                layer(&machine.at("none.erofs")),
                overlay(1),
            ],
            ErrorKind::NotFound,
            "mount 2",
        ),
        (
            vec![
                writable(&image),
                layer(&machine.at("noise.erofs")),
                overlay(1),
            ],
            ErrorKind::Invalid,
            "mount 2",
        ),
        (
            vec![writable(&image), writable(&other), sealed],
            ErrorKind::Invalid,
            "mount 2",
        ),
        (
            vec![writable(&image), mkdir],
            ErrorKind::NotFound,
            "mount 1",
        ),
        (
            vec![writable(&image), layer(&base), option],
            ErrorKind::Invalid,
            "mount 2",
        ),
        (
            vec![writable(&image), writable(&machine.at("no/such.img"))],
            ErrorKind::NotFound,
            "mount 1",
        ),
    ] {
        let manager = machine.manager().await;
        let plan = machine.plan(&list, "one");
        let error = perform(&manager, &plan, "one").await.unwrap_err();
        let found = match &error {
            PerformError::Failed { error_kind, .. } => *error_kind,
            _ => ErrorKind::Invalid,
        };
        assert_eq!(found, kind, "{list:?}: {error:?}");
        assert!(error.to_string().contains(said), "{list:?}: {error}");
        assert!(!image.exists() && !other.exists(), "{list:?}");
        assert!(manager.drain().await.is_clean());
        machine.assert_clean();
    }
}
