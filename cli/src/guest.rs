//! Where the containers run, and how to look and write there: this machine, or a virtual one.

mod foreign;
mod qemu;
mod transports;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmount::SlotStatus;
use blockmount_checker::tree::Tree;
use blockmount_loopback::{LoopSlot, LoopTransport, SCHEME};
use clap::ValueEnum;

use crate::failure::{Context, Failure};
use crate::interrupt::{Interrupt, Stop};
use crate::kernel;
use crate::keys::KeyFile;
use crate::report::SlotReport;
use crate::terminal::Progress;

pub(crate) use foreign::{ForeignVm, Socket, parse_monitor};
pub(crate) use qemu::{
    MOUNTS, Needs, QemuGuest, abandoned_state, ensure_allowed, kept_vm, kept_vm_has_ended,
};
pub(crate) use transports::{Hardware, Transports};

/// Where containers can run, by their names on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum GuestKind {
    /// This machine: loop devices, no VM
    #[default]
    Local,
    /// A virtual machine of QEMU, started for this run
    Qemu,
    /// A virtual machine that somebody else has started: what --vm names
    #[value(skip)]
    Foreign,
}

/// Where a run does its work, and by which transports.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    Local,
    Qemu(Hardware),
    Foreign(ForeignVm, OtherFiles),
}

/// Whether QEMU may open the files that an image names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OtherFiles {
    Refused,
    Allowed,
}

impl Place {
    /// Refuses what only a virtual machine has.
    pub(crate) fn of(
        guest: GuestKind,
        vm: Option<ForeignVm>,
        transports: Option<Transports>,
        allows_backing: bool,
    ) -> Result<Self, Failure> {
        let refuse = |what: &str| {
            let advice = "use --guest qemu, or leave that option out";
            Err(Failure::usage(what).advise(advice))
        };
        if let Some(vm) = vm {
            let scsi = Transports::default();
            if transports.is_some_and(|transports| transports != scsi) {
                return refuse(
                    "a virtual machine that others have started is given disks on SCSI alone",
                );
            }
            let others = match allows_backing {
                true => OtherFiles::Allowed,
                false => OtherFiles::Refused,
            };
            return Ok(Place::Foreign(vm, others));
        }
        match guest {
            GuestKind::Foreign => Err(Failure::new("nothing is known of the virtual machine")),
            GuestKind::Qemu => Ok(Place::Qemu(Hardware {
                transports: transports.unwrap_or_default(),
                allows_backing,
                needs: Needs::default(),
            })),
            GuestKind::Local if transports.is_some() => {
                refuse("this machine has loop devices for disks, and no --transport to choose")
            }
            GuestKind::Local => Ok(Place::Local),
        }
    }

    /// The same with what a guest that is started has to be able to do. This machine can do what it can.
    pub(crate) fn needing(self, needs: Needs) -> Self {
        match self {
            Place::Local => Place::Local,
            Place::Qemu(hardware) => Place::Qemu(Hardware { needs, ..hardware }),
            foreign @ Place::Foreign(..) => foreign,
        }
    }
}

/// A guest that is there.
#[derive(Debug)]
pub(crate) enum Guest {
    Local(Arc<LoopTransport>),
    Qemu(Box<QemuGuest>),
}

/// The mounts of a guest at one moment: the filesystem and the device, by path.
#[derive(Debug)]
pub(crate) struct Mounts(HashMap<PathBuf, Seen>);

/// A mount as the guest's kernel shows it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) filesystem: String,
    pub(crate) device: String,
}

impl Mounts {
    /// The mount that is seen at a path.
    pub(crate) fn at(&self, path: &Path) -> Result<&Seen, Failure> {
        self.0
            .get(path)
            .ok_or_else(|| Failure::new(format!("the kernel has no mount at {}", path.display())))
    }
}

