//! The queue of blocking work of each runtime, and the threads that work it off.
//!
//! The threads are those of the runtime (`spawn_blocking`), so that its end waits for work that has begun. Two for each
//! processor of the machine take work until the queue is empty, without being woken for each piece. Answers are given when the
//! queue is empty, or after [`LONGEST_DELAY`]: then the runtime is woken once for many of them.
//!
//! Work may wait, for a slow disk or for ever for a dead one. A thread whose work takes longer than [`STALL`] does not count any
//! more, and another takes its place. While all threads are busy and there is work in the queue, one more watches for that.

use std::collections::{HashMap, VecDeque};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::runtime::{Handle, Id};

/// How long the answer of finished work may wait for those of other work.
const LONGEST_DELAY: Duration = Duration::from_millis(5);

/// More answers than this do not wait for each other.
const MOST_ANSWERS: usize = 256;

/// Work that takes longer waits for something else than a processor.
const STALL: Duration = Duration::from_millis(3);

/// How many threads work for each processor: a mount waits for its disk about as long as it needs a processor.
const EACH: usize = 2;

/// How many threads work at once, besides those whose work waits for longer.
static THREADS: LazyLock<usize> =
    LazyLock::new(|| thread::available_parallelism().map_or(EACH, |count| count.get() * EACH));

/// Work in the queue.
pub(super) type Job = Box<dyn FnOnce() -> Outcome + Send>;

/// Tells whoever waits for work that it is done.
type Answer = Box<dyn FnOnce() + Send>;

/// What has become of work.
pub(super) enum Outcome {
    Done(Answer),
    /// The rest is to be done after what is in the queue.
    Again(Job),
    /// It goes on by itself.
    Elsewhere,
}

/// The work of one runtime.
#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// How many threads take work, or have been asked to.
    workers: usize,
    /// Since when each of those that have work has it, by their numbers.
    busy: Vec<(u64, Instant)>,
    /// Whether one more thread watches them.
    is_watched: bool,
    /// What tells of work that is done, and since when the first of them waits.
    answers: Vec<Answer>,
    since: Option<Instant>,
    /// The number of the next thread.
    next: u64,
}

/// Held for a few instructions, never while work or an answer runs. A runtime is in here while it has work.
static QUEUES: LazyLock<Mutex<HashMap<Id, Queue>>> = LazyLock::new(Mutex::default);

/// What those who watch sleep on. They wake up by the clock alone.
static WATCH: Condvar = Condvar::new();

impl Queue {
    /// How many threads work, besides those whose work waits.
    fn working(&self) -> usize {
        let has_stalled = |(_, since): &&(u64, Instant)| since.elapsed() > STALL;
        self.workers - self.busy.iter().filter(has_stalled).count()
    }

    /// How many more may.
    fn room(&self) -> usize {
        THREADS.saturating_sub(self.working())
    }

    /// The thread that is needed for what has just been queued.
    fn further_thread(&mut self) -> Option<Role> {
        if self.room() > 0 {
            return Some(self.add_worker());
        }
        let is_needed = !self.is_watched;
        self.is_watched = true;
        is_needed.then_some(Role::Watches)
    }

    fn add_worker(&mut self) -> Role {
        self.workers += 1;
        self.next += 1;
        Role::Works(self.next)
    }

    /// Notes what has become of work. The answers that are due now come back.
    fn note(&mut self, outcome: Outcome) -> Vec<Answer> {
        match outcome {
            Outcome::Done(answer) => {
                self.answers.push(answer);
                self.since.get_or_insert_with(Instant::now);
            }
            Outcome::Again(job) => self.jobs.push_back(job),
            Outcome::Elsewhere => {}
        }
        let is_late = |since: Instant| since.elapsed() >= LONGEST_DELAY;
        let is_due = self.jobs.is_empty()
            || self.answers.len() >= MOST_ANSWERS
            || self.since.is_some_and(is_late);
        match is_due {
            true => self.take_answers(),
            false => Vec::new(),
        }
    }

    fn take_answers(&mut self) -> Vec<Answer> {
        self.since = None;
        std::mem::take(&mut self.answers)
    }
}

fn give(answers: Vec<Answer>) {
    answers.into_iter().for_each(|answer| answer());
}

/// Queues work for the blocking threads of this runtime.
///
/// # Panics
///
/// Outside of a runtime.
pub(super) fn submit(job: Job) {
    let runtime = Handle::current();
    let id = runtime.id();
    let further = {
        let mut queues = QUEUES.lock();
        let queue = queues.entry(id).or_default();
        queue.jobs.push_back(job);
        queue.further_thread()
    };
    if let Some(role) = further {
        Thread { id, role }.start(&runtime);
    }
}

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// With its number.
    Works(u64),
    Watches,
    /// It is not counted any more.
    Over,
}

/// A thread that works or watches, or is about to. One that is dropped before it has begun, since its runtime ends, does not
/// count any more.
struct Thread {
    id: Id,
    role: Role,
}

/// What a thread does next.
enum Next {
    Work(Job),
    /// There is nothing left to do but to give these answers.
    End(Vec<Answer>),
}

impl Thread {
    fn start(self, runtime: &Handle) {
        drop(runtime.spawn_blocking(move || self.run()));
    }

    fn run(mut self) {
        match self.role {
            Role::Works(number) => self.work(number),
            Role::Watches => self.watch(),
            Role::Over => {}
        }
    }

