//! What a manager shows of itself.

use std::time::Duration;

use crate::common::{begin, clean, layer, ro, rw, scratch, soon, vm};
use blockmount::placement::SlotUse;
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{
    ErrorKind, HolderName, Inspection, LeaseState, Manager, SlotStatus, StackRequest, Step,
    StepStatus, ViewOptions, ViewRequest,
};

fn step(inspection: &Inspection, step: Step) -> &StepStatus {
    let mut steps = inspection.steps.iter();
    steps.find(|status| status.step == step).unwrap()
}

fn travelled(inspection: &Inspection) -> Inspection {
    serde_json::from_str(&serde_json::to_string(inspection).unwrap()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_is_up_is_shown_with_its_shares_and_holders() {
    let (vm, manager) = vm();
    assert_eq!(manager.inspect(), Inspection::default());
    let web = HolderName::new("web").unwrap();
    let request = StackRequest::new("/run/c1")
        .layer(layer(0), ro())
        .layer(layer(1), ro())
        .scratch(scratch(2), rw())
        .held_by(web);
    let one = manager.stack(&request).await.unwrap();
    let request = StackRequest::new("/run/c2").layer(layer(0), ro());
    let two = manager.stack(&request).await.unwrap();
    let request = ViewRequest::new("/run/v", ViewOptions::default());
    let view = manager.view(&one, &request).await.unwrap();

    let seen = manager.inspect();
    let disks = ["/images/0.img", "/images/1.img", "/images/2.img"];
    let found = seen
        .attachments
        .iter()
        .map(|attachment| attachment.disk.as_deref().unwrap());
    assert!(found.eq(disks));
    let of_disks = seen.attachments.iter().map(|attachment| {
        let lease = &attachment.lease;
        (
            attachment.read_only,
            lease.state,
            lease.shares,
            lease.why.clone(),
        )
    });
    let up = LeaseState::Up;
    assert!(of_disks.eq([
        (true, up, 1, None),
        (true, up, 1, None),
        (false, up, 1, None)
    ]));
    // The layer that both have is one mount with two shares.
    let shared = seen
        .mounts
        .iter()
        .find(|mount| mount.lease.shares == 2)
        .unwrap();
    assert_eq!(
        shared.path.as_deref().unwrap(),
        one.layers()[0].path().to_str().unwrap()
    );
    assert_eq!(shared.locator, one.layers()[0].locator().to_string());
    assert_eq!(seen.mounts.len(), 3);
    let stacks = seen
        .stacks
        .iter()
        .map(|stack| (&*stack.target, stack.layers.len(), stack.lease.shares));
    assert!(stacks.eq([("/run/c1", 2, 2), ("/run/c2", 1, 1)]));
    assert!(seen.stacks[0].scratch.is_some() && seen.stacks[1].scratch.is_none());
    assert_eq!(seen.views[0].source.as_deref(), Some("/run/c1"));
    assert_eq!(
        (&*seen.holders[0].name, &*seen.holders[0].of),
        ("web", "the stack at /run/c1")
    );
    assert_eq!(
        (seen.views.len(), seen.holders.len(), seen.frozen),
        (1, 1, false)
    );
    assert_eq!(travelled(&seen), seen);

    view.release().await.unwrap();
    one.release().await.unwrap();
    two.release().await.unwrap();
    let seen = manager.inspect();
    assert!(seen.attachments.is_empty() && seen.mounts.is_empty() && seen.holders.is_empty());
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn calls_are_timed_step_by_step_and_failures_are_counted_apart() {
    let (vm, manager) = vm();
    vm.delay(VmStep::Attach, Duration::from_millis(10));
    vm.delay(VmStep::Mount, Duration::from_millis(2));
    vm.gate_next(VmStep::Mount, 1, Gate::Err(ErrorKind::Other));
    manager.add(&layer(0), &ro()).await.unwrap_err();
    for _ in 0..3 {
        let mount = manager.add(&layer(0), &ro()).await.unwrap();
        // A share asks for nothing.
        manager
            .add(&layer(0), &ro())
            .await
            .unwrap()
            .release()
            .await
            .unwrap();
        mount.release().await.unwrap();
    }
    let seen = manager.inspect();
    let (attach, mount) = (step(&seen, Step::Attach), step(&seen, Step::Mount));
    assert_eq!((attach.succeeded, attach.failed), (4, 0));
    assert_eq!((mount.succeeded, mount.failed), (3, 1));
    for time in [attach.p50_seconds, attach.p99_seconds, attach.max_seconds] {
        assert!((0.010..0.0115).contains(&time), "{attach:?}");
    }
    assert!((0.002..0.004).contains(&mount.max_seconds), "{mount:?}");
    let steps = seen.steps.iter().map(|status| status.step);
    assert!(steps.eq([
        Step::Attach,
        Step::Mount,
        Step::Unmount,
        Step::Unplug,
        Step::Detach
    ]));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_or_pending_says_so_and_why() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Attach, 1, Gate::Never);
    begin(manager.add(&layer(0), &ro())).await;
    let seen = manager.inspect();
    let attachment = &seen.attachments[0];
    assert_eq!(
        (attachment.lease.state, &attachment.disk),
        (LeaseState::Starting, &None)
    );
    assert!(attachment.id.contains("/images/0.img"), "{attachment:?}");
    vm.open_gates();
    soon(manager.drain())
        .await
        .is_clean()
        .then_some(())
        .unwrap();

    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    vm.gate_next(VmStep::Unmount, 2, Gate::Err(ErrorKind::Busy));
    let busy = mount.release().await.unwrap_err();
    let busy = busy.retry().await.unwrap_err();
    let seen = manager.inspect();
    let lease = &seen.mounts[0].lease;
    assert_eq!(
        (lease.state, lease.shares, lease.attempts),
        (LeaseState::Pending, 0, 2)
    );
    let why = lease.why.as_deref().unwrap();
    assert!(
        why.starts_with("cannot unmount") && why.contains(": "),
        "{why}"
    );
    // What is below it is up for it.
    assert_eq!(
        (
            seen.attachments[0].lease.state,
            seen.attachments[0].lease.shares
        ),
        (LeaseState::Up, 1)
    );
    busy.retry().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test]
async fn slots_are_those_that_the_manager_was_told_of() {
    let vm = FakeVm::new();
    let slot = SlotStatus::new("fake", 7, SlotUse::Foreign).with_disk("/images/x");
    let told = vec![slot];
    let shown = told.clone();
    let manager = Manager::builder()
        .transport(vm)
        .slots(move || shown.clone())
        .build();
    assert_eq!(manager.inspect().slots, told);
    let text = serde_json::to_string(&manager.inspect()).unwrap();
    assert!(
        text.contains(r#"{"transport":"fake","address":"7","usage":"foreign","disk":"/images/x"}"#),
        "{text}"
    );
}
