//! Reading the file of a server again, at SIGHUP: who may connect, and which virtual machines have come and gone.

use blockmount::{BackendError, ErrorKind};
use blockmount_containerd::service::{Activations, Peers, VmName};

use super::guests::Guests;
use super::web::Sources;
use super::{Socket, systemd};
use crate::args::{ServeArgs, Served};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::terminal::{note, say};

/// What changes with the file of a server that goes on.
pub(super) struct Reloading<'a> {
    pub(super) args: &'a mut ServeArgs,
    pub(super) peers: &'a Peers,
    pub(super) socket: &'a Socket,
    pub(super) guests: &'a mut Guests,
    pub(super) activations: &'a Activations,
    pub(super) sources: &'a Sources,
}

impl Reloading<'_> {
    /// Reads the file, and follows it as far as it makes sense.
    pub(super) async fn run(&mut self, interrupt: &Interrupt) {
        systemd::notify_reloading();
        // A file may be on a disk that does not answer: what else the server does goes on meanwhile.
        let (args, lost) = (self.args.clone(), self.guests.lost());
        let of_lost = lost.clone();
        let read = tokio::task::spawn_blocking(move || args.read_again(&of_lost)).await;
        let read = read
            .unwrap_or_else(|error| Err(Failure::new("the file could not be read").because(error)));
        match read {
            Err(failure) => say(format_args!("SIGHUP: nothing is changed: {failure}")),
            Ok(again) => {
                self.peers.allow_only(again.users);
                if let Err(failure) = self.socket.follow(self.peers) {
                    say(format_args!("SIGHUP: {}", failure.on_one_line()));
                }
                note(format_args!(
                    "SIGHUP: the users that may connect were read again"
                ));
                if !again.keys.is_empty() {
                    say(format_args!(
                        "SIGHUP: what the file says of {} has changed, which takes effect at the next start of the server",
                        again.keys.join(", ")
                    ));
                }
                for name in &again.changed {
                    say(format_args!(
                        "SIGHUP: what the file says of the virtual machine {name} has changed, which takes effect at the next start of the server"
                    ));
                }
                let (mut retired, mut last) = (Vec::new(), Vec::new());
                for name in again.removed {
                    match self.activations.remove_vm(&name) {
                        // Another one may be in its place in a moment.
                        Err(error) if error.kind() == ErrorKind::Invalid => last.push(name),
                        removed => self.leave_out(name, removed, &mut retired, interrupt).await,
                    }
                }
                self.activations.retire_only(&retired);
                for served in again.added {
                    let dead = served.name.clone().filter(|name| lost.contains(name));
                    if let Some(name) = dead
                        && !self.clear(&name, interrupt).await
                    {
                        continue;
                    }
                    self.take_in(served, interrupt).await;
                }
                for name in last {
                    let removed = self.activations.remove_vm(&name);
                    self.leave_out(name, removed, &mut retired, interrupt).await;
                }
                self.activations.retire_only(&retired);
            }
        }
        systemd::notify("READY=1");
    }

    /// Makes room for another machine in the place of one that is lost. False if something is activated in it still.
    async fn clear(&mut self, name: &VmName, interrupt: &Interrupt) -> bool {
        if let Err(error) = self.activations.remove_vm(name) {
            say(format_args!(
                "SIGHUP: the virtual machine {name} is lost, and is not replaced: {error}; send SIGHUP again when that has changed"
            ));
            return false;
        }
        if let Err(failure) = self.end(name, interrupt).await {
            say(format_args!(
                "SIGHUP: something of the virtual machine {name}, which is lost, stays: {}",
                failure.on_one_line()
            ));
        }
        true
    }

    async fn take_in(&mut self, served: Served, interrupt: &Interrupt) {
        let Some(name) = served.name.clone() else {
            return;
        };
        if let Some(other) = self.args.serves_as(&served) {
            return say(format_args!(
                "SIGHUP: the virtual machine {name} is the one that is served as {other}, and stays that until the next start of the \
                 server"
            ));
        }
        let taken = self
            .guests
            .take_in(self.args, &served, self.activations, interrupt);
        match taken.await {
            Ok(()) => {
                self.args.remember(served);
                self.sources.set(self.guests.sources());
                note(format_args!(
                    "SIGHUP: the virtual machine {name} is served from now on"
                ));
            }
            Err(failure) => say(format_args!(
                "SIGHUP: the virtual machine {name} is not taken in: {}",
                failure.on_one_line()
            )),
        }
    }

    async fn leave_out(
        &mut self,
        name: VmName,
        removed: Result<(), BackendError>,
        retired: &mut Vec<VmName>,
        interrupt: &Interrupt,
    ) {
        match removed {
            Ok(()) => self.see_off(name, interrupt).await,
            Err(error) if error.kind() == ErrorKind::Busy => {
                say(format_args!(
                    "SIGHUP: the virtual machine {name} is not in the file any more, takes nothing more, and goes when nothing is \
                     activated in it: {error}"
                ));
                retired.push(name);
            }
            Err(error) => say(format_args!(
                "SIGHUP: the virtual machine {name} is not in the file any more, and is served still: {error}"
            )),
        }
    }

    /// Ends one that has been removed.
    pub(super) async fn see_off(&mut self, name: VmName, interrupt: &Interrupt) {
        match self.end(&name, interrupt).await {
            Ok(()) => note(format_args!(
                "the virtual machine {name} is not served any more"
            )),
            Err(failure) => say(format_args!(
                "the virtual machine {name} is not served any more: {}",
                failure.on_one_line()
            )),
        }
    }

    /// Ends one that the service does not know any more.
    async fn end(&mut self, name: &VmName, interrupt: &Interrupt) -> Result<(), Failure> {
        self.args.forget(name);
        let ended = self.guests.leave_out(name, interrupt).await;
        self.sources.set(self.guests.sources());
        ended
    }
}
