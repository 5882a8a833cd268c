//! The gate matrix: every way in which a call can end, at every step, with callers of one disk who
//! hold, release, drop, retry or give up at some moment.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use crate::harness::{Held, clean, disk, manager_of, poll_and_give_up, request, soon};
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{Error, ErrorKind, Manager, ReleaseError, StackRequest};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);
const MILLISECOND: Duration = Duration::from_millis(1);

const GATES: [Gate; 10] = [
    Gate::Ok,
    Gate::Err(ErrorKind::Other),
    Gate::Err(ErrorKind::Busy),
    Gate::Err(ErrorKind::Conflict),
    Gate::Uncertain { happened: true },
    Gate::Uncertain { happened: false },
    Gate::Slow(Duration::from_millis(7)),
    Gate::Never,
    Gate::Panic { happened: true },
    Gate::Panic { happened: false },
];

/// How a test sets a gate.
#[derive(Debug, Clone, Copy)]
enum For {
    OneCall,
    TwoCalls,
    AllCalls,
}

/// Runs a future on a clock of its own that stands still while there is work.
fn on_paused_clock(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    LocalSet::new().block_on(&runtime.unwrap(), future);
}

/// A VM in which each call takes a millisecond, so that there are moments within it.
fn slow_vm() -> FakeVm {
    let vm = FakeVm::new();
    vm.delay_by(|_| MILLISECOND);
    vm
}

fn stack() -> StackRequest {
    StackRequest::new("/tree")
        .layer(disk(0, true), request(&["ro"], None))
        .layer(disk(1, true), request(&["ro"], None))
        .scratch(disk(2, false), request(&["rw"], None))
}

/// What the callers of one case share.
struct Case {
    vm: FakeVm,
    manager: Manager,
}

impl Case {
    async fn attach(&self) -> Result<Held, Error> {
        self.manager
            .attach(&disk(0, true))
            .await
            .map(Held::Attachment)
    }

    async fn add(&self) -> Result<Held, Error> {
        self.manager
            .add(&disk(0, true), &request(&["ro"], None))
            .await
            .map(Held::Mount)
    }

    async fn stack(&self) -> Result<Held, Error> {
        self.manager.stack(&stack()).await.map(Held::Stack)
    }

    /// Holds what was got for a while; it must be true all the time.
    async fn hold(&self, held: Result<Held, Error>, milliseconds: u32) -> Option<Held> {
        let held = held.ok()?;
        held.check(&self.vm);
        sleep(milliseconds * MILLISECOND).await;
        held.check(&self.vm);
        Some(held)
    }

    /// Callers of one disk: patient ones, who do with what they got whatever can be done, and ones who
    /// give up at moment `at`.
    fn callers(self: &Rc<Self>, at: u32) -> Vec<JoinHandle<()>> {
        let me = || Rc::clone(self);
        let (one, two, three, four, five) = (me(), me(), me(), me(), me());
        let (six, seven, eight, nine) = (me(), me(), me(), me());
        vec![
            spawn_local(async move {
                if let Some(held) = one.hold(one.add().await, 5).await {
                    retry(held.release().await, 3).await;
                }
            }),
            spawn_local(async move { drop(two.hold(two.add().await, 2).await) }),
            spawn_local(async move {
                if let Some(held) = three.hold(three.attach().await, 1).await {
                    retry(held.release().await, 0).await;
                }
            }),
            spawn_local(async move {
                if let Some(held) = four.hold(four.stack().await, 3).await {
                    retry(held.release().await, 2).await;
                }
            }),
            // Asks again after an error.
            spawn_local(async move {
                for _ in 0..2 {
                    if let Some(held) = five.hold(five.add().await, 1).await {
                        return drop(held.release());
                    }
                }
            }),
            spawn_local(async move { drop(timeout(at * MILLISECOND, six.add()).await) }),
            spawn_local(async move { drop(timeout(at * MILLISECOND, seven.stack()).await) }),
            spawn_local(async move { drop(poll_and_give_up(eight.add(), at as usize).await) }),
            // Gives up its release, and later the retry.
            spawn_local(async move {
                sleep(at * MILLISECOND).await;
                if let Some(held) = nine.hold(nine.attach().await, 0).await
                    && let Ok(Err(error)) = timeout(MILLISECOND, held.release()).await
                {
                    drop(timeout(MILLISECOND, error.retry()).await);
                }
            }),
        ]
    }
}

