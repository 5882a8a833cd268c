//! Reading the file of a server again, at SIGHUP: who may connect, and which virtual machines have come and gone.

use blockmount::{BackendError, ErrorKind};
use blockmount_containerd::service::{Activations, Peers, VmName};

use super::guests::Guests;
use super::web::Sources;
use super::{Socket, systemd};
use crate::args::{ServeArgs, Served};
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
        match self.args.read_again() {
            Err(failure) => say(format_args!("SIGHUP: nothing is changed: {failure}")),
            Ok(again) => {
                self.peers.allow_only(again.users);
                if let Err(failure) = self.socket.follow(self.peers) {
                    say(format_args!("SIGHUP: {}", failure.on_one_line()));
                }
                note(format_args!(
                    "SIGHUP: the users that may connect were read again"
                ));
                for name in &again.changed {
                    say(format_args!(
                        "SIGHUP: what the file says of the virtual machine {name} has changed, which takes effect at the next start of the server"
                    ));
                }
                let mut last = Vec::new();
                for name in again.removed {
                    match self.activations.remove_vm(&name) {
                        // Another one may be in its place in a moment.
                        Err(error) if error.kind() == ErrorKind::Invalid => last.push(name),
                        removed => self.leave_out(name, removed, interrupt).await,
                    }
                }
                for served in again.added {
                    self.take_in(served, interrupt).await;
                }
                for name in last {
                    let removed = self.activations.remove_vm(&name);
                    self.leave_out(name, removed, interrupt).await;
                }
            }
        }
        systemd::notify("READY=1");
    }

    async fn take_in(&mut self, served: Served, interrupt: &Interrupt) {
        let Some(name) = served.name.clone() else {
            return;
        };
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
        interrupt: &Interrupt,
    ) {
        if let Err(error) = removed {
            return say(format_args!(
                "SIGHUP: the virtual machine {name} is not in the file any more, and is served still: {error}; \
                 send SIGHUP again when that has changed"
            ));
        }
        self.args.forget(&name);
        let ended = self.guests.leave_out(&name, interrupt).await;
        self.sources.set(self.guests.sources());
        match ended {
            Ok(()) => note(format_args!(
                "SIGHUP: the virtual machine {name} is not served any more"
            )),
            Err(failure) => say(format_args!(
                "SIGHUP: the virtual machine {name} is not served any more: {}",
                failure.on_one_line()
            )),
        }
    }
}
