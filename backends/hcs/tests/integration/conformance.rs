//! The checks of every contract, over a service in memory; on Windows also through the service's own calls.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount_scsi::testing::AttachIdentified as _;
use std::sync::Arc;

use crate::common::{Answer, Images, Model, SHORT, address};
use blockmount::testing::conformance::{self, GuestFixture, TransportFixture, WithoutGone};
use blockmount::{Disk, Manager, MountOptions, MountRequest, StackRequest};
use blockmount_hcs::documents::PropertyQuery;
use blockmount_hcs::{ComputeSystem, GuestOs, HcsChannel, HcsGuest, ScsiAttacher, VpmemAttacher};
use blockmount_scsi::{Attacher as _, Geometry, ScsiTransport};
use blockmount_vpmem::{Mode, PAGE, VpmemTransport};

type System = Arc<dyn ComputeSystem>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scsi_passes_the_checks_of_a_transport() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        let images = Images::new();
        let disks = images.disks(4);
        std::fs::hard_link(images.path("0.vhdx"), images.path("hard")).unwrap();
        let dotted = images.path("sub");
        std::fs::create_dir(&dotted).unwrap();
        let aliases = [images.path("hard"), dotted.join("..").join("0.vhdx")];
        let attacher = ScsiAttacher::new(system, GuestOs::Linux);
        let geometry = Geometry::new(2, 2).unwrap();
        let transport = ScsiTransport::new(attacher, geometry, &[address("0/0")]).unwrap();
        let fixture = TransportFixture::new(
            disks,
            Disk::virtual_disk(images.path("none.vhdx")),
            model.snapshot(),
        )
        .aliases(aliases.map(Disk::virtual_disk))
        .capacity(3)
        .remove_source(|disk| {
            std::fs::remove_file(disk.source()).unwrap();
        })
        .faults(model.clone());
        let passed = conformance::transport(&transport, &fixture).await;
        println!("{passed}");
        assert!(passed.successes > 20, "{passed}");
        assert_eq!(model.left(), [""; 0]);
        assert!(model.documents().len() > 20, "the service was asked");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vpmem_passes_the_checks_of_a_transport() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        for mode in [Mode::WholeDevices, Mode::Packed] {
            let images = Images::new();
            let disk = |number| images.disk(&format!("{number}.vhd")).read_only();
            let attacher = VpmemAttacher::new(system.clone(), GuestOs::Linux);
            // Device 0 is the root disk's. On each of the others, one of these fits.
            let geometry = blockmount_vpmem::Geometry::new(4, PAGE).unwrap();
            let reserved = [0u64.try_into().unwrap()];
            let transport = VpmemTransport::new(attacher, geometry, mode, &reserved).unwrap();
            let fixture = TransportFixture::new(
                (0..4).map(disk),
                Disk::virtual_disk(images.path("none.vhd")).read_only(),
                model.snapshot(),
            )
            .capacity(3)
            .remove_source(|disk| {
                std::fs::remove_file(disk.source()).unwrap();
            })
            .faults(WithoutGone(model.clone()));
            let passed = conformance::transport(&transport, &fixture).await;
            println!("{passed}");
            assert!(passed.successes > 20, "{passed}");
            assert_eq!(model.left(), [""; 0]);
            let packed = |document: &String| document.contains("/Mappings/");
            let documents = model.documents();
            assert!(documents.len() > 20, "the service was asked");
            assert!(
                documents
                    .iter()
                    .all(|document| packed(document) == (mode == Mode::Packed))
            );
        }
    }
}

/// A transport and a guest of one VM.
async fn both(system: &System) -> (ScsiTransport<ScsiAttacher<System>>, HcsGuest<System>) {
    let attacher = ScsiAttacher::new(system.clone(), GuestOs::Linux);
    let geometry = attacher.geometry();
    let transport = ScsiTransport::new(attacher, geometry, &[]).unwrap();
    let channel = HcsChannel::open(system.clone(), GuestOs::Linux)
        .await
        .unwrap();
    (transport, HcsGuest::new(channel))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_passes_the_checks_of_its_contracts() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        let images = Images::new();
        let (transport, guest) = both(&system).await;
        let fixture = GuestFixture::new(
            transport,
            guest.clone(),
            images.disks(2),
            "/run/suite",
            model.snapshot(),
        )
        .scratch(images.disk("scratch.vhdx"))
        .faults(WithoutGone(model.fake_vm()));
        let mounter = conformance::mounter(&guest, &fixture).await;
        let unplugger = conformance::unplugger(&guest, Some(&guest), &fixture).await;
        let combiner = conformance::combiner(&guest, &guest, &fixture).await;
        for passed in [mounter, unplugger, combiner] {
            println!("{passed}");
            assert!(passed.successes > 5, "{passed}");
        }
        assert_eq!(model.left(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_shares_stacks_and_releases() {
    let model = Model::linux().await;
    for system in model.ways().await {
        let images = Images::new();
        let (transport, guest) = both(&system).await;
        let manager = Manager::builder()
            .transport(transport)
            .unplugger(guest.clone())
            .mounter(guest.clone())
            .combiner(guest)
            .build();
        let layers = images.disks(24).into_iter().map(Disk::read_only);
        let mount = MountRequest::new(MountOptions::read_only());
        let request = layers.fold(StackRequest::new("/run/rootfs"), |request, disk| {
            request.layer(disk, mount.clone())
        });
        let stack = manager.stack(&request).await.unwrap();
        let shared = images.disk("3.vhdx").read_only();
        let one = manager.add(&shared, &mount).await.unwrap();
        // 24 disks are attached and mounted, once each, and laid over each other.
        assert_eq!(model.documents().len(), 24 + 24 + 1);
        stack.release().await.unwrap();
        one.release().await.unwrap();
        assert!(manager.drain().await.is_clean());
        assert_eq!(model.left(), [""; 0]);
        // Each is unmounted, unplugged and detached once.
        assert_eq!(model.documents().len(), 1 + 3 * 24);
    }
}

/// All of them are under way before the first is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_calls_at_once() {
    let model = Model::linux().await;
    for system in model.ways().await {
        let images = Images::new();
        let disks = images.disks(64);
        let attacher = Arc::new(ScsiAttacher::new(system.clone(), GuestOs::Linux));
        let mut attaching = tokio::task::JoinSet::new();
        for (lun, disk) in disks.into_iter().enumerate() {
            model.next(Answer::Wait);
            let attacher = attacher.clone();
            let at = address(&format!("1/{lun}"));
            attaching.spawn(async move { attacher.attach_identified(at, &disk).await });
        }
        for _ in 0..64 {
            model.entered().await;
        }
        // The service is not busy for others meanwhile.
        let basic = PropertyQuery::basic();
        system.properties(&basic).await.unwrap();
        for _ in 0..64 {
            model.proceed();
        }
        for outcome in attaching.join_all().await {
            outcome.unwrap();
        }
        for lun in 0..64 {
            attacher.detach(address(&format!("1/{lun}"))).await.unwrap();
        }
        assert_eq!(model.left(), [""; 0]);
    }
}