async fn retry(mut released: Result<(), ReleaseError>, times: usize) {
    for _ in 0..times {
        let Err(error) = released else { return };
        released = error.retry().await;
    }
}

fn set(vm: &FakeVm, step: VmStep, gate: Gate, how: For) {
    match how {
        For::OneCall => vm.gate_next(step, 1, gate),
        For::TwoCalls => vm.gate_next(step, 2, gate),
        For::AllCalls => vm.gate_always(step, gate),
    }
}

/// One case: the gates are set, the callers come and go, then nothing must be left.
async fn run(gates: &[(VmStep, Gate)], how: For, at: u32) {
    let vm = slow_vm();
    let case = Rc::new(Case {
        manager: manager_of(&vm, DEFAULT_TIMEOUT),
        vm: vm.clone(),
    });
    for (step, gate) in gates {
        set(&vm, *step, *gate, how);
    }
    let what = format!("{gates:?} for {how:?}, giving up at {at} ms");
    for caller in case.callers(at) {
        if let Err(panic) = soon(&what, caller).await {
            panic!("{what}: {panic}");
        }
    }
    vm.open_gates();
    let drains = clean(&vm, &case.manager).await;
    assert_eq!(
        drains, 1,
        "{what}: one drain is enough when nothing fails any more"
    );
}

#[test]
fn every_gate_at_every_step() {
    for step in VmStep::ALL {
        for gate in GATES {
            for how in [For::OneCall, For::TwoCalls, For::AllCalls] {
                for at in 0..16 {
                    on_paused_clock(run(&[(step, gate)], how, at));
                }
            }
        }
    }
}

#[test]
fn every_pair_of_gates_at_two_steps() {
    for (number, one) in VmStep::ALL.into_iter().enumerate() {
        for other in &VmStep::ALL[number + 1..] {
            for (index, first) in GATES.into_iter().enumerate() {
                for second in GATES {
                    // Between them the pairs see every moment of giving up.
                    let at = (index * 3 + number) as u32 % 16;
                    on_paused_clock(run(&[(one, first), (*other, second)], For::OneCall, at));
                }
            }
        }
    }
}

/// A caller that is cancelled at any moment has nothing left once a drain is over that began at once.
#[test]
fn a_drain_right_after_giving_up_leaves_nothing() {
    for at in 0..24 {
        for polls in [None, Some(1), Some(2), Some(5), Some(9)] {
            on_paused_clock(async move {
                let vm = slow_vm();
                let case = Case {
                    manager: manager_of(&vm, DEFAULT_TIMEOUT),
                    vm: vm.clone(),
                };
                match polls {
                    None => drop(timeout(at * MILLISECOND, case.stack()).await),
                    Some(polls) => {
                        sleep(at * MILLISECOND).await;
                        drop(poll_and_give_up(case.stack(), polls + at as usize).await);
                    }
                }
                let drained = soon("drain", case.manager.drain()).await;
                assert!(
                    drained.is_clean(),
                    "given up at {at} ms after {polls:?} polls: {drained:?}"
                );
                clean(&vm, &case.manager).await;
            });
        }
    }
}

/// What the error of one caller says, in full.
fn said(error: &Error) -> String {
    format!("{error}: {}", error.cause())
}

/// Eight callers wait for one attempt, which fails: there is one call, and all get that error.
async fn one_outcome(step: VmStep, gate: Gate, kind: ErrorKind) {
    let vm = slow_vm();
    let manager = manager_of(&vm, DEFAULT_TIMEOUT);
    vm.delay(step, 10 * MILLISECOND);
    vm.gate_next(step, 1, gate);
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let manager = manager.clone();
            spawn_local(async move {
                match step {
                    VmStep::Attach => manager.attach(&disk(0, true)).await.map(drop),
                    _ => manager
                        .add(&disk(0, true), &request(&["ro"], None))
                        .await
                        .map(drop),
                }
            })
        })
        .collect();
    let mut outcomes = HashSet::new();
    for caller in callers {
        let error = soon("a waiter", caller).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), kind, "{step} {gate:?}");
        assert_eq!(error.disk(), Some(&disk(0, true)));
        outcomes.insert(said(&error));
    }
    assert_eq!(outcomes.len(), 1, "{step} {gate:?}: {outcomes:?}");
    assert_eq!(
        vm.calls(step),
        1,
        "{step} {gate:?} is tried once for all who wait for it"
    );
    // No new request gets an old error.
    let again = soon(
        "again",
        manager.add(&disk(0, true), &request(&["ro"], None)),
    )
    .await
    .unwrap();
    drop(again);
    clean(&vm, &manager).await;
}

