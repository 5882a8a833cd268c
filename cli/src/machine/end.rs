//! The way out of a run: what is released, what is said of it, and which files stay.

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount::{ErrorKind, Step};
use blockmount_loopback::SCHEME;

use super::{Machine, Mounted};
use crate::failure::{Failure, printable};
use crate::guest::{Guest, QemuGuest};
use crate::interrupt::{Further, Interrupt};
use crate::kernel::Ours;
use crate::recorder::Recorder;
use crate::run::sudo;
use crate::terminal::say;

/// How a run has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// What was ours, for a look at the kernel's tables.
    pub(crate) ours: Ours,
    /// What was found in the guest and in its hypervisor that had not been there at the start.
    pub(crate) left_in_guest: Vec<String>,
    pub(crate) result: Result<(), Failure>,
    /// The image files of an earlier program's mount that could not be resumed.
    pub(crate) kept: Option<PathBuf>,
}

/// Between two attempts to release what somebody uses. The kernel has no event for the end of a use.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);
/// How often a tear-down is tried that fails for another reason than being in use.
const ATTEMPTS: u32 = 3;

impl Machine {
    /// Releases views and the stack that they show. What fails stays pending in the manager: the end of the run retries it, or says who uses it.
    ///
    /// A signal since `further` gives up on what somebody uses.
    pub(crate) async fn release(&mut self, mounted: Mounted, further: Further) {
        if self.guest.lost().is_some() {
            // Nobody is there who could release it.
            return std::mem::forget(mounted);
        }
        self.further = Some(further);
        self.run.mark_unheld();
        let Mounted { stack, views } = mounted;
        let releasing = async {
            for view in views {
                if let Err(error) = view.release().await {
                    tracing::info!(%error, "a view could not be released at once");
                }
            }
            stack.release().await
        };
        let Some(released) = self.unless_given_up(releasing).await else {
            return;
        };
        if let Err(error) = released {
            tracing::info!(%error, "the stack could not be released at once");
            self.lost.extend(lost_writes(error.errors()));
        }
    }

