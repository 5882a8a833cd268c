//! Work in pieces, on all cores.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::error::VerityError;

/// Does pieces 0 to `count` on all cores. Each thread makes its own buffers, and takes the next piece when it is done with
/// one. Answers the error of the first piece that failed, by number: all before it have been done.
pub(crate) fn for_each<B>(
    count: u64,
    buffers: impl Fn() -> B + Sync,
    piece: impl Fn(&mut B, u64) -> Result<(), VerityError> + Sync,
) -> Result<(), VerityError> {
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        let mut buffers = buffers();
        while !failed.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            if let Err(error) = piece(&mut buffers, number) {
                failed.store(true, Ordering::Relaxed);
                return Some((number, error));
            }
        }
        None
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(usize::try_from(count).unwrap_or(cores));
    if threads < 2 {
        return work().map_or(Ok(()), |(_, error)| Err(error));
    }
    let failures = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        // A panic goes on in the caller.
        let ended = joined.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        ended.flatten().collect::<Vec<_>>()
    });
    let first = failures.into_iter().min_by_key(|(number, _)| *number);
    first.map_or(Ok(()), |(_, error)| Err(error))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use crate::error::Corrupt;

    use super::*;

    #[test]
    fn each_piece_is_done_once() {
        for count in [0, 1, 2, 1000] {
            let done = Mutex::new(Vec::new());
            let piece = |(): &mut (), number| {
                done.lock().unwrap().push(number);
                Ok(())
            };
            for_each(count, || (), piece).unwrap();
            let mut done = done.into_inner().unwrap();
            done.sort_unstable();
            assert_eq!(done, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_first_failure_is_reported_and_ends_the_work() {
        let seen = AtomicU64::new(0);
        let piece = |(): &mut (), number| {
            seen.fetch_add(1, Ordering::Relaxed);
            match number >= 10 {
                true => Err(Corrupt::DataBlock { number }.into()),
                false => Ok(()),
            }
        };
        let failed = for_each(1 << 40, || (), piece).unwrap_err();
        assert_eq!(failed.to_string(), "data block 10 is corrupt");
        assert!(seen.into_inner() < 1000);
    }
}