#[test]
fn all_who_wait_for_one_attempt_get_its_outcome() {
    for step in [VmStep::Attach, VmStep::Mount] {
        for (gate, kind) in [
            (Gate::Err(ErrorKind::Other), ErrorKind::Other),
            (Gate::Err(ErrorKind::Busy), ErrorKind::Busy),
            (Gate::Err(ErrorKind::NotFound), ErrorKind::NotFound),
            (Gate::Uncertain { happened: true }, ErrorKind::Uncertain),
            (Gate::Uncertain { happened: false }, ErrorKind::Uncertain),
            (Gate::Panic { happened: true }, ErrorKind::Uncertain),
            (Gate::Panic { happened: false }, ErrorKind::Uncertain),
        ] {
            on_paused_clock(one_outcome(step, gate, kind));
        }
    }
}

/// The handles of all who wait for one tear-down that fails say so, and one retry is enough.
#[test]
fn all_who_wait_for_one_tear_down_get_its_outcome() {
    for step in [VmStep::Unmount, VmStep::Unplug, VmStep::Detach] {
        on_paused_clock(async move {
            let vm = slow_vm();
            let manager = manager_of(&vm, DEFAULT_TIMEOUT);
            let mount = manager
                .add(&disk(0, true), &request(&["ro"], None))
                .await
                .unwrap();
            vm.delay(step, 10 * MILLISECOND);
            vm.gate_next(step, 1, Gate::Err(ErrorKind::Busy));
            let release = spawn_local(mount.release());
            vm.until_called(step, 1).await;
            let askers: Vec<_> = (0..4)
                .map(|_| {
                    let manager = manager.clone();
                    spawn_local(async move { manager.attach(&disk(0, true)).await.map(drop) })
                })
                .collect();
            let error = soon("the release", release).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            for asker in askers {
                let outcome = soon("an asker", asker).await.unwrap();
                match step {
                    // The disk is still attached for the mount whose tear-down is pending, so it can be shared.
                    VmStep::Unmount => outcome.unwrap(),
                    _ => assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Busy),
                }
            }
            assert_eq!(vm.calls(step), 1, "no waiting caller tries once more");
            soon("the retry", error.retry()).await.unwrap();
            assert_eq!(vm.calls(step), 2);
            vm.assert_empty();
            clean(&vm, &manager).await;
        });
    }
}

/// With a call that never comes back, a caller is answered after the timeout of the manager. The work
/// goes on, and once it is over nothing is left of it.
#[test]
fn a_timeout() {
    const DEFAULT_TIMEOUT: Duration = Duration::from_secs(7);
    for step in [
        VmStep::Identify,
        VmStep::Attach,
        VmStep::Resolve,
        VmStep::Mount,
        VmStep::Combine,
    ] {
        on_paused_clock(async move {
            let vm = FakeVm::new();
            let manager = manager_of(&vm, DEFAULT_TIMEOUT);
            vm.gate_next(step, 1, Gate::Never);
            let began = Instant::now();
            let error = soon(&format!("{step}"), manager.stack(&stack()))
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Uncertain, "{step}");
            assert_eq!(began.elapsed(), DEFAULT_TIMEOUT, "{step}");
            let hanging = vm.calls(step);
            // A drain is as patient, and says what it has not seen the end of.
            let drained = soon("drain", manager.drain()).await;
            assert_eq!(
                drained.is_clean(),
                step == VmStep::Identify,
                "{step}: {drained:?}"
            );
            vm.open_gates();
            clean(&vm, &manager).await;
            // No caller has asked again.
            let expected = if step == VmStep::Combine { 1 } else { hanging };
            assert_eq!(vm.calls(step), expected, "{step}");
        });
    }
}

