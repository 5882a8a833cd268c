//! Many tasks at once, with faults: every place has one disk, and all are free in the end.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use crate::common::{Answer, MIB, MODES, disk, vpmem};
use blockmount::testing::AttachIdentified as _;
use blockmount::testing::Seed;
use blockmount::{ErrorKind, Transport};

/// The VM itself asserts that no place has two disks or two calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_at_once_with_faults_leave_nothing() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 4, 4 * MIB, &[0]);
        let tasks = (0..8_usize).map(|task| {
            let (vm, vpmem) = (vm.clone(), vpmem.clone());
            tokio::spawn(async move {
                let mut seed = Seed::new(task as u64);
                let mut attached = 0;
                for round in 0..300 {
                    let disk = disk(task * 1000 + round);
                    vm.set_size(&disk, 1 + seed.below(3 * MIB));
                    if seed.percent(10) {
                        vm.next(*seed.pick(&[
                            Answer::DoneButUncertain,
                            Answer::Fail(ErrorKind::Other),
                            Answer::Fail(ErrorKind::Busy),
                        ]));
                    }
                    attached += usize::from(vpmem.attach_identified(&disk).await.is_ok());
                    tokio::task::yield_now().await;
                    while vpmem.detach(&disk).await.is_err() {}
                }
                attached
            })
        });
        let tasks: Vec<_> = tasks.collect();
        let mut attached = 0;
        for task in tasks {
            attached += task.await.unwrap();
        }
        // Neither is all refused, nor does all fit.
        assert!((300..2_300).contains(&attached), "{attached}");
        assert_eq!((vm.present(), vpmem.slot_map().len()), (vec![], 1));
    }
}
