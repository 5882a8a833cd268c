//! The fake VM answers correctly, keeps its gates, and sees every broken rule.

use std::path::Path;
use std::time::Duration;

use blockmount::testing::{
    FakeVm, Gate, Outcome, Phase, Rule, Seed, VmStep, random_delays, random_faults,
};
use blockmount::{
    DeviceLocator, Disk, DiskId, ErrorKind, LayerCombiner, MountOptions, Mounter, Overlay,
    Resolver, Transport, Unplugger,
};
use tokio::time::Instant;

fn disk(name: &str) -> Disk {
    Disk::virtual_disk(format!("/images/{name}"))
}

fn locator(text: &str) -> DeviceLocator {
    text.parse().expect("the test names a locator")
}

async fn mount(vm: &FakeVm, device: &str, target: &str) -> Result<(), ErrorKind> {
    let options = MountOptions::read_only();
    vm.mount(&locator(device), Path::new(target), &options)
        .await
        .map_err(|error| error.kind())
}

async fn unmount(vm: &FakeVm, target: &str) -> Result<(), ErrorKind> {
    vm.unmount(Path::new(target))
        .await
        .map_err(|error| error.kind())
}

async fn unplug(vm: &FakeVm, device: &str) -> Result<(), ErrorKind> {
    vm.unplug(&locator(device))
        .await
        .map_err(|error| error.kind())
}

async fn attach(vm: &FakeVm, name: &str) -> Result<String, ErrorKind> {
    let id = DiskId::name(&format!("/images/{name}"));
    vm.attach(&disk(name), &id)
        .await
        .map(|at| at.to_string())
        .map_err(|error| error.kind())
}

async fn detach(vm: &FakeVm, name: &str) -> Result<(), ErrorKind> {
    vm.detach(&disk(name)).await.map_err(|error| error.kind())
}

fn broken(vm: &FakeVm) -> Rule {
    vm.check().expect_err("a rule was broken").rule()
}

#[tokio::test]
async fn a_disks_life_breaks_no_rule_twice_over() {
    let vm = FakeVm::new();
    for _ in 0..2 {
        assert_eq!(attach(&vm, "a").await.unwrap(), "fake:0");
        mount(&vm, "fake:0", "/m").await.unwrap();
        mount(&vm, "fake:0", "/n").await.unwrap();
        assert_eq!(
            vm.left(),
            [
                "/m mounts fake:0",
                "/n mounts fake:0",
                "fake:0 holds /images/a"
            ]
        );
        unmount(&vm, "/m").await.unwrap();
        unmount(&vm, "/n").await.unwrap();
        unplug(&vm, "fake:0").await.unwrap();
        detach(&vm, "a").await.unwrap();
    }
    vm.check().unwrap();
    vm.assert_empty();
    assert_eq!(
        (
            vm.calls(VmStep::Mount),
            vm.calls(VmStep::Resolve),
            vm.calls(VmStep::Detach)
        ),
        (4, 4, 2)
    );
}

#[tokio::test]
async fn slots_are_given_lowest_first_and_run_out() {
    let vm = FakeVm::with_slots(2);
    assert_eq!(attach(&vm, "a").await.unwrap(), "fake:0");
    assert_eq!(attach(&vm, "b").await.unwrap(), "fake:1");
    assert_eq!(attach(&vm, "c").await, Err(ErrorKind::Full));
    detach(&vm, "a").await.unwrap();
    assert_eq!(attach(&vm, "c").await.unwrap(), "fake:0");
}

#[tokio::test]
async fn it_is_as_strict_as_a_guest() {
    let vm = FakeVm::new();
    assert_eq!(mount(&vm, "fake:0", "/m").await, Err(ErrorKind::NotFound));
    attach(&vm, "a").await.unwrap();
    mount(&vm, "fake:0", "/m").await.unwrap();
    assert_eq!(mount(&vm, "fake:0", "/m").await, Err(ErrorKind::Conflict));
    assert_eq!(unplug(&vm, "fake:0").await, Err(ErrorKind::Busy));
    mount(&vm, "fake:0", "/m/below").await.unwrap();
    assert_eq!(unmount(&vm, "/m").await, Err(ErrorKind::Busy));
    unmount(&vm, "/m/below").await.unwrap();

    let overlay = Overlay::new(["/m"], "/o");
    vm.combine(&overlay).await.unwrap();
    assert_eq!(unmount(&vm, "/m").await, Err(ErrorKind::Busy));
    assert_eq!(unmount(&vm, "/o").await, Err(ErrorKind::Conflict));
    vm.separate(&overlay.target).await.unwrap();
    let read_only_scratch = overlay.with_scratch("/m");
    assert_eq!(
        vm.combine(&read_only_scratch).await.unwrap_err().kind(),
        ErrorKind::Invalid
    );

    unmount(&vm, "/m").await.unwrap();
    unplug(&vm, "fake:0").await.unwrap();
    assert_eq!(mount(&vm, "fake:0", "/m").await, Err(ErrorKind::NotFound));
    vm.resolve(&locator("fake:0")).await.unwrap_err();
    detach(&vm, "a").await.unwrap();
    vm.assert_empty();
}

