//! The lists that containerd's erofs snapshotter makes, and what is planned for each.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blockmount_containerd::{Action, Image, Mount, Plan, Step, plan};

const ROOT: &str = "/run/blockmount/web";
const WRITABLE: &str = "/snapshots/9/rwlayer.img";

fn planned(list: &[Mount]) -> Plan {
    plan(list, Path::new(ROOT)).unwrap()
}

fn layer(number: usize) -> Mount {
    Mount::new("erofs", format!("/snapshots/{number}/layer.erofs"))
        .option("ro")
        .option("loop")
}

/// The file that an active snapshot is written to.
fn writable() -> Mount {
    Mount::new("mkfs/ext4", WRITABLE)
        .option("rw")
        .option("loop")
        .option("X-containerd.mkfs.fs=ext4")
        .option("X-containerd.mkfs.size=64MiB")
}

fn image(step: &Step) -> &Image {
    match &step.action {
        Action::Image(image) => image,
        other => panic!("{other:?}"),
    }
}

/// One line for each step, as a reader would say it.
fn said(plan: &Plan) -> Vec<String> {
    let line = |step: &Step| {
        let made: String = step
            .directories
            .iter()
            .map(|directory| format!("mkdir {} {:o}; ", directory.place, directory.mode))
            .collect();
        let done = match &step.action {
            Action::Image(image) => {
                let kind = image.filesystem.as_deref().unwrap_or("device");
                let access = if image.read_only { "ro" } else { "rw" };
                let create = image.create.as_ref();
                let create = create.map(|new| format!(", {} of {}", new.filesystem, new.bytes));
                let devices: String = image
                    .devices
                    .iter()
                    .map(|device| format!(" + {}", device.display()))
                    .collect();
                let path = image.path.display();
                format!(
                    "{kind} {access} {path}{devices}{}",
                    create.unwrap_or_default()
                )
            }
            Action::Bind(bind) => {
                let access = if bind.read_only { "ro" } else { "rw" };
                format!("bind {access} {}", bind.source)
            }
            Action::Overlay(overlay) => {
                let lower: Vec<String> = overlay.lower.iter().map(ToString::to_string).collect();
                let scratch = overlay.scratch.as_ref();
                let scratch =
                    scratch.map(|scratch| format!("; {}, {}", scratch.upper, scratch.work));
                format!(
                    "overlay {}{}",
                    lower.join(", "),
                    scratch.unwrap_or_default()
                )
            }
        };
        format!("{made}{done}")
    };
    plan.steps.iter().map(line).collect()
}

#[test]
fn an_active_snapshot_is_layers_below_a_file_that_is_made() {
    let overlay = Mount::new("format/mkdir/overlay", "overlay")
        .option("X-containerd.mkdir.path={{ mount 0 }}/upper:0755")
        .option("X-containerd.mkdir.path={{ mount 0 }}/work:0755")
        .option("workdir={{ mount 0 }}/work")
        .option("upperdir={{ mount 0 }}/upper")
        .option("lowerdir={{ overlay 1 3 }}");
    let plan = planned(&[writable(), layer(3), layer(2), layer(1), overlay]);
    let expected = [
        "ext4 rw /snapshots/9/rwlayer.img, ext4 of 67108864",
        "erofs ro /snapshots/3/layer.erofs",
        "erofs ro /snapshots/2/layer.erofs",
        "erofs ro /snapshots/1/layer.erofs",
        "mkdir \"upper\" in mount 0 755; mkdir \"work\" in mount 0 755; \
         overlay mount 1, mount 2, mount 3; \"upper\" in mount 0, \"work\" in mount 0",
    ];
    assert_eq!(said(&plan), expected);
    assert_eq!(plan.system, []);
    let last = plan.steps.last().unwrap();
    assert_eq!(last.mount_point, Path::new("/run/blockmount/web/4"));
    assert_eq!(last.mount.kind, "overlay");
    // As the caller is told that it is mounted: without templates, and without what containerd's options asked for.
    let options = [
        "workdir=/run/blockmount/web/0/work",
        "upperdir=/run/blockmount/web/0/upper",
        "lowerdir=/run/blockmount/web/1:/run/blockmount/web/2:/run/blockmount/web/3",
    ];
    assert_eq!(last.mount.options, options);
    assert_eq!(plan.steps[0].mount.options, ["rw", "loop"]);

    let scratch = image(&plan.steps[0]);
    assert!(!scratch.disk().is_read_only());
    let options = scratch.options().unwrap().build().unwrap();
    assert_eq!(options.format().unwrap().filesystem, "ext4");
    assert!(!options.is_read_only());
    let options = image(&plan.steps[1]).options().unwrap().build().unwrap();
    assert_eq!(
        (options.filesystem(), options.is_read_only()),
        (Some("erofs"), true)
    );
}

