//! What a manager cannot do without, as baselines of the same run.

use std::future::Future;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, BenchmarkId, measurement::WallTime};
use dashmap::DashMap;
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

/// A look-up in a `DashMap` of so many, in turn of a few that are spread over all.
pub(crate) fn look_up(group: &mut BenchmarkGroup<'_, WallTime>, count: usize, in_turn: usize) {
    let map: DashMap<u64, Arc<u64>> = (0..count as u64).map(|n| (n, Arc::new(n))).collect();
    let keys: Vec<u64> = (0..in_turn).map(|n| (n * count / in_turn) as u64).collect();
    let mut turn = 0;
    let name = BenchmarkId::from_parameter(format!("{count}_look_up"));
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            turn = (turn + 1) % in_turn;
            black_box(map.get(&keys[turn]).map(|found| **found))
        });
    });
}

/// Locks a mutex that nobody else wants, and waits for a task that does nothing.
pub(crate) fn lock_and_task() -> impl FnMut() -> BoxedRound + Send + 'static {
    let mutex = Arc::new(Mutex::new(0_u64));
    move || {
        let mutex = Arc::clone(&mutex);
        Box::pin(async move {
            *mutex.lock().await += 1;
            tokio::spawn(async {}).await.unwrap();
        })
    }
}

pub(crate) type BoxedRound = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// The time of `rounds` rounds, spread over so many tasks; each makes its own `round`.
pub(crate) fn by_tasks<R, F>(
    runtime: &Runtime,
    tasks: usize,
    rounds: u64,
    start: impl Fn(usize) -> R,
) -> Duration
where
    R: FnMut() -> F + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let each = rounds.div_ceil(tasks as u64);
    let work: Vec<R> = (0..tasks).map(start).collect();
    runtime.block_on(async {
        let began = Instant::now();
        let running: Vec<_> = work
            .into_iter()
            .map(|mut round| {
                tokio::spawn(async move {
                    for _ in 0..each {
                        round().await;
                    }
                })
            })
            .collect();
        for task in running {
            task.await.unwrap();
        }
        began.elapsed()
    })
}