#[tokio::test]
async fn a_slot_in_doubt_is_kept_until_a_detach_is_confirmed() {
    let vm = FakeVm::new();
    for happened in [false, true] {
        vm.gate_next(VmStep::Attach, 1, Gate::Uncertain { happened });
        assert_eq!(attach(&vm, "a").await, Err(ErrorKind::Uncertain));
        let verb = if happened { "holds" } else { "is kept for" };
        assert_eq!(vm.left(), [format!("fake:0 {verb} /images/a")]);
        assert_eq!(attach(&vm, "b").await.unwrap(), "fake:1");
        unplug(&vm, "fake:1").await.unwrap();
        detach(&vm, "b").await.unwrap();

        vm.gate_next(VmStep::Detach, 1, Gate::Uncertain { happened: true });
        assert_eq!(detach(&vm, "a").await, Err(ErrorKind::Uncertain));
        assert_eq!(vm.left(), ["fake:0 is kept for /images/a"]);
        detach(&vm, "a").await.unwrap();
    }
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test]
async fn gates_are_used_up_then_permanent_then_planned() {
    let vm = FakeVm::new();
    vm.gate_by(|call| {
        if call.nth == 4 {
            Gate::Err(ErrorKind::Other)
        } else {
            Gate::Ok
        }
    });
    vm.gate_always(VmStep::Unplug, Gate::Err(ErrorKind::Busy));
    vm.gate_next(VmStep::Unplug, 1, Gate::Ok);
    vm.gate_next(VmStep::Unplug, 1, Gate::Err(ErrorKind::Invalid));
    let mut answers = Vec::new();
    for nth in 1..=5 {
        if nth == 4 {
            vm.gate_always(VmStep::Unplug, Gate::Ok);
        }
        answers.push(unplug(&vm, "fake:0").await.err());
    }
    use ErrorKind::*;
    assert_eq!(
        answers,
        [None, Some(Invalid), Some(Busy), Some(Other), None]
    );
}

#[tokio::test]
async fn a_panic_is_one_and_is_in_the_log() {
    let vm = FakeVm::new();
    vm.gate_next(VmStep::Attach, 1, Gate::Panic { happened: true });
    vm.gate_next(VmStep::Resolve, 1, Gate::Panic { happened: false });
    let task = vm.clone();
    assert!(
        tokio::spawn(async move { attach(&task, "a").await })
            .await
            .unwrap_err()
            .is_panic()
    );
    let task = vm.clone();
    assert!(
        tokio::spawn(async move { mount(&task, "fake:0", "/m").await })
            .await
            .unwrap_err()
            .is_panic()
    );
    let ended: Vec<_> = vm
        .log()
        .into_iter()
        .map(|event| (event.step, event.phase))
        .collect();
    for (step, happened) in [
        (VmStep::Attach, true),
        (VmStep::Resolve, false),
        (VmStep::Mount, false),
    ] {
        let outcome = Phase::Ended(Outcome::Panicked { happened });
        assert!(ended.contains(&(step, outcome)), "{step}: {ended:?}");
    }
    unmount(&vm, "/m").await.unwrap();
    detach(&vm, "a").await.unwrap();
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn never_waits_for_the_gates_to_open_and_delays_take_time() {
    let vm = FakeVm::new();
    vm.delay(VmStep::Attach, Duration::from_secs(5));
    vm.gate_always(VmStep::Attach, Gate::Never);
    let start = Instant::now();
    let task = vm.clone();
    let attaching = tokio::spawn(async move { attach(&task, "a").await });
    vm.until_called(VmStep::Attach, 1).await;
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    assert!(!attaching.is_finished() && vm.left().is_empty());
    vm.open_gates();
    attaching.await.unwrap().unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(3_600));

    attach(&vm, "b").await.unwrap();
    vm.gate_next(VmStep::Detach, 1, Gate::Slow(Duration::from_secs(7)));
    detach(&vm, "b").await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(3_612));
}