impl Guest {
    /// What reports call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Guest::Local(_) => "local",
            Guest::Qemu(guest) if guest.is_own() => "qemu",
            Guest::Qemu(_) => "foreign",
        }
    }

    /// Waits until what is in the guest is lost, and says why; on this machine for ever. Cancel safe.
    pub(crate) async fn failed(&self) -> String {
        match self {
            Guest::Local(_) => std::future::pending().await,
            Guest::Qemu(guest) => guest.failed().await,
        }
    }

    /// Why nothing in the guest can be released any more, if that is so: its agent has ended and does not come back.
    pub(crate) fn lost(&self) -> Option<&str> {
        match self {
            Guest::Local(_) => None,
            Guest::Qemu(guest) => guest.lost(),
        }
    }

    /// Whether it is a virtual machine that somebody else has started.
    pub(crate) fn is_foreign(&self) -> bool {
        matches!(self, Guest::Qemu(guest) if !guest.is_own())
    }

    /// What is mounted, where somebody can be asked; of several at a path the topmost.
    pub(crate) async fn mounts(&self) -> Result<Option<Mounts>, Failure> {
        let Guest::Qemu(guest) = self else {
            let mounts = kernel::Tables::read()?.into_mounts().map(|mount| {
                let seen = Seen {
                    filesystem: mount.filesystem,
                    device: mount.source.to_string_lossy().into_owned(),
                };
                (mount.mount_point, seen)
            });
            return Ok(Some(Mounts(mounts.collect())));
        };
        let Some(tables) = guest.tables().await? else {
            return Ok(None);
        };
        let lines = tables.mounts.into_iter().map(|line| {
            let seen = Seen {
                filesystem: line.filesystem,
                device: line.source,
            };
            (line.mount_point.into(), seen)
        });
        Ok(Some(Mounts(lines.collect())))
    }

    /// Reads a tree, with the digest of every file, where it is.
    pub(crate) async fn tree(
        &self,
        root: &Path,
        interrupt: &Interrupt,
        progress: &Progress,
    ) -> Result<Tree, Failure> {
        interrupt.check()?;
        if let Guest::Qemu(guest) = self {
            return guest.tree(root).await;
        }
        let (root, progress) = (root.to_owned(), progress.clone());
        let read =
            move |stop: &Stop| stop.bound(|stop| Tree::read(&root, stop, || progress.step()));
        interrupt.blocking(read).await
    }

    /// What is seen at the top of a tree that this machine does not see; none for one that it does.
    pub(crate) async fn look_into(&self, tree: &Path) -> Result<Option<String>, Failure> {
        const MOST: usize = 8;
        let guest = match self {
            Guest::Qemu(guest) if guest.has_checker() => guest,
            _ => return Ok(None),
        };
        let (names, count) = guest.names(tree, MOST).await?;
        let more = match count.saturating_sub(names.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Ok(Some(match count {
            0 => "nothing".to_owned(),
            _ => format!("{}{more}", names.join(", ")),
        }))
    }

    /// Puts a key where the guest looks for it by its name, which is in a directory if the guest is this machine.
    pub(crate) async fn place_key(&self, directory: &Path, key: &KeyFile) -> Result<(), Failure> {
        let KeyFile { name, bytes } = key;
        if let Guest::Qemu(guest) = self {
            return guest.place_key(name, bytes).await;
        }
        let path = directory.join(name);
        blockmount_checker::write_private(&path, bytes)
            .context(|| format!("cannot write {}", path.display()))
    }

    /// Takes it away again.
    pub(crate) async fn remove_key(&self, directory: &Path, key: &KeyFile) -> Result<(), Failure> {
        if let Guest::Qemu(guest) = self {
            return guest.remove_key(&key.name).await;
        }
        let path = directory.join(&key.name);
        fs::remove_file(&path).context(|| format!("cannot remove {}", path.display()))
    }

    /// Makes or replaces a file.
    pub(crate) async fn write(
        &self,
        interrupt: &Interrupt,
        path: &Path,
        text: &str,
    ) -> Result<(), Failure> {
        if let Guest::Qemu(guest) = self {
            return guest.write(path, text).await;
        }
        let (path, text) = (path.to_owned(), text.to_owned());
        let write = move |_: &_| {
            fs::write(&path, text).context(|| format!("cannot write {}", path.display()))
        };
        interrupt.blocking(write).await
    }

    /// Removes a file.
    pub(crate) async fn remove(&self, interrupt: &Interrupt, path: &Path) -> Result<(), Failure> {
        if let Guest::Qemu(guest) = self {
            return guest.remove(path).await;
        }
        let path = path.to_owned();
        let remove = move |_: &_| {
            fs::remove_file(&path).context(|| format!("cannot remove {}", path.display()))
        };
        interrupt.blocking(remove).await
    }

    /// Reads what is in the slots for inspections, which outlive this value.
    pub(crate) fn slot_source(&self) -> SlotSource {
        match self {
            Guest::Local(transport) => {
                let transport = transport.clone();
                Box::new(move || transport.map().iter().map(loop_status).collect())
            }
            Guest::Qemu(guest) => guest.slot_source(),
        }
    }

    /// The transports' own lists of what is where.
    pub(crate) fn slots(&self) -> Vec<SlotReport> {
        let transport = match self {
            Guest::Local(transport) => transport,
            Guest::Qemu(guest) => return guest.slots(),
        };
        let map = transport.map().into_iter();
        let slot = map.map(|slot| SlotReport {
            slot: slot.slot.to_string(),
            state: format!("{:?}", slot.usage).to_lowercase(),
            device: format!("loop{}", slot.number),
            read_only: slot.read_only,
            direct_io: slot.direct_io,
            disk: slot.source.display().to_string(),
        });
        slot.collect()
    }
}

/// Reads what is in the slots of a guest.
pub(crate) type SlotSource = Box<dyn Fn() -> Vec<SlotStatus> + Send + Sync>;

fn loop_status(slot: &LoopSlot) -> SlotStatus {
    let status = SlotStatus::new(SCHEME, slot.slot, slot.usage);
    status.with_disk(slot.source.to_string_lossy())
}