    fn work(&mut self, number: u64) {
        let mut outcome = None;
        loop {
            let (answers, next) = self.next(number, outcome);
            give(answers);
            match next {
                Next::Work(job) => outcome = Some(job()),
                Next::End(answers) => return give(answers),
            }
        }
    }

    /// Notes what has become of the last work, and takes the next unless there is none, or others have come to do it.
    fn next(&mut self, number: u64, last: Option<Outcome>) -> (Vec<Answer>, Next) {
        let mut queues = QUEUES.lock();
        let Some(queue) = queues.get_mut(&self.id) else {
            return (Vec::new(), Next::End(Vec::new()));
        };
        queue.busy.retain(|(busy, _)| *busy != number);
        let answers = last.map_or_else(Vec::new, |outcome| queue.note(outcome));
        // Those that had stalled and go on make too many.
        let is_surplus = queue.working() > *THREADS;
        let job = match is_surplus {
            true => None,
            false => queue.jobs.pop_front(),
        };
        let next = match job {
            Some(job) => {
                queue.busy.push((number, Instant::now()));
                Next::Work(job)
            }
            None => {
                let last = queue.take_answers();
                let left = self.leave(&mut queues);
                drop(queues);
                drop(left);
                Next::End(last)
            }
        };
        (answers, next)
    }

    /// Sees to it that work is taken, and answers are given.
    fn watch(&mut self) {
        let mut queues = QUEUES.lock();
        loop {
            WATCH.wait_for(&mut queues, STALL);
            let Some(queue) = queues.get_mut(&self.id) else {
                return;
            };
            let answers = queue.take_answers();
            let needed = queue.room().min(queue.jobs.len());
            let id = self.id;
            let further = (0..needed).map(|_| queue.add_worker());
            let further: Vec<Thread> = further.map(|role| Thread { id, role }).collect();
            let left = match queue.jobs.is_empty() {
                true => Some(self.leave(&mut queues)),
                false => None,
            };
            drop(queues);
            give(answers);
            for thread in further {
                thread.start(&Handle::current());
            }
            if left.is_some() {
                return;
            }
            queues = QUEUES.lock();
        }
    }

    /// Does not count any more. What is left if this was the last thread, which is something only if the runtime ends.
    fn leave(&mut self, queues: &mut HashMap<Id, Queue>) -> Option<Queue> {
        let role = std::mem::replace(&mut self.role, Role::Over);
        let queue = queues.get_mut(&self.id)?;
        match role {
            Role::Works(number) => {
                queue.workers -= 1;
                queue.busy.retain(|(busy, _)| *busy != number);
            }
            Role::Watches => queue.is_watched = false,
            Role::Over => return None,
        }
        let is_last = queue.workers == 0 && !queue.is_watched;
        is_last.then(|| queues.remove(&self.id)).flatten()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if self.role == Role::Over {
            return;
        }
        let left = {
            let mut queues = QUEUES.lock();
            self.leave(&mut queues)
        };
        // Without the lock: who waits for the work hears that it is cut off.
        if let Some(mut left) = left {
            give(left.take_answers());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Box::new(|| Outcome::Elsewhere)
    }

    fn done() -> Outcome {
        Outcome::Done(Box::new(|| {}))
    }

    /// A time that no answer has waited since.
    fn later() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(3600))
    }

    #[test]
    fn answers_come_together_once_there_is_no_work_or_the_first_has_waited() {
        let mut queue = Queue::default();
        queue.jobs.push_back(job());
        queue.since = later();
        assert!(queue.note(done()).is_empty());
        queue.jobs.clear();
        assert_eq!(queue.note(done()).len(), 2);
        queue.jobs.push_back(job());
        queue.since = later();
        assert!(queue.note(done()).is_empty());
        queue.since = Instant::now().checked_sub(LONGEST_DELAY);
        assert_eq!(queue.note(Outcome::Elsewhere).len(), 1);
        queue.since = later();
        for _ in 1..MOST_ANSWERS {
            assert!(queue.note(done()).is_empty());
        }
        assert_eq!(queue.note(done()).len(), MOST_ANSWERS);
        assert!(queue.note(Outcome::Elsewhere).is_empty());
    }

    #[test]
    fn what_lets_others_pass_comes_after_what_is_queued() {
        let mut queue = Queue::default();
        let (asked, told) = std::sync::mpsc::channel();
        let says = |name: &'static str| -> Job {
            let asked = asked.clone();
            Box::new(move || {
                asked.send(name).unwrap();
                Outcome::Elsewhere
            })
        };
        queue.jobs.push_back(says("other"));
        queue.note(Outcome::Again(says("rest")));
        queue.jobs.drain(..).for_each(|job| drop(job()));
        assert_eq!(
            [told.recv().unwrap(), told.recv().unwrap()],
            ["other", "rest"]
        );
    }

    #[test]
    fn a_thread_counts_again_once_it_goes_on() {
        let mut queue = Queue::default();
        for _ in 0..*THREADS {
            assert!(matches!(queue.further_thread(), Some(Role::Works(_))));
        }
        assert_eq!(queue.further_thread(), Some(Role::Watches));
        assert_eq!(queue.further_thread(), None);
        queue.busy.extend(later().map(|since| (1, since)));
        assert_eq!(queue.room(), 0);
        let stalled = Instant::now() - (STALL + Duration::from_millis(1));
        queue.busy[0].1 = stalled;
        assert_eq!(queue.room(), 1);
        assert!(matches!(queue.further_thread(), Some(Role::Works(_))));
        queue.busy.clear();
        assert_eq!(queue.working(), *THREADS + 1);
        assert_eq!(queue.room(), 0);
    }
}
