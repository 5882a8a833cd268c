//! How mounts spread: as asked for, also below a shared mount, and a failure takes the mount back.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use crate::kit::{Image, KERNELS, Loop, TestDir, mount, mount_at, on_linux, run, umount};
use blockmount::Mounter;

/// A mount of tmpfs at `at`, shared or private, gone with the value.
struct Parent(String);

impl Parent {
    fn new(dir: &TestDir, mode: &str) -> Self {
        let at = dir.at("parent");
        std::fs::create_dir(&at).unwrap();
        let at = at.to_str().unwrap().to_owned();
        run("mount", &["-t", "tmpfs", "parent", &at]);
        run("mount", &[&format!("--make-{mode}"), &at]);
        Parent(at)
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        // Where it is shared, it is busy while a process that has copied this one's mounts is in the copy.
        umount(&self.0);
        std::fs::remove_dir(&self.0).unwrap();
    }
}

#[tokio::test]
async fn root_each_mode_holds_below_private_and_shared_parents() {
    for kernel in KERNELS {
        for parent in ["private", "shared"] {
            for mode in [
                "private",
                "shared",
                "slave",
                "unbindable",
                "rprivate",
                "rshared",
                "rslave",
                "runbindable",
            ] {
                let mut dir = TestDir::new();
                let device = Loop::new(&Image::Erofs.copy(dir.path()));
                dir.settle();
                let tmpfs = Parent::new(&dir, parent);
                let guest = on_linux(kernel);
                let target = dir.at("parent/a/mnt");
                mount(&guest, &device, &target, &["ro", mode])
                    .await
                    .unwrap();
                let tags = mount_at(&target).propagation;
                let has = |tag: &str| tags.iter().any(|found| found.starts_with(tag));
                match mode.trim_start_matches('r') {
                    "private" => assert!(tags.is_empty(), "{mode} below {parent}: {tags:?}"),
                    "shared" => assert!(has("shared:"), "{mode} below {parent}: {tags:?}"),
                    "unbindable" => assert_eq!(tags, ["unbindable"], "{mode} below {parent}"),
                    _ => assert!(
                        !has("shared:") && !has("unbindable"),
                        "{mode} below {parent}: {tags:?}"
                    ),
                }
                guest.unmount(&target).await.unwrap();
                drop(tmpfs);
                dir.assert_clean();
            }
        }
    }
}
