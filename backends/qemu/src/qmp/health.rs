//! What QEMU's events say of the VM as a whole.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::error::one_line;
use super::{Event, Qmp};

/// Whether a VM runs, as far as QEMU has told since the connection began.
///
/// [`Display`](fmt::Display) says what is wrong, on one line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    stopped: Option<String>,
    ended: Option<String>,
    io_errors: BTreeMap<String, String>,
}

impl Health {
    /// Why the processors stand still: since an event `STOP`, until `RESUME`.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// Why nothing of what was mounted in the guest is there any more: QEMU has ended or is about to, or the guest has
    /// crashed or was reset.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// The disks on which the host could not read or write, with what happened last on each.
    pub fn io_errors(&self) -> impl Iterator<Item = (&str, &str)> {
        let errors = self.io_errors.iter();
        errors.map(|(disk, error)| (disk.as_str(), error.as_str()))
    }

    /// Whether there is nothing to tell.
    pub fn is_good(&self) -> bool {
        *self == Health::default()
    }

    /// Takes an event in; returns whether that changes anything.
    fn note(&mut self, event: &Event) -> bool {
        let before = self.clone();
        let data = &event.data;
        match event.name.as_str() {
            "STOP" => {
                let why = self.io_errors.values().find(|error| error.ends_with(STOPS));
                self.stopped = Some(
                    why.cloned()
                        .unwrap_or_else(|| "for another reason".to_owned()),
                );
            }
            "RESUME" => {
                self.stopped = None;
                self.io_errors.retain(|_, error| !error.ends_with(STOPS));
            }
            "BLOCK_IO_ERROR" => {
                let name = |field: &str| data[field].as_str().filter(|name| !name.is_empty());
                let disk = name("node-name").or(name("device")).unwrap_or("a disk");
                let operation = data["operation"].as_str().unwrap_or("access");
                let reason = data["reason"].as_str().unwrap_or("no reason is told");
                // The flag is set only where the error stops the VM.
                let reason = match data["nospace"] == true || reason == NO_SPACE {
                    true => "the host's disk is full",
                    false => reason,
                };
                let stops = if data["action"] == "stop" { STOPS } else { "" };
                let error = one_line(&format_args!(
                    "{operation} of {disk} failed: {reason}{stops}"
                ));
                self.io_errors.insert(one_line(&disk), error);
            }
            "SHUTDOWN" => {
                let who = if data["guest"] == true {
                    "the guest"
                } else {
                    "the host"
                };
                let reason = data["reason"].as_str().unwrap_or("for an unknown reason");
                self.ended = Some(one_line(&format_args!("{who} has shut it down ({reason})")));
            }
            "RESET" => self.ended = Some("the guest was reset".to_owned()),
            "GUEST_PANICKED" => self.ended = Some("the guest's kernel has crashed".to_owned()),
            _ => {}
        }
        *self != before
    }
}

/// What the C library says of `ENOSPC`.
const NO_SPACE: &str = "No space left on device";

/// How an error ends that stops the VM.
const STOPS: &str = ", and QEMU stopped the VM";

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.ended {
            return write!(f, "the VM is gone: {why}");
        }
        match (&self.stopped, self.io_errors.is_empty()) {
            (Some(why), _) => write!(f, "the VM is stopped: {why}"),
            (None, true) => f.write_str("the VM runs"),
            (None, false) => {
                let errors: Vec<&str> = self.io_errors.values().map(String::as_str).collect();
                f.write_str(&errors.join("; "))
            }
        }
    }
}

/// What is known of a VM, for all who wait for it.
#[derive(Debug, Default)]
pub(super) struct Watched(watch::Sender<Health>);

impl Watched {
    pub(super) fn tell(&self, event: &Event) {
        let changed = self.0.send_if_modified(|health| health.note(event));
        let is_wanted = event.name == "RESUME" || event.data["guest"] == false;
        match (changed, is_wanted) {
            (true, true) => info!(event = event.name, "{}", *self.0.borrow()),
            (true, false) => warn!(event = event.name, "{}", *self.0.borrow()),
            (false, _) => {}
        }
    }

    pub(super) fn end(&self, reason: &Arc<str>) {
        self.0.send_modify(|health| {
            // What came before says more.
            health.ended.get_or_insert_with(|| one_line(reason));
        });
    }
}

impl Qmp {
    /// What QEMU has told of its VM, and what it will tell.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.0.listeners.health.0.subscribe()
    }

    /// Waits until the VM is stopped for so long without a pause, and says why. Cancel safe.
    pub async fn stands_still(&self, long: Duration) -> Health {
        let mut health = self.health();
        loop {
            let is_stopped = |health: &Health| health.stopped.is_some();
            if health.wait_for(is_stopped).await.is_err() {
                // Never, since the connection keeps the sender.
                return std::future::pending().await;
            }
            let resumed = health.wait_for(|health| health.stopped.is_none());
            if tokio::time::timeout(long, resumed).await.is_err() {
                return health.borrow().clone();
            }
        }
    }

    /// A message with what is wrong with the VM, if anything is.
    pub(crate) fn explain(&self, message: String) -> String {
        let health = self.health().borrow().clone();
        match health.is_good() {
            true => message,
            false => format!("{message} ({health})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn after(events: &[(&str, Value)]) -> Health {
        let mut health = Health::default();
        for (name, data) in events {
            let (name, data) = ((*name).to_owned(), data.clone());
            health.note(&Event { name, data });
        }
        health
    }

    fn error(action: &str, nospace: bool) -> (&'static str, Value) {
        let data = json!({
            "device": "", "node-name": "bm-scsi-0-3", "operation": "write", "action": action,
            "nospace": nospace, "reason": "Input/output error\n",
        });
        ("BLOCK_IO_ERROR", data)
    }

    #[test]
    fn a_stop_names_the_disk_that_is_full_until_the_vm_runs_again() {
        let stopped = [error("stop", true), ("STOP", Value::Null)];
        let health = after(&stopped);
        let said = "write of bm-scsi-0-3 failed: the host's disk is full, and QEMU stopped the VM";
        assert_eq!(health.stopped(), Some(said));
        assert_eq!(health.to_string(), format!("the VM is stopped: {said}"));
        let [first, second] = stopped;
        assert!(after(&[first, second, ("RESUME", Value::Null)]).is_good());
    }

    #[test]
    fn an_error_that_the_guest_was_told_of_does_not_stop_the_vm() {
        let health = after(&[error("report", false)]);
        assert_eq!(health.stopped(), None);
        let errors: Vec<_> = health.io_errors().collect();
        assert_eq!(
            errors,
            [(
                "bm-scsi-0-3",
                "write of bm-scsi-0-3 failed: Input/output error"
            )]
        );
        assert!(!health.is_good());
    }

    #[test]
    fn the_first_that_was_heard_of_an_end_is_kept() {
        let health = after(&[(
            "SHUTDOWN",
            json!({"guest": true, "reason": "guest-shutdown"}),
        )]);
        assert_eq!(
            health.ended(),
            Some("the guest has shut it down (guest-shutdown)")
        );
        let watched = Watched(watch::Sender::new(health.clone()));
        watched.end(&"QEMU has closed the connection".into());
        assert_eq!(*watched.0.borrow(), health);
        for event in ["RESET", "GUEST_PANICKED"] {
            assert!(after(&[(event, Value::Null)]).ended().is_some());
        }
        // Of what is none of them, nothing is kept; nor of what is garbage.
        let garbage = [("DEVICE_DELETED", json!({})), ("RESUME", json!([]))];
        assert!(after(&garbage).is_good());
    }
}