#[test]
fn a_timeout_of_a_tear_down() {
    const DEFAULT_TIMEOUT: Duration = Duration::from_secs(7);
    for step in [
        VmStep::Separate,
        VmStep::Unmount,
        VmStep::Unplug,
        VmStep::Detach,
    ] {
        on_paused_clock(async move {
            let vm = FakeVm::new();
            let manager = manager_of(&vm, DEFAULT_TIMEOUT);
            let held = manager.stack(&stack()).await.unwrap();
            vm.gate_next(step, 1, Gate::Never);
            let began = Instant::now();
            let error = soon(&format!("{step}"), held.release()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Uncertain, "{step}");
            let reported = match step {
                // From outside, an attachment on its way out is one step.
                VmStep::Unplug => VmStep::Detach,
                step => step,
            };
            assert_eq!(
                error.error().step().to_string(),
                reported.to_string(),
                "what hangs"
            );
            assert_eq!(began.elapsed(), DEFAULT_TIMEOUT, "{step}");
            let retried = soon("the retry", error.retry()).await;
            let retried = retried.expect_err(&format!("the {step} is still pending"));
            assert_eq!(began.elapsed(), 2 * DEFAULT_TIMEOUT, "{step}");
            vm.open_gates();
            soon("the second retry", retried.retry()).await.unwrap();
            assert_eq!(clean(&vm, &manager).await, 1);
        });
    }
}

/// A VM or a guest that ends while callers are at work.
#[test]
fn the_end_of_the_vm_at_any_moment() {
    for guest_only in [false, true] {
        for at in 0..24 {
            on_paused_clock(async move {
                let vm = slow_vm();
                let case = Rc::new(Case {
                    manager: manager_of(&vm, DEFAULT_TIMEOUT),
                    vm: vm.clone(),
                });
                let request = stack();
                let work = {
                    let case = Rc::clone(&case);
                    spawn_local(async move {
                        let (one, two) = tokio::join!(case.manager.stack(&request), case.add());
                        sleep(2 * MILLISECOND).await;
                        if let Ok(stack) = one {
                            stack.release().await.expect("what is gone is torn down");
                        }
                        drop(two);
                    })
                };
                sleep(at * MILLISECOND).await;
                if guest_only {
                    vm.kill_guest()
                } else {
                    vm.kill()
                }
                soon("the callers", work).await.unwrap();
                let error = case.add().await.err().expect("the VM is gone");
                assert_eq!(error.kind(), ErrorKind::Gone, "killed at {at} ms");
                assert_eq!(clean(&vm, &case.manager).await, 1, "killed at {at} ms");
            });
        }
    }
}

/// An identify changes nothing, so it is the one call that a caller takes with it when it gives up.
#[test]
fn an_identify_ends_with_its_caller_and_nothing_begins() {
    on_paused_clock(async {
        let vm = FakeVm::new();
        let manager = manager_of(&vm, DEFAULT_TIMEOUT);
        vm.delay(VmStep::Identify, 2 * MILLISECOND);
        drop(timeout(MILLISECOND, manager.attach(&disk(0, true))).await);
        sleep(5 * MILLISECOND).await;
        assert_eq!(vm.calls(VmStep::Attach), 0);
        clean(&vm, &manager).await;
    });
}

/// A mount whose detach hangs is unmounted; what its release leaves pending is the attachment.
#[test]
fn a_release_that_hangs_below_is_retried_below() {
    on_paused_clock(async {
        let vm = FakeVm::new();
        let manager = manager_of(&vm, Duration::from_secs(7));
        let mount = manager
            .add(&disk(0, true), &request(&["ro"], None))
            .await
            .unwrap();
        vm.gate_next(VmStep::Detach, 1, Gate::Never);
        let error = soon("the release", mount.release()).await.unwrap_err();
        let retried = soon("the retry", error.retry()).await;
        assert!(
            retried.is_err(),
            "the disk is still attached: {:?}",
            vm.left()
        );
        vm.open_gates();
        clean(&vm, &manager).await;
    });
}
