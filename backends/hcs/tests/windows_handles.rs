//! No handle of the service is left open. Alone in its program, because the stand-in counts those of all tests.
#![cfg(windows)]
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

#[path = "integration/common/mod.rs"]
mod common;

use std::time::Instant;

use blockmount::testing::AttachIdentified as _;
use blockmount::{ErrorKind, Transport};
use blockmount_bridge::gcs::Hresult;
use blockmount_hcs::documents::PropertyQuery;
use blockmount_hcs::{ComputeSystem, GuestOs, ScsiAttacher};
use blockmount_scsi::ScsiTransport;
use common::{Answer, Images, LONG, Model, SHORT, stand_in};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_attachments_leak_no_handle() {
    let model = Model::linux().await;
    let images = Images::new();
    let disks = images.disks(8);
    {
        let system = stand_in::open(&model, LONG).await;
        let attacher = ScsiAttacher::new(system.clone(), GuestOs::Linux);
        let geometry = attacher.geometry();
        let transport = ScsiTransport::new(attacher, geometry, &[]).unwrap();
        for round in 0..125 {
            for disk in &disks {
                transport.attach_identified(disk).await.unwrap();
            }
            for disk in &disks {
                transport.detach(disk).await.unwrap();
            }
            assert_eq!(model.documents().len(), 16);
            assert_eq!(stand_in::open_handles(), 1, "in round {round}");
        }
        // Neither does what fails, what is never answered, or what nobody waits for any more.
        model.next(Answer::Fail(Hresult::FILE_NOT_FOUND));
        let error = transport.attach_identified(&disks[0]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        model.next(Answer::Wait);
        tokio::select! {
            biased;
            _ = transport.attach_identified(&disks[1]) => unreachable!("it waits"),
            () = model.entered() => {}
        }
        model.proceed();
        // Its thread may still be about to let go.
        let began = Instant::now();
        while stand_in::open_handles() != 1 && began.elapsed() < LONG {
            tokio::task::yield_now().await;
        }
        assert_eq!(stand_in::open_handles(), 1);
    }
    let system = stand_in::open(&model, SHORT).await;
    model.next_properties(Answer::Silent { happens: false });
    system
        .properties(&PropertyQuery::basic())
        .await
        .unwrap_err();
    assert_eq!(stand_in::open_handles(), 1);
    drop(system);
    assert_eq!(stand_in::open_handles(), 0);
}
