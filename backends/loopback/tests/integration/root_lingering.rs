//! Loop devices that are kept after their last release, and files that change meanwhile.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::common::Bench;
use blockmount::{Attachment, Disk, Linger, Manager, Resolver};
use blockmount_loopback::{LoopResolver, LoopUnplugger};

/// Times of files are believed to differ once they are older than this.
const A_WHILE: Duration = Duration::from_millis(2_200);

/// Tells one binding of a loop device from the next, also on one number; and the first byte of the disk.
async fn told_by(attachment: &Attachment) -> (String, u8) {
    let node = LoopResolver
        .resolve(attachment.locator())
        .await
        .unwrap()
        .path;
    let name = node.file_name().unwrap();
    let sequence = Path::new("/sys/block").join(name).join("diskseq");
    let mut first = [0];
    fs::File::open(&node)
        .unwrap()
        .read_exact_at(&mut first, 0)
        .unwrap();
    (fs::read_to_string(sequence).unwrap(), first[0])
}

async fn pass(manager: &Manager, image: &Path) -> (String, u8) {
    let disk = Disk::virtual_disk(image).read_only();
    let attachment = manager.attach(&disk).await.unwrap();
    let told = told_by(&attachment).await;
    attachment.release().await.unwrap();
    told
}

#[tokio::test]
async fn root_a_disk_is_kept_until_its_file_has_changed() {
    let bench = Bench::new();
    let [changed, replaced, other] =
        ["changed.img", "replaced.img", "other.img"].map(|name| bench.image(name, 1 << 20));
    fs::write(&other, [2; 1 << 20]).unwrap();
    let linger = Linger {
        at_most: Duration::from_secs(600),
        how_many: 4,
    };
    let manager = Manager::builder().transport(bench.transport());
    let manager = manager
        .unplugger(LoopUnplugger::default())
        .linger(linger)
        .build();
    pass(&manager, &changed).await;
    assert_eq!(
        bench.bound(),
        [],
        "what was made a moment ago has no version yet"
    );
    tokio::time::sleep(A_WHILE).await;
    for image in [&changed, &replaced] {
        let first = pass(&manager, image).await;
        assert_eq!(pass(&manager, image).await, first, "it is the same binding");
        assert_eq!(first.1, 0);
    }
    assert_eq!(bench.bound().len(), 2);
    let before = pass(&manager, &changed).await;
    let file = fs::OpenOptions::new().write(true).open(&changed).unwrap();
    file.write_all_at(&[1], 0).unwrap();
    let after = pass(&manager, &changed).await;
    assert!(
        after.1 == 1 && after.0 != before.0,
        "{before:?} and {after:?}"
    );
    fs::rename(&other, &replaced).unwrap();
    assert_eq!(pass(&manager, &replaced).await.1, 2);
    assert_eq!(bench.bound(), [], "neither has a version yet");
    assert!(manager.drain().await.is_clean());
}