#[test]
fn an_active_snapshot_without_parents_is_a_directory_of_the_file() {
    let bind = Mount::new("format/mkdir/bind", "{{ mount 0 }}/upper")
        .option("X-containerd.mkdir.path={{ mount 0 }}/upper:0755")
        .option("rw")
        .option("rbind");
    let plan = planned(&[writable(), bind]);
    let expected = [
        "ext4 rw /snapshots/9/rwlayer.img, ext4 of 67108864",
        "mkdir \"upper\" in mount 0 755; bind rw \"upper\" in mount 0",
    ];
    assert_eq!(said(&plan), expected);
}

#[test]
fn a_view_of_one_layer_is_that_layer() {
    assert_eq!(
        said(&planned(&[layer(1)])),
        ["erofs ro /snapshots/1/layer.erofs"]
    );
    let bind = Mount::new("format/bind", "{{ mount 0 }}")
        .option("ro")
        .option("rbind");
    let expected = ["erofs ro /snapshots/1/layer.erofs", "bind ro mount 0"];
    assert_eq!(said(&planned(&[layer(1), bind])), expected);
}

#[test]
fn a_view_of_several_layers_is_an_overlay_that_cannot_be_written() {
    for (template, lower) in [
        ("{{ overlay 0 1 }}", "mount 0, mount 1"),
        ("{{ overlay 1 0 }}", "mount 1, mount 0"),
        (
            "{{ mount 1 }}:{{ mount 0 }}/a\\:b",
            "mount 1, \"a:b\" in mount 0",
        ),
    ] {
        let overlay = Mount::new("format/mkdir/overlay", "overlay")
            .option(format!("lowerdir={template}"))
            .option("index=off");
        let plan = planned(&[layer(2), layer(1), overlay]);
        assert_eq!(said(&plan)[2], format!("overlay {lower}"));
        let Action::Overlay(overlay) = &plan.steps[2].action else {
            panic!()
        };
        assert_eq!(overlay.options, ["index=off"]);
    }
}

#[test]
fn merged_metadata_brings_the_files_that_it_refers_to_in_order() {
    let merged = Mount::new("erofs", "/snapshots/9/fsmeta.erofs")
        .option("ro")
        .option("loop")
        .option("device=/snapshots/1/layer.erofs")
        .option("device=/snapshots/2/layer.erofs");
    let plan = planned(&[merged]);
    let expected =
        "erofs ro /snapshots/9/fsmeta.erofs + /snapshots/1/layer.erofs + /snapshots/2/layer.erofs";
    assert_eq!(said(&plan), [expected]);
    let disks: Vec<_> = image(&plan.steps[0]).further_disks().collect();
    assert_eq!(disks.len(), 2);
    assert!(disks.iter().all(blockmount::Disk::is_read_only));
    // They are disks now, and no option of the filesystem.
    assert!(image(&plan.steps[0]).options.is_empty());
}

#[test]
fn a_verified_layer_names_the_file_with_its_root_digest() {
    let sealed = layer(1).option("X-containerd.dmverity=/snapshots/1/layer.erofs.dmverity");
    let plan = planned(&[sealed]);
    let verity = image(&plan.steps[0]).verity.as_deref();
    assert_eq!(verity, Some(Path::new("/snapshots/1/layer.erofs.dmverity")));
}

#[test]
fn a_loop_is_a_device_that_a_later_mount_takes() {
    for source in ["{{ mount 0 }}", "{{ source 0 }}"] {
        let made = Mount::new("mkfs/loop", "/data/fs.img")
            .option("X-containerd.mkfs.size=1GiB")
            .option("X-containerd.mkfs.fs=xfs");
        let plan = planned(&[made, Mount::new("format/xfs", source)]);
        let expected = [
            "device rw /data/fs.img, xfs of 1073741824",
            "xfs rw /data/fs.img",
        ];
        // By the mount point the disk is known; by the source only the file is, which is there by then.
        let said = said(&plan);
        assert_eq!(said[0], expected[0]);
        assert!(said[1].starts_with(expected[1]), "{said:?}");
    }
}

#[test]
fn what_is_not_ours_is_handed_back_with_all_behind_it() {
    let bind = Mount::new("bind", "/etc/hosts").option("rbind");
    let plan = planned(&[bind.clone(), layer(1)]);
    assert_eq!((plan.steps.len(), plan.system), (0, vec![bind, layer(1)]));

    // The first is told where the mounts before it are; its other transforms are the caller's.
    let other = Mount::new("format/mkdir/virtiofs", "tag").option("upper={{ mount 0 }}");
    let tmpfs = Mount::new("tmpfs", "tmpfs");
    let plan = planned(&[layer(1), other, tmpfs.clone()]);
    assert_eq!(plan.steps.len(), 1);
    let filled = Mount::new("mkdir/virtiofs", "tag").option("upper=/run/blockmount/web/0");
    assert_eq!(plan.system, [filled, tmpfs]);
    // An unknown transform is somebody else's, too.
    assert_eq!(planned(&[Mount::new("wonder/erofs", "/a")]).system.len(), 1);
}
