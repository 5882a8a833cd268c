//! Many devices at once, and one more than there may be.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

use crate::common::Bench;
use blockmount::placement::SlotUse;
use blockmount::{Disk, ErrorKind, Resolver, Transport};
use blockmount_loopback::LoopResolver;

fn images(bench: &Bench, count: u32) -> Vec<Disk> {
    let image = |index| bench.image(&format!("{index}.img"), 4096 * (1 + u64::from(index)));
    (0..count)
        .map(|index| Disk::virtual_disk(image(index)))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_sixty_four_at_once_are_each_attached_once_and_gone_again() {
    let bench = Bench::new();
    let transport = bench.transport();
    let disks = images(&bench, 64);
    let attaching = disks.iter().cloned().map(|disk| {
        let transport = transport.clone();
        tokio::spawn(async move {
            let locator = transport.attach_identified(&disk).await.unwrap();
            let device = LoopResolver.resolve(&locator).await.unwrap().path;
            // The size tells whose device it is.
            let name = device.file_name().unwrap().to_str().unwrap().to_owned();
            let sectors = std::fs::read_to_string(format!("/sys/block/{name}/size")).unwrap();
            let bytes = disk.source().metadata().unwrap().size();
            assert_eq!(sectors.trim().parse::<u64>().unwrap() * 512, bytes);
            locator
        })
    });
    let mut locators = HashSet::new();
    for attach in attaching.collect::<Vec<_>>() {
        assert!(
            locators.insert(attach.await.unwrap()),
            "two disks have one locator"
        );
    }
    assert_eq!(bench.bound().len(), 64);
    let slots: Vec<_> = transport
        .map()
        .iter()
        .map(|entry| (entry.slot, entry.usage))
        .collect();
    assert_eq!(
        slots,
        (0..64)
            .map(|slot| (slot, SlotUse::Occupied))
            .collect::<Vec<_>>()
    );

    let detaching = disks.into_iter().map(|disk| {
        let transport = transport.clone();
        tokio::spawn(async move { transport.detach(&disk).await })
    });
    for detach in detaching.collect::<Vec<_>>() {
        detach.await.unwrap().unwrap();
    }
    assert_eq!((transport.map(), bench.bound()), (vec![], vec![]));
}

async fn one_too_many(bench: &Bench, transport: blockmount_loopback::LoopTransport) {
    let count = u32::try_from(transport.max_devices()).unwrap();
    let disks = images(bench, count + 1);
    let (last, fitting) = disks.split_last().unwrap();
    for disk in fitting {
        transport.attach_identified(disk).await.unwrap();
    }
    let before = (transport.map(), bench.bound());
    let error = transport.attach_identified(last).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(error.message().contains(&count.to_string()), "{error}");
    assert_eq!((transport.map(), bench.bound()), before);

    transport.detach(&fitting[0]).await.unwrap();
    transport.attach_identified(last).await.unwrap();
    assert_eq!(
        transport.map()[0].source,
        last.source(),
        "the free slot was not used"
    );
    for disk in &disks {
        transport.detach(disk).await.unwrap();
    }
    assert_eq!(bench.bound(), []);
}

#[tokio::test]
async fn root_the_third_of_two_is_refused() {
    let bench = Bench::new();
    one_too_many(&bench, bench.builder().max_devices(2).build().unwrap()).await;
}

#[tokio::test]
async fn root_the_257th_is_refused() {
    let bench = Bench::new();
    one_too_many(&bench, bench.transport()).await;
}
