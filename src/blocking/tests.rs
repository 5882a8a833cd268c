use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::ErrorKind;

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn work_that_waits_makes_room_for_other_work() {
    let hanging = thread::available_parallelism().map_or(2, usize::from) * 4 + 3;
    // All of them are on threads at once, or none goes on.
    let all = Arc::new(Barrier::new(hanging + 1));
    let waits: Vec<_> = (0..hanging)
        .map(|_| {
            let all = all.clone();
            tokio::spawn(blocking(move || {
                all.wait();
                Ok(())
            }))
        })
        .collect();
    let other = blocking(|| Ok(7));
    assert_eq!(timeout(SOON, other).await.unwrap().unwrap(), 7);
    let last = tokio::task::spawn_blocking(move || all.wait());
    timeout(SOON, last).await.unwrap().unwrap();
    for wait in waits {
        timeout(SOON, wait).await.unwrap().unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_many_gets_its_own_answer() {
    let work = |number: usize| tokio::spawn(blocking(move || Ok(number)));
    let all: Vec<_> = (0..2000).map(work).collect();
    for (number, answer) in all.into_iter().enumerate() {
        let answer = timeout(SOON, answer).await.unwrap().unwrap();
        assert_eq!(answer.unwrap(), number);
    }
}

#[tokio::test]
async fn an_answer_does_not_wait_for_work_that_was_taken_later() {
    let (go, wait) = mpsc::channel::<()>();
    let first = tokio::spawn(blocking(|| Ok(())));
    let second = tokio::spawn(blocking(move || {
        let _gone = wait.recv();
        Ok(())
    }));
    timeout(SOON, first).await.unwrap().unwrap().unwrap();
    assert!(!second.is_finished());
    drop(go);
    timeout(SOON, second).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_call_runs_on_one_thread_until_it_waits_for_something_else() {
    let here = || Ok(thread::current().id());
    let call = blocking_call(async move {
        let before = [blocking_step(here).await?, blocking_step(here).await?];
        let itself = thread::current().id();
        tokio::time::sleep(Duration::from_millis(1)).await;
        let task = thread::current().id();
        let after = [blocking_step(here).await?, blocking_step(here).await?];
        assert_eq!(after, [thread::current().id(); 2]);
        tokio::task::yield_now().await;
        Ok((before, itself, (task, after[0])))
    });
    let (before, itself, (task, after)) = timeout(SOON, call).await.unwrap().unwrap();
    assert_eq!(before, [itself; 2]);
    // The test's runtime has this one thread.
    let runtime = thread::current().id();
    assert_eq!(task, runtime);
    assert!(itself != runtime && after != runtime);
}

#[tokio::test]
async fn a_call_can_let_others_pass_and_goes_on() {
    let call = blocking_call(async {
        after_queued().await;
        let first = blocking_step(|| Ok(1)).await?;
        after_queued().await;
        Ok(first + 1)
    });
    assert_eq!(timeout(SOON, call).await.unwrap().unwrap(), 2);
    // Elsewhere there is nobody to let pass.
    timeout(SOON, after_queued()).await.unwrap();
}

#[tokio::test]
async fn a_panic_is_uncertain_and_holds_up_no_other() {
    let work = blocking(|| -> Result<(), BackendError> { panic!("on purpose") });
    let call = blocking_call(async { Err::<(), _>(panic_in_step().await) });
    for error in [
        timeout(SOON, work).await.unwrap().unwrap_err(),
        timeout(SOON, call).await.unwrap().unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Uncertain);
    }
    assert_eq!(blocking(|| Ok(1)).await.unwrap(), 1);
}

async fn panic_in_step() -> BackendError {
    panic!("on purpose")
}

#[tokio::test]
async fn what_nobody_waits_for_is_done_all_the_same() {
    let (done, told) = mpsc::channel();
    let call = blocking_call(async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        blocking_step(move || Ok(done.send(()).is_ok())).await
    });
    drop(call);
    let told = tokio::task::spawn_blocking(move || told.recv_timeout(SOON));
    told.await.unwrap().unwrap();
}

#[test]
fn the_end_of_a_runtime_cuts_off_what_waits_and_leaves_nothing() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let (ending, other) = (runtime(), runtime());
    let begun = Arc::new(AtomicUsize::new(0));
    let call = {
        let _inside = ending.enter();
        let begun = begun.clone();
        blocking_call(async move {
            begun.fetch_add(1, SeqCst);
            std::future::pending::<()>().await;
            Ok(())
        })
    };
    while begun.load(SeqCst) == 0 {
        thread::yield_now();
    }
    drop(ending);
    let error = other.block_on(async { timeout(SOON, call).await.unwrap() });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Uncertain);
    assert_eq!(other.block_on(blocking(|| Ok(3))).unwrap(), 3);
}

#[tokio::test]
async fn a_call_hears_of_an_event_that_comes_while_it_is_on_its_way_to_a_thread() {
    for _ in 0..200 {
        let (send, event) = oneshot::channel();
        let call = blocking_call(async move {
            let steps = async {
                tokio::task::yield_now().await;
                for _ in 0..3 {
                    blocking_step(|| Ok(())).await?;
                }
                Ok::<_, BackendError>(send.send(7))
            };
            let (sent, heard) = futures_util::future::join(steps, event).await;
            assert_eq!(sent?, Ok(()));
            heard.map_err(|error| BackendError::other(error.to_string()))
        });
        assert_eq!(timeout(SOON, call).await.unwrap().unwrap(), 7);
    }
}

#[tokio::test]
async fn steps_of_a_call_may_be_polled_one_by_one() {
    let call = blocking_call(async {
        tokio::task::yield_now().await;
        let step = |number: usize| async move {
            after_queued().await;
            blocking_step(move || Ok(number)).await
        };
        // More than are polled all at once.
        let steps = futures_util::future::try_join_all((0..100).map(step));
        Ok(steps.await?.into_iter().sum::<usize>())
    });
    assert_eq!(timeout(SOON, call).await.unwrap().unwrap(), 4950);
}
