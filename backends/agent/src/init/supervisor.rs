//! Children that are always there: started, reaped, and started again.

use std::convert::Infallible;
use std::ffi::OsString;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use crate::AgentError;
use crate::error::Context;
use crate::log::say;

/// Who has lived this long is started again at once.
const LONG: Duration = Duration::from_secs(1);
/// How long the next start of a short-lived child is put off: the first time, and at most.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Without any child of ours there would be nothing to wait for.
const IDLE: Duration = Duration::from_secs(3600);

/// Children that are kept running.
#[derive(Debug, Default)]
pub(super) struct Supervisor(Vec<Kept>);

#[derive(Debug)]
struct Kept {
    name: String,
    /// The program, and its arguments.
    words: Vec<OsString>,
    child: Option<Pid>,
    started: Instant,
    due: Instant,
    pause: Duration,
}

impl Supervisor {
    /// Adds a child that is to be kept running: a program and its arguments.
    pub(super) fn keep(&mut self, name: String, words: Vec<OsString>) {
        let now = Instant::now();
        self.0.push(Kept {
            name,
            words,
            child: None,
            started: now,
            due: now,
            pause: Duration::ZERO,
        });
    }

    /// Keeps them running, and reaps every child that this process inherits.
    ///
    /// # Errors
    ///
    /// Only before it has begun.
    pub(super) async fn run(mut self) -> Result<Infallible, AgentError> {
        // Before the first child: the end of each is heard of.
        let mut ended = signal(SignalKind::child())
            .context(|| "cannot listen to the ends of children".to_owned())?;
        loop {
            self.reap();
            let now = Instant::now();
            for kept in &mut self.0 {
                if kept.child.is_none() && kept.due <= now {
                    kept.start();
                }
            }
            let waiting = self.0.iter().filter(|kept| kept.child.is_none());
            let due = waiting.map(|kept| kept.due).min();
            tokio::select! {
                _ = ended.recv() => {}
                () = sleep_until(due.unwrap_or(now + IDLE)) => {}
            }
        }
    }

    /// Takes the status of every child that has ended, of orphans too.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(kept) = self.0.iter_mut().find(|kept| kept.child == Some(pid)) {
                let how = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("with status {code}"),
                    (_, Some(signal)) => format!("by signal {signal}"),
                    _ => "somehow".to_owned(),
                };
                kept.has_ended(Instant::now());
                say(format_args!(
                    "blockmount init: the {} ended {how}",
                    kept.name
                ));
            }
        }
    }
}

impl Kept {
    fn start(&mut self) {
        self.started = Instant::now();
        let (program, arguments) = self.words.split_first().expect("there is a program");
        let mut command = Command::new(program);
        command.args(arguments);
        // What they say ends up in a file of the host.
        match command.env("NO_COLOR", "1").spawn() {
            // Its status is taken with those of all others.
            Ok(child) => self.child = Pid::from_raw(child.id().cast_signed()),
            Err(error) => {
                say(format_args!(
                    "blockmount init: cannot start the {}: {error}",
                    self.name
                ));
                self.has_ended(self.started);
            }
        }
    }

    /// Settles when it is due again.
    fn has_ended(&mut self, now: Instant) {
        self.child = None;
        self.pause = match now.duration_since(self.started) >= LONG {
            true => Duration::ZERO,
            false => (self.pause * 2).clamp(PAUSE, LONGEST_PAUSE),
        };
        self.due = now + self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_ends_at_once_is_put_off_longer_and_longer_and_others_are_not() {
        let mut supervisor = Supervisor::default();
        supervisor.keep("agent".to_owned(), vec!["agent".into()]);
        let kept = &mut supervisor.0[0];
        let start = kept.started;
        let pauses: Vec<u128> = (0..9)
            .map(|_| {
                kept.has_ended(start);
                (kept.due - start).as_millis()
            })
            .collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        kept.has_ended(start + LONG);
        assert_eq!(kept.due, start + LONG);
    }
}
