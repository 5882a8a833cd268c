//! Many owners at once over one bridge, in random schedules with faults, delays and late answers.

use std::time::Duration;

use blockmount::testing::{Seed, VmStep, random_delays, random_faults};
use blockmount::{Disk, Manager, MountOptions, MountRequest};
use blockmount_bridge::Deadlines;
use tokio::task::JoinSet;

use crate::harness::{ScsiVm, dial};
use crate::wire::{BridgeGuest, GuestConnection, GuestServer};

const OWNERS: u64 = 16;
const CYCLES: u64 = 12;
const DISKS: u64 = 6;

/// Adds and releases; how many cycles were without an error.
async fn owner(manager: Manager, mut seed: Seed) -> usize {
    let mut clean = 0;
    for _ in 0..CYCLES {
        let disk = Disk::virtual_disk(format!("/{}.img", seed.below(DISKS))).read_only();
        let request = MountRequest::new(MountOptions::read_only());
        if let Ok(mount) = manager.add(&disk, &request).await {
            tokio::time::sleep(Duration::from_millis(seed.below(10))).await;
            clean += usize::from(mount.release().await.is_ok());
        }
    }
    clean
}

/// One schedule. Answers that are later than the deadline leave their host in doubt.
async fn schedule(number: u64, faults: u64, deadline: Duration) -> (ScsiVm, usize) {
    let vm = ScsiVm::default();
    vm.gate_by(random_faults(number, faults));
    vm.delay_by(random_delays(number, Duration::from_millis(20)));
    let stream = dial(&GuestServer::new(vm.clone())).stream;
    let deadlines = Deadlines {
        call: deadline,
        ..Deadlines::default()
    };
    let connection = GuestConnection::connect_with(stream, deadlines)
        .await
        .unwrap();
    let guest = BridgeGuest::new(connection);
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(guest.clone())
        .mounter(guest)
        .build();
    let mut owners = JoinSet::new();
    for owner_number in 0..OWNERS {
        owners.spawn(owner(
            manager.clone(),
            Seed::new(number * OWNERS + owner_number),
        ));
    }
    let clean = owners.join_all().await.iter().sum();
    vm.open_gates();
    vm.delay_by(|_| Duration::ZERO);
    // What the guest has begun before still takes its time, and a drain that has to wait for it is late as well.
    let mut drained = manager.drain().await;
    for _ in 0..10 {
        if !drained.is_clean() {
            drained = manager.drain().await;
        }
    }
    assert!(drained.is_clean(), "schedule {number}: {drained:?}");
    vm.assert_empty();
    (vm, clean)
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_and_nothing_is_done_twice_whatever_fails() {
    for number in 0..60 {
        let (vm, clean) = schedule(number, 15, Duration::from_secs(60)).await;
        vm.check()
            .unwrap_or_else(|violation| panic!("schedule {number}: {violation}"));
        assert!(clean > 0 && vm.calls(VmStep::Mount) > 6);
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_when_answers_are_late() {
    for number in 0..60 {
        let (_, clean) = schedule(number, 5, Duration::from_millis(15)).await;
        assert!(clean > 0);
    }
}
