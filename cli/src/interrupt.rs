//! Signals: the first stops the work, the others ask how the clean-up is going.

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::failure::Failure;
use crate::terminal::say;

/// Whether a signal asked the program to end, for whoever works.
///
/// Nothing is dropped half-way: each step comes to its end, and looks ([`check`](Self::check)) before the
/// next one. Long work on threads of its own looks now and then, and is waited for before
/// anything is torn down under it ([`blocking`](Self::blocking), [`settled`](Self::settled)).
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(Arc<State>);

/// How soon after the first a signal of the same kind counts as the same: less than anybody takes to read what was said.
const REPEATED: Duration = Duration::from_millis(200);

#[derive(Debug)]
struct State {
    token: CancellationToken,
    first: OnceLock<&'static str>,
    /// The last further signal.
    further: watch::Sender<&'static str>,
    doing: Mutex<String>,
    workers: TaskTracker,
}

/// The signals of this program, which from then on do not end it.
#[derive(Debug)]
pub(crate) struct Signals(Vec<(Signal, &'static str)>);

impl Signals {
    /// Takes over SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2, and has files that grow beyond a limit be errors.
    ///
    /// To be called while no runtime runs. A signal between the moment in which the kernel has its handler and that in which
    /// its listener is there is handed on by whichever runtime runs first, and would be lost if one ran now.
    pub(crate) fn take_over() -> io::Result<Self> {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build()?;
        // It is needed by the call below, and never driven.
        let _entered = runtime.enter();
        let signals = [
            (SignalKind::interrupt(), "SIGINT"),
            (SignalKind::terminate(), "SIGTERM"),
            (SignalKind::hangup(), "SIGHUP"),
            // These mean nothing here, and would end the program without a release.
            (SignalKind::user_defined1(), "SIGUSR1"),
            (SignalKind::user_defined2(), "SIGUSR2"),
        ];
        let signals = signals.map(|(kind, name)| Ok((signal(kind)?, name)));
        let signals = signals.into_iter().collect::<io::Result<_>>()?;
        // Whoever writes too much is told by EFBIG as well, as long as the signal does not end the program.
        let too_large = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
        drop(signal(too_large)?);
        Ok(Signals(signals))
    }
}

impl Signals {
    /// Takes SIGHUP out, for a program that reads its file again then.
    pub(crate) fn without_hangup(mut self) -> (Self, Option<Signal>) {
        let at = self.0.iter().position(|(_, name)| *name == "SIGHUP");
        let hangup = at.map(|at| self.0.remove(at).0);
        (self, hangup)
    }
}

impl Interrupt {
    /// One that hears of no signal yet.
    pub(crate) fn new() -> Self {
        Interrupt(Arc::new(State {
            token: CancellationToken::new(),
            first: OnceLock::new(),
            further: watch::Sender::default(),
            doing: Mutex::new("releasing everything".to_owned()),
            workers: TaskTracker::new(),
        }))
    }

    /// Listens to signals from when they were taken over. Needs a runtime.
    pub(crate) fn listen(signals: Signals) -> Self {
        let interrupt = Interrupt::new();
        for (signals, name) in signals.0 {
            tokio::spawn(interrupt.clone().watch(signals, name));
        }
        interrupt
    }

    async fn watch(self, mut signals: Signal, name: &'static str) {
        while signals.recv().await.is_some() {
            if self.0.first.set(name).is_ok() {
                self.0.token.cancel();
                // What sudo, a shell and the terminal each pass on is one wish of the user's, who has seen no answer yet.
                let answered = tokio::time::Instant::now() + REPEATED;
                let again = async { while signals.recv().await.is_some() {} };
                let _ = tokio::time::timeout_at(answered, again).await;
                continue;
            }
            say(format_args!("{name}: not yet, still {}", self.doing()));
            self.0.further.send_replace(name);
        }
    }

    /// The signal that asked for the end, if one has.
    pub(crate) fn signal(&self) -> Option<&'static str> {
        self.0.first.get().copied()
    }

    /// Waits for a signal, and names it. Cancel safe.
    pub(crate) async fn requested(&self) -> &'static str {
        self.0.token.cancelled().await;
        self.signal().unwrap_or("a signal")
    }

    /// The signals after this call; the first of all does not count.
    pub(crate) fn further(&self) -> Further {
        Further(self.0.further.subscribe())
    }

    /// Says what a further signal has to wait for.
    pub(crate) fn now(&self, doing: impl Into<String>) {
        *self.0.doing.lock().unwrap_or_else(PoisonError::into_inner) = doing.into();
    }

    fn doing(&self) -> String {
        self.0
            .doing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// An error as soon as a signal has come.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.0.token.is_cancelled() {
            true => Err(Failure::interrupted(self.signal().unwrap_or("a signal"))),
            false => Ok(()),
        }
    }

    /// Does work that blocks, on a thread of its own. The work looks at the token now and then.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Stop) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let stop = Stop(self.clone());
        match self.0.workers.spawn_blocking(move || work(&stop)).await {
            Ok(result) => result,
            Err(error) => Err(Failure::new("a worker was lost").because(error)),
        }
    }

    /// Does work that must not be dropped half-way although its caller may be.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.0.workers.spawn(work)
    }

    /// Waits until all work on threads of its own has ended.
    pub(crate) async fn settled(&self) {
        self.0.workers.close();
        self.0.workers.wait().await;
    }

    /// The token itself, for work that can wait for it.
    pub(crate) fn token(&self) -> &CancellationToken {
        &self.0.token
    }
}

/// Further signals, also those that come while nobody waits for them.
#[derive(Debug)]
pub(crate) struct Further(watch::Receiver<&'static str>);

impl Further {
    /// Waits for the next one, and names it. Cancel safe.
    pub(crate) async fn next(&mut self) -> &'static str {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
        *self.0.borrow_and_update()
    }
}

/// What blocking work looks at between two pieces.
#[derive(Clone, Debug)]
pub(crate) struct Stop(Interrupt);

impl Stop {
    /// An error as soon as a signal has come.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        self.0.check()
    }

    /// Does work that asks a closure now and then whether to stop.
    pub(crate) fn bound<T>(
        &self,
        work: impl FnOnce(&dyn Fn() -> bool) -> io::Result<T>,
    ) -> Result<T, Failure> {
        work(&|| self.check().is_err()).map_err(|error| match self.check() {
            Err(stopped) if error.kind() == io::ErrorKind::Interrupted => stopped,
            _ => Failure::of_io(error),
        })
    }

    /// One that never stops, for tests.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        Stop(Interrupt::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_before_the_first_listener_is_not_lost() {
        let signals = Signals::take_over().unwrap();
        let this = rustix::process::getpid();
        rustix::process::kill_process(this, rustix::process::Signal::USR2).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let interrupt = Interrupt::listen(signals);
            let requested = interrupt.requested();
            let signal = tokio::time::timeout(Duration::from_secs(60), requested).await;
            assert_eq!(signal, Ok("SIGUSR2"));
        });
    }

    #[tokio::test]
    async fn a_further_signal_between_two_waits_is_not_lost() {
        let Stop(interrupt) = Stop::never();
        let mut further = interrupt.further();
        let no_time = Duration::from_millis(1);
        assert!(tokio::time::timeout(no_time, further.next()).await.is_err());
        interrupt.0.further.send_replace("SIGTERM");
        assert_eq!(further.next().await, "SIGTERM");
        assert!(tokio::time::timeout(no_time, further.next()).await.is_err());
    }
}