#[tokio::test]
async fn a_dead_vm_holds_nothing_and_answers_gone() {
    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    mount(&vm, "fake:0", "/m").await.unwrap();
    vm.gate_always(VmStep::Unmount, Gate::Never);
    let task = vm.clone();
    let unmounting = tokio::spawn(async move { unmount(&task, "/m").await });
    vm.until_called(VmStep::Unmount, 1).await;
    vm.kill();
    assert_eq!(unmounting.await.unwrap(), Err(ErrorKind::Gone));
    assert_eq!(detach(&vm, "a").await, Err(ErrorKind::Gone));
    assert_eq!(attach(&vm, "b").await, Err(ErrorKind::Gone));
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test]
async fn a_dead_guest_still_has_a_host() {
    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    mount(&vm, "fake:0", "/m").await.unwrap();
    vm.kill_guest();
    assert_eq!(unmount(&vm, "/m").await, Err(ErrorKind::Gone));
    assert_eq!(vm.left(), ["fake:0 holds /images/a"]);
    detach(&vm, "a").await.unwrap();
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test]
async fn a_gate_of_gone_kills_the_vm() {
    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    vm.gate_next(VmStep::Unplug, 1, Gate::Err(ErrorKind::Gone));
    assert_eq!(unplug(&vm, "fake:0").await, Err(ErrorKind::Gone));
    assert_eq!(detach(&vm, "a").await, Err(ErrorKind::Gone));
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test]
#[should_panic(expected = "the VM still has")]
async fn what_is_left_is_not_empty() {
    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    vm.assert_empty();
}

#[tokio::test]
async fn check_sees_two_calls_for_one_key() {
    let vm = FakeVm::new();
    vm.gate_always(VmStep::Attach, Gate::Never);
    let task = vm.clone();
    let attaching = tokio::spawn(async move { attach(&task, "a").await });
    vm.until_called(VmStep::Attach, 1).await;
    detach(&vm, "a").await.unwrap();
    assert_eq!(broken(&vm), Rule::OneCallPerKey);
    vm.open_gates();
    attaching.await.unwrap().unwrap();
}

#[tokio::test]
async fn check_sees_an_unplug_during_a_mount_and_a_mount_during_a_detach() {
    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    vm.gate_always(VmStep::Mount, Gate::Never);
    let task = vm.clone();
    tokio::spawn(async move { mount(&task, "fake:0", "/m").await });
    vm.until_called(VmStep::Mount, 1).await;
    unplug(&vm, "fake:0").await.unwrap();
    assert_eq!(broken(&vm), Rule::OneCallPerKey);

    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    unplug(&vm, "fake:0").await.unwrap();
    vm.gate_always(VmStep::Detach, Gate::Never);
    let task = vm.clone();
    tokio::spawn(async move { detach(&task, "a").await });
    vm.until_called(VmStep::Detach, 1).await;
    mount(&vm, "fake:0", "/m").await.unwrap_err();
    assert_eq!(broken(&vm), Rule::OneCallPerKey);
}

#[tokio::test]
async fn check_sees_two_set_ups_without_a_tear_down() {
    for first in [Gate::Ok, Gate::Uncertain { happened: false }] {
        let vm = FakeVm::new();
        vm.gate_next(VmStep::Attach, 1, first);
        attach(&vm, "a").await.ok();
        attach(&vm, "a").await.unwrap_err();
        assert_eq!(broken(&vm), Rule::TearDownBetweenSetUps);

        let vm = FakeVm::new();
        attach(&vm, "a").await.unwrap();
        vm.gate_next(VmStep::Mount, 1, first);
        mount(&vm, "fake:0", "/m").await.ok();
        mount(&vm, "fake:0", "/m").await.ok();
        assert_eq!(broken(&vm), Rule::TearDownBetweenSetUps);
    }
}

#[tokio::test]
async fn a_set_up_that_failed_needs_no_tear_down() {
    let vm = FakeVm::new();
    vm.gate_next(VmStep::Attach, 1, Gate::Err(ErrorKind::Other));
    attach(&vm, "a").await.unwrap_err();
    attach(&vm, "a").await.unwrap();
    vm.gate_next(VmStep::Resolve, 1, Gate::Err(ErrorKind::Other));
    mount(&vm, "fake:0", "/m").await.unwrap_err();
    vm.gate_next(VmStep::Unplug, 1, Gate::Err(ErrorKind::Busy));
    unplug(&vm, "fake:0").await.unwrap_err();
    unplug(&vm, "fake:0").await.unwrap();
    detach(&vm, "a").await.unwrap();
    vm.check().unwrap();
}

#[tokio::test]
async fn check_sees_a_tear_down_in_the_wrong_order() {
    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    mount(&vm, "fake:0", "/m").await.unwrap();
    detach(&vm, "a").await.unwrap();
    assert_eq!(broken(&vm), Rule::UnmountFirst);

    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    vm.gate_next(VmStep::Mount, 1, Gate::Uncertain { happened: false });
    mount(&vm, "fake:0", "/m").await.unwrap_err();
    unplug(&vm, "fake:0").await.unwrap();
    assert_eq!(broken(&vm), Rule::UnmountFirst);

    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    vm.gate_next(VmStep::Unplug, 1, Gate::Uncertain { happened: true });
    unplug(&vm, "fake:0").await.unwrap_err();
    detach(&vm, "a").await.unwrap();
    assert_eq!(broken(&vm), Rule::UnplugFirst);
}

