//! Virtio ports: each connection of the host is a port that it plugs in for it.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount_linux::uevent::{Event, Listener};
use rustix::io::Errno;
use tokio::task::{Id, JoinSet};
use tracing::{debug, warn};

use crate::AgentError;
use crate::error::{Context, one_line};
use crate::log::say;
use crate::port::Port;
use crate::service::Service;

/// Every virtio port has a directory here, with its name in it.
const PORTS: &str = "/sys/class/virtio-ports";
const SUBSYSTEM: &str = "virtio-ports";
/// How soon a port is tried again that another process has open: nothing tells when it closes it.
const BUSY: Duration = Duration::from_millis(500);

/// Serves every port of a name, from the moment it is there until it is gone. Ends only with an error.
///
/// The name is `NAME` or begins with `NAME.`: QEMU refuses a second port of a name, and the port of the next
/// connection may be plugged in before the last is out.
///
/// Cancel safe: dropping it closes the ports.
pub(super) async fn serve<S: Service>(name: &str, service: S) -> Result<(), AgentError> {
    let lost = || "cannot hear of new virtio ports".to_owned();
    // Before the first look: a port that comes after it is heard of.
    let listener = Listener::new().context(lost)?;
    let mut ports = Ports::new(service);
    if named(Path::new(PORTS), name).is_empty() {
        say(format_args!(
            "waiting: this machine has no virtio port named {name} yet; --help names other ways to be reached"
        ));
    }
    loop {
        let all_open = ports.open_all(name);
        tokio::select! {
            heard = news(&listener) => heard.context(lost)?,
            Some(ended) = ports.tasks.join_next_with_id() => {
                let id = match &ended {
                    Ok((id, ())) => *id,
                    Err(error) => error.id(),
                };
                ports.open.remove(&id);
            }
            () = tokio::time::sleep(BUSY), if !all_open => {}
        }
    }
}

/// Waits until the kernel says something about a port. Cancel safe.
async fn news(listener: &Listener) -> io::Result<()> {
    loop {
        match listener.next().await? {
            Event::Uevent(event) if event.field("SUBSYSTEM") != Some(OsStr::new(SUBSYSTEM)) => {}
            Event::Uevent(_) | Event::Lost => return Ok(()),
        }
    }
}

struct Ports<S> {
    service: S,
    tasks: JoinSet<()>,
    /// Which task serves which port.
    open: HashMap<Id, OsString>,
}

impl<S: Service> Ports<S> {
    fn new(service: S) -> Self {
        Ports {
            service,
            tasks: JoinSet::new(),
            open: HashMap::new(),
        }
    }

    /// Opens what is there and not open; says whether nothing has to be tried again.
    fn open_all(&mut self, name: &str) -> bool {
        let mut all_open = true;
        for port in named(Path::new(PORTS), name) {
            if self.open.values().any(|open| *open == port) {
                continue;
            }
            match Port::open(&Path::new("/dev").join(&port)) {
                Ok(opened) => {
                    debug!(?port, name, "opened");
                    let serving = converse(opened, port.clone(), self.service.clone());
                    let id = self.tasks.spawn(serving).id();
                    self.open.insert(id, port);
                }
                // It is going, and an event says when it has gone.
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    debug!(?port, %error, "cannot open, trying again");
                    all_open = false;
                }
            }
        }
        all_open
    }
}

fn is_gone(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::NXIO | Errno::NODEV))
}

/// The ports of a name and its suffixes, by the kernel's names for them.
fn named(ports: &Path, name: &str) -> Vec<OsString> {
    // No such directory: the driver is not loaded yet.
    let entries = fs::read_dir(ports).into_iter().flatten().flatten();
    let is_named = |path: PathBuf| {
        let found = fs::read(path.join("name")).unwrap_or_default();
        let found = found.strip_suffix(b"\n").unwrap_or(&found);
        let rest = found.strip_prefix(name.as_bytes());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"."))
    };
    entries
        .filter(|entry| is_named(entry.path()))
        .map(|entry| entry.file_name())
        .collect()
}

/// Serves the conversations over a port, one after the other, until it is gone.
async fn converse<S: Service>(mut port: Port, name: OsString, service: S) {
    loop {
        match port.connected().await {
            Ok(true) => {}
            Ok(false) => {
                debug!(port = ?name, "removed");
                return;
            }
            Err(error) => {
                warn!(port = ?name, %error, "cannot read from the port");
                // It is opened again after this, and must not fail in a circle.
                return tokio::time::sleep(BUSY).await;
            }
        }
        debug!(port = ?name, "a host is there");
        if let Err(error) = service.serve(&mut port).await {
            warn!(port = ?name, error = %one_line(&*error), "a connection was given up");
            port.discard();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_found_by_the_name_and_what_follows_a_dot() {
        let dir = tempfile::tempdir().unwrap();
        for (port, name) in [
            ("vport0p1", "agent\n"),
            ("vport0p2", "agent2\n"),
            ("vport1p1", "agent"),
            ("vport1p2", ""),
            ("vport1p3", "agent.7\n"),
            ("vport1p4", "an.agent\n"),
        ] {
            fs::create_dir(dir.path().join(port)).unwrap();
            fs::write(dir.path().join(port).join("name"), name).unwrap();
        }
        fs::create_dir(dir.path().join("vport2p1")).unwrap();
        let mut found = named(dir.path(), "agent");
        found.sort();
        assert_eq!(found, ["vport0p1", "vport1p1", "vport1p3"]);
        assert!(named(&dir.path().join("absent"), "agent").is_empty());
    }
}