    /// The outcome of some work; none once a further signal has come, where the guest is somebody else's: it may hang, and is not
    /// killed for that.
    async fn unless_given_up<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let Some(further) = self.further.as_mut().filter(|_| self.guest.is_foreign()) else {
            return Some(work.await);
        };
        tokio::select! {
            done = work => Some(done),
            signal = further.next() => {
                say(format_args!("{signal}: giving up on the guest, and leaving it as it is"));
                self.gave_up = Some(signal);
                None
            }
        }
    }

    /// Ends the run: waits for work under way, tears down whatever is still there, ends the guest, removes the files.
    ///
    /// What somebody uses is waited for; a further signal makes it give up, with an error that names what stays.
    /// Writes that were lost are an error too, though nothing stays.
    pub(crate) async fn end(mut self, interrupt: &Interrupt) -> Ended {
        let ours = self.ours();
        let kept = self.not_resumed.then(|| self.run.work_dir().to_owned());
        let scratch = Some(self.scratch()).filter(|scratch| scratch.exists());
        interrupt.now("waiting for the work under way to stop");
        interrupt.settled().await;
        interrupt.now("releasing disks and mounts");
        self.further.get_or_insert_with(|| interrupt.further());
        let result = match self.guest.lost() {
            _ if self.gave_up.is_some() => Err(self.given_up()),
            Some(why) => Err(Failure::new("nothing could be released").because(why.to_owned())),
            None => self.drain(interrupt).await,
        };
        let (shown, unread) = match self.end_shown().await {
            Ok(unread) => (Ok(()), unread),
            Err(stays) => (Err(stays), None),
        };
        let result = result.and(shown);
        let (left_in_guest, mut result) = self.end_guest(result, interrupt).await;
        // A VM that is gone has taken along whatever could not be released; what it has written to a scratch stays for
        // whoever knows its name.
        let is_gone = |guest: &QemuGuest| guest.is_own() || guest.has_ended();
        let gone =
            matches!(&self.guest, Guest::Qemu(guest) if is_gone(guest)) && !self.run.is_named();
        let lost_writes = !self.lost.is_empty();
        if lost_writes && scratch.is_some() {
            self.run.mark_lost("writes to its scratch were lost");
            self.run.leave();
        } else if !self.not_resumed && (result.is_ok() || gone) {
            interrupt.now("removing this run's files");
            drop(self.guest);
            result = result.and(self.run.finish());
        } else {
            // What a clean-up needs to know stays as it is.
            self.run.leave();
        }
        if result.is_ok() && lost_writes {
            result = Err(lost_writes_failure(&self.lost, scratch.as_deref()));
        }
        if let (Ok(()), Some(unread)) = (&result, unread) {
            result = Err(unread);
        }
        Ended {
            ours,
            left_in_guest,
            result,
            kept,
        }
    }

    /// Ends a guest that is a VM, unless what is in it could not be released and may be wanted. What was found in it that had
    /// not been there at the start; and the result, with what the VM has to say.
    async fn end_guest(
        &mut self,
        mut result: Result<(), Failure>,
        interrupt: &Interrupt,
    ) -> (Vec<String>, Result<(), Failure>) {
        let mut left = Vec::new();
        let Guest::Qemu(guest) = &mut self.guest else {
            return (left, result);
        };
        if guest.is_own() {
            interrupt.now("ending the virtual machine");
        }
        let is_lost = guest.lost().is_some() || self.gave_up.is_some();
        if !is_lost {
            match guest.left_over().await {
                Ok(found) => left = found,
                Err(failure) => result = result.and(Err(failure)),
            }
        }
        // A VM that did not live explains whatever else has failed.
        result = guest.verdict().await.and(result);
        // What it has mounted, unknown to us or out of reach, is not all written yet.
        let is_wanted = self.not_resumed || is_lost && self.run.is_named();
        if !is_wanted || result.is_ok() && left.is_empty() {
            guest.end().await;
        }
        (left, result)
    }

    fn ours(&self) -> Ours {
        let recorders = [&self.recorder, &self.helper_recorder].into_iter();
        let attached = recorders.flat_map(Recorder::all_attached);
        let attached = attached.filter(|(_, at)| at.locator.transport() == SCHEME);
        Ours {
            mark: self.run.mark(),
            directories: vec![
                self.run.directory().to_owned(),
                self.run.work_dir().to_owned(),
            ],
            targets: self.targets.clone(),
            loops: attached
                .map(|(source, at)| {
                    let file = source.canonicalize().unwrap_or(source);
                    (format!("{SCHEME}{}", at.locator.address()), file)
                })
                .collect(),
        }
    }

    async fn drain(&mut self, interrupt: &Interrupt) -> Result<(), Failure> {
        let mut attempts = 0;
        let mut said = String::new();
        let (helper, manager) = (self.helper.clone(), self.manager.clone());
        loop {
            let draining = async { (helper.drain().await, manager.drain().await) };
            let Some((helper, main)) = self.unless_given_up(draining).await else {
                return Err(self.given_up());
            };
            let in_use = helper.in_use + main.in_use;
            // A journal that cannot be told of what is torn down is removed with the other files of this run.
            let failed = helper.failed.into_iter().chain(main.failed);
            let failed = failed.filter(|error| error.step() != Step::Record);
            let failed: Vec<blockmount::Error> = failed.collect();
            if failed.is_empty() && in_use == 0 {
                return Ok(());
            }
            self.lost.extend(lost_writes(&failed));
            let in_use_elsewhere = failed.iter().any(|error| error.kind() == ErrorKind::Busy);
            let busy = !self.not_resumed && in_use_elsewhere;
            attempts += u32::from(!busy);
            let waiting = describe(&failed, in_use);
            if attempts >= ATTEMPTS {
                return Err(self.stays(&waiting));
            }
            interrupt.now(format!("waiting for another user: {waiting}"));
            if busy && waiting != said {
                say(format_args!("waiting: {waiting}"));
                say(format_args!(
                    "  until they release it; another signal (Ctrl-C) gives up and leaves it"
                ));
                said = waiting.clone();
            }
            let further = self.further.get_or_insert_with(|| interrupt.further());
            tokio::select! {
                () = tokio::time::sleep(BETWEEN_ATTEMPTS) => {}
                _ = further.next(), if busy => return Err(self.stays(&waiting)),
            }
        }
    }

    fn given_up(&self) -> Failure {
        let signal = self.gave_up.unwrap_or("a signal");
        self.stays(&format!(
            "{signal} was a further signal, and made blockmount give up on the guest"
        ))
    }

    fn stays(&self, what: &str) -> Failure {
        // A mount that could not be resumed is only removed by who says so.
        let named = match self.not_resumed && self.run.is_named() {
            true => " --resumable",
            false => "",
        };
        Failure::new("not everything could be released")
            .because(what.to_owned())
            .advise(format!(
                "when it is no longer in use, run: {}blockmount cleanup{named}",
                sudo()
            ))
    }
}

fn lost_writes<'a>(
    errors: impl IntoIterator<Item = &'a blockmount::Error>,
) -> impl Iterator<Item = blockmount::Error> {
    let errors = errors.into_iter().cloned();
    errors.filter(|error| error.kind() == ErrorKind::LostWrites)
}

/// Everything is released, but not all that was written has reached the image.
fn lost_writes_failure(lost: &[blockmount::Error], scratch: Option<&Path>) -> Failure {
    let failure = Failure::new("everything is released, but writes were lost");
    let advice =
        "see the kernel's log, and free some space where the image is: a scratch is below /var/tmp";
    let advice = match scratch {
        None => advice.to_owned(),
        Some(scratch) => {
            let scratch = printable(scratch.display());
            format!(
                "{advice}; this one is kept as {scratch} with what has reached it; to discard it: \
                 {}blockmount cleanup --resumable",
                sudo()
            )
        }
    };
    failure.because(describe(lost, 0)).advise(advice)
}

/// What keeps a tear-down from being done, on one line.
fn describe(failed: &[blockmount::Error], in_use: usize) -> String {
    let mut lines: Vec<String> = failed
        .iter()
        .map(|error| format!("{error}: {}", error.cause()))
        .collect();
    if in_use > 0 {
        lines.push(format!("{in_use} still held by this program"));
    }
    lines.join("; ")
}
