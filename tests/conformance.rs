//! The fake VM passes the checks of every contract, with every fault.

#[path = "common/suite.rs"]
mod suite;

use blockmount::testing::FakeVm;
use blockmount::testing::conformance::{
    self, Fault, Faults, GuestFixture, Passed, TransportFixture,
};
use suite::CAPACITY;

fn transport_fixture(vm: &FakeVm, faults: impl Faults) -> TransportFixture {
    let tables = vm.clone();
    suite::transport_fixture(vm, faults, move || tables.left())
}

fn guest_fixture(vm: &FakeVm) -> GuestFixture {
    let tables = vm.clone();
    suite::guest_fixture(vm, vm.clone(), vm.clone(), move || tables.left())
}

/// All checks were run but these, for which the fixture lacks something.
fn assert_all_run(passed: &Passed, but: &[&str]) {
    let not_run: Vec<_> = passed.not_run.iter().map(|check| check.name()).collect();
    assert_eq!(not_run, but, "{passed}");
}

#[tokio::test(start_paused = true)]
async fn the_fake_vm_passes_the_checks_of_a_transport() {
    let vm = FakeVm::with_slots(CAPACITY);
    let fixture = transport_fixture(&vm, vm.clone());
    let passed = conformance::transport(&vm, &fixture).await;
    assert!(
        passed.successes >= 40 && passed.checks > passed.successes,
        "{passed}"
    );
    assert_all_run(&passed, &[]);
    vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn the_fake_vm_passes_the_checks_of_a_guest() {
    let vm = FakeVm::new();
    let passed = conformance::resolver(&vm, &guest_fixture(&vm)).await;
    assert!(passed.successes >= 8, "{passed}");
    assert_all_run(&passed, &[]);
    let vm = FakeVm::new();
    let passed = conformance::unplugger(&vm, Some(&vm), &guest_fixture(&vm)).await;
    assert!(passed.successes >= 8, "{passed}");
    assert_all_run(&passed, &[]);
    let vm = FakeVm::new();
    let passed = conformance::mounter(&vm, &guest_fixture(&vm)).await;
    assert!(passed.successes >= 8, "{passed}");
    assert_all_run(
        &passed,
        &[
            "a filesystem that is not there is not found and leaves nothing",
            "a device that could not be mounted can be taken out",
        ],
    );
    let vm = FakeVm::new();
    let passed = conformance::combiner(&vm, &vm, &guest_fixture(&vm)).await;
    assert!(passed.successes >= 8, "{passed}");
    assert_all_run(&passed, &[]);
    let vm = FakeVm::new();
    let passed = conformance::binder(&vm, &vm, &guest_fixture(&vm)).await;
    assert!(passed.successes >= 8, "{passed}");
    assert_all_run(&passed, &[]);
    vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn an_unplugger_without_a_mounter_has_checks_too() {
    let vm = FakeVm::new();
    let passed = conformance::unplugger(&vm, None, &guest_fixture(&vm)).await;
    assert_all_run(
        &passed,
        &[
            "the fixture's disks can be mounted",
            "a mounted device is busy and stays as it was",
            "a device that was busy can be used on",
            "unplugging touches no other device",
            "an unplug that was given up does not touch what is attached later",
        ],
    );
    vm.assert_empty();
}

/// What a fixture cannot show is said.
#[tokio::test]
async fn a_fixture_without_faults_names_the_checks_that_were_not_run() {
    struct NoFaults;

    #[async_trait::async_trait]
    impl Faults for NoFaults {
        async fn inject(&self, _: blockmount::testing::VmStep, _: Fault) -> bool {
            false
        }
        async fn clear(&self) {}
    }

    let vm = FakeVm::with_slots(CAPACITY);
    let passed = conformance::transport(&vm, &transport_fixture(&vm, NoFaults)).await;
    let said = passed.to_string();
    for check in [
        "an attach without an answer is uncertain or leaves nothing",
        "detaching after an attach in doubt succeeds and leaves nothing",
        "a disk whose detach is busy stays as it was",
        "an attach that was given up has no effect after the detach",
        "the slot of a disk in doubt is not given to another",
        "a detach after the end of the VM is done or gone, and leaves nothing",
    ] {
        assert!(said.contains(&format!("not run: {check}")), "{said}");
    }
    assert!(
        !said.contains("not run: detaching twice succeeds"),
        "{said}"
    );
    vm.assert_empty();
}
