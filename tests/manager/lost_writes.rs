//! Errors of releases: the one that has nothing to retry, and the one that nobody waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use crate::common::{calls, clean, layer, ro, rw, scratch, vm};
use blockmount::testing::{Gate, VmStep};
use blockmount::{ErrorKind, StackRequest};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Counts the errors that are logged.
#[derive(Clone, Default)]
struct Errors(Arc<AtomicUsize>);

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, SeqCst);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[tokio::test(start_paused = true)]
async fn x04_an_error_that_came_before_its_caller_gave_up_is_logged() {
    let errors = Errors::default();
    let _log = tracing::subscriber::set_default(errors.clone());
    for wait in [0, 10] {
        let (vm, manager) = vm();
        let held = manager.attach(&layer(0)).await.unwrap();
        vm.gate_next(VmStep::Detach, 1, Gate::Err(ErrorKind::Busy));
        let before = errors.0.load(SeqCst);
        let release = held.release();
        // The tear-down has ended by then, or has not begun.
        tokio::time::sleep(Duration::from_millis(wait)).await;
        drop(release);
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(errors.0.load(SeqCst), before + 1, "after {wait} ms");
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn x07_lost_writes_reach_whoever_releases_and_nothing_is_left() {
    for step in [
        VmStep::Separate,
        VmStep::Unmount,
        VmStep::Unplug,
        VmStep::Detach,
    ] {
        for dropped in [false, true] {
            let errors = Errors::default();
            let _log = tracing::subscriber::set_default(errors.clone());
            let (vm, manager) = vm();
            let request = StackRequest::new("/tree")
                .layer(layer(0), ro())
                .scratch(scratch(1), rw());
            let stack = manager.stack(&request).await.unwrap();
            vm.gate_next(step, 1, Gate::Err(ErrorKind::LostWrites));
            if dropped {
                drop(stack);
                tokio::time::sleep(Duration::from_millis(10)).await;
                assert_eq!(errors.0.load(SeqCst), 1, "{step}");
            } else {
                let error = stack.release().await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::LostWrites, "{step}");
                assert_eq!(errors.0.load(SeqCst), 0, "{step}");
                error.retry().await.unwrap();
            }
            let steps = [
                VmStep::Separate,
                VmStep::Unmount,
                VmStep::Unplug,
                VmStep::Detach,
            ];
            assert_eq!(calls(&vm, steps), [1, 2, 2, 2], "{step}");
            clean(&vm, &manager).await;
        }
    }
}