#[tokio::test]
async fn check_sees_a_second_detach_by_a_stale_handle() {
    let vm = FakeVm::new();
    attach(&vm, "a").await.unwrap();
    unplug(&vm, "fake:0").await.unwrap();
    detach(&vm, "a").await.unwrap();
    vm.check().unwrap();
    detach(&vm, "a").await.unwrap();
    let violation = vm.check().unwrap_err();
    assert_eq!(
        (violation.rule(), violation.order()),
        (Rule::TearDownOnce, 6)
    );
    let said = violation.to_string();
    assert!(
        said.contains("detach of /images/a") && said.contains("fake:0"),
        "{said}"
    );
}

#[tokio::test]
async fn check_sees_a_call_that_was_dropped() {
    let vm = FakeVm::new();
    vm.gate_always(VmStep::Attach, Gate::Never);
    let task = vm.clone();
    let attaching = tokio::spawn(async move { attach(&task, "a").await });
    vm.until_called(VmStep::Attach, 1).await;
    attaching.abort();
    attaching.await.unwrap_err();
    assert_eq!(broken(&vm), Rule::LetFinish);
}

/// A caller of one disk that keeps the rules under faults: it repeats each step until it is told of
/// success, and takes back what is in doubt.
async fn careful_life(vm: &FakeVm, name: &str, target: &str) {
    let at = loop {
        match spawned(vm, name.to_owned(), |vm, name| async move {
            attach(&vm, &name).await
        })
        .await
        {
            Some(Ok(at)) => break at,
            Some(Err(ErrorKind::Uncertain)) | None => repeat_detach(vm, name).await,
            Some(Err(_)) => {}
        }
    };
    let mounted = spawned(
        vm,
        (at.clone(), target.to_owned()),
        |vm, (at, target)| async move { mount(&vm, &at, &target).await },
    );
    if !matches!(mounted.await, Some(Err(kind)) if kind != ErrorKind::Uncertain) {
        let unmount = |vm, target: String| async move { unmount(&vm, &target).await };
        while spawned(vm, target.to_owned(), unmount).await != Some(Ok(())) {}
    }
    let unplug = |vm, at: String| async move { unplug(&vm, &at).await };
    while spawned(vm, at.clone(), unplug).await != Some(Ok(())) {}
    repeat_detach(vm, name).await;
}

async fn repeat_detach(vm: &FakeVm, name: &str) {
    let detach = |vm, name: String| async move { detach(&vm, &name).await };
    while spawned(vm, name.to_owned(), detach).await != Some(Ok(())) {}
}

/// What a call answers, or nothing if it panics.
async fn spawned<A, T, F>(vm: &FakeVm, argument: A, call: impl FnOnce(FakeVm, A) -> F) -> Option<T>
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    tokio::spawn(call(vm.clone(), argument)).await.ok()
}

#[tokio::test(start_paused = true)]
async fn careful_callers_pass_under_random_faults_and_careless_ones_do_not() {
    let mut faults = 0;
    for seed in 0..500 {
        let vm = FakeVm::with_slots(4);
        vm.gate_by(random_faults(seed, 20));
        vm.delay_by(random_delays(seed, Duration::from_millis(3)));
        let lives = ["a", "b", "c"].map(|name| {
            let vm = vm.clone();
            tokio::spawn(async move { careful_life(&vm, name, &format!("/m/{name}")).await })
        });
        for life in lives {
            life.await
                .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
        vm.check()
            .unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
        vm.assert_empty();
        faults += vm.calls(VmStep::Attach) - 3;
    }
    assert!(faults > 150, "only {faults} attaches were faulty");
    careless_callers_are_caught().await;
}

async fn careless_callers_are_caught() {
    let mut caught = 0;
    for seed in 0..100 {
        let vm = FakeVm::new();
        vm.gate_by(random_faults(seed, 20));
        let mut random = Seed::new(seed);
        for _ in 0..6 {
            let name = *random.pick(&["a", "b"]);
            let call = |vm, name: String| async move { attach(&vm, &name).await };
            spawned(&vm, name.to_owned(), call).await;
        }
        caught += usize::from(vm.check().is_err());
    }
    assert_eq!(caught, 100, "six attaches of two disks cannot be right");
}

#[tokio::test]
async fn checking_takes_time_in_proportion_to_the_log() {
    let vm = FakeVm::new();
    for _ in 0..20_000 {
        attach(&vm, "a").await.unwrap();
        mount(&vm, "fake:0", "/m").await.unwrap();
        unmount(&vm, "/m").await.unwrap();
        unplug(&vm, "fake:0").await.unwrap();
        detach(&vm, "a").await.unwrap();
    }
    assert_eq!(vm.log().len(), 240_000);
    vm.check().unwrap();
}
