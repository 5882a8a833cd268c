//! What a manager has at one moment, as one tree that operators and programs read.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::journal::{HolderRecord, Record};
use crate::placement::{SlotEntry, SlotUse};
use crate::{Error, Manager, Step, stack, view};

mod latency;
mod timed;

pub(crate) use latency::Latencies;
pub(crate) use timed::Timed;

/// Everything that a [`Manager`] has at one moment ([`Manager::inspect`]).
///
/// It is for people and for programs that watch: names and paths are text, with what is no UTF-8 replaced. Serialised, it is
/// one object; fields are only ever added.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Inspection {
    /// Whether the manager is frozen.
    pub frozen: bool,
    /// The slots that are not free, if the manager was [told](crate::ManagerBuilder::slots) where to ask.
    pub slots: Vec<SlotStatus>,
    /// The attachments, by their disks.
    pub attachments: Vec<AttachmentStatus>,
    /// The mounts, by their paths.
    pub mounts: Vec<MountStatus>,
    /// The stacks, by their targets.
    pub stacks: Vec<StackStatus>,
    /// The views, by their targets.
    pub views: Vec<ViewStatus>,
    /// The names that hold something, in order.
    pub holders: Vec<HolderStatus>,
    /// How long calls of the backends have taken, in the order of a disk's life. A step that was never called is left out.
    pub steps: Vec<StepStatus>,
}

/// How far something is on its way up or down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LeaseState {
    /// It is being set up, or waits for that.
    Starting,
    /// It is up.
    Up,
    /// It is up and nobody has it: it [lingers](crate::Linger) for the next caller.
    Lingering,
    /// It is being torn down.
    Ending,
    /// A tear-down has failed, and is tried again with the next release, request or drain.
    Pending,
}

impl fmt::Display for LeaseState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LeaseState::Starting => "starting",
            LeaseState::Up => "up",
            LeaseState::Lingering => "lingering",
            LeaseState::Ending => "ending",
            LeaseState::Pending => "pending",
        })
    }
}

/// What all that is shared has in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LeaseStatus {
    /// How far it is.
    pub state: LeaseState,
    /// How many shares of it there are; none unless it is up.
    pub shares: usize,
    /// How many attempts to tear it down have failed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attempts: usize,
    /// Why it is [pending](LeaseState::Pending).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A slot that is not free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SlotStatus {
    /// The transport.
    pub transport: String,
    /// The slot, as its transport numbers it.
    pub address: String,
    /// What it is used for.
    pub usage: SlotUse,
    /// The disk, if one is known there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// An attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AttachmentStatus {
    /// What the disk was identified as.
    pub id: String,
    /// The disk, as the first caller named it; none while it is not known to be attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Whether it is attached read-only.
    pub read_only: bool,
    /// Where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locator: Option<String>,
    /// How far it is, and how many share it.
    #[serde(flatten)]
    pub lease: LeaseStatus,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MountStatus {
    /// The device.
    pub locator: String,
    /// Where it is mounted in the guest; none while it is not known to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Whether it is mounted read-only.
    pub read_only: bool,
    /// How far it is, and how many share it.
    #[serde(flatten)]
    pub lease: LeaseStatus,
}

/// A stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StackStatus {
    /// Where the tree is in the guest.
    pub target: String,
    /// Where its layers are mounted, the topmost first; none while it is not known to be there.
    pub layers: Vec<String>,
    /// Where its scratch disk is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<String>,
    /// How far it is, and how many share it.
    #[serde(flatten)]
    pub lease: LeaseStatus,
}

/// A view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ViewStatus {
    /// Where it is in the guest.
    pub target: String,
    /// The path of what it shows; none while it is not known to be there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// How far it is, and how many share it.
    #[serde(flatten)]
    pub lease: LeaseStatus,
}

/// A name that holds something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HolderStatus {
    /// The name.
    pub name: String,
    /// What it holds, such as "the stack at /run/c1".
    pub of: String,
}

/// How long the calls of one step have taken, since the manager was made.
///
/// Percentiles are those of a histogram, and at most a sixteenth too long. Calls that have failed are counted, and not
/// among the times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepStatus {
    /// The step.
    pub step: Step,
    /// How many calls have succeeded.
    pub succeeded: u64,
    /// How many calls have failed.
    pub failed: u64,
    /// The sum of the times.
    pub total_seconds: f64,
    /// Half of the calls took no longer.
    pub p50_seconds: f64,
    /// Nine of ten calls took no longer.
    pub p90_seconds: f64,
    /// 99 of 100 calls took no longer.
    pub p99_seconds: f64,
    /// No call took longer.
    pub max_seconds: f64,
    /// How many calls took less than some times, from 64 microseconds on, each twice the one before.
    pub buckets: Vec<StepBucket>,
}

/// How many calls took less than a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepBucket {
    /// The time.
    pub below_seconds: f64,
    /// How many calls.
    pub count: u64,
}

impl SlotStatus {
    /// A slot of which no disk is known.
    pub fn new(transport: impl Into<String>, address: impl ToString, usage: SlotUse) -> SlotStatus {
        SlotStatus {
            transport: transport.into(),
            address: address.to_string(),
            usage,
            disk: None,
        }
    }

    /// The same with the disk that is there.
    #[must_use]
    pub fn with_disk(mut self, disk: impl Into<String>) -> Self {
        self.disk = Some(disk.into());
        self
    }

    /// A line of a transport's map.
    pub fn of<A: fmt::Display>(transport: &str, entry: &SlotEntry<A>) -> Self {
        let slot = SlotStatus::new(transport, &entry.address, entry.usage);
        match &entry.disk {
            Some(disk) => slot.with_disk(disk.source().to_string_lossy()),
            None => slot,
        }
    }
}

impl LeaseStatus {
    pub(crate) fn new(
        state: LeaseState,
        shares: usize,
        attempts: usize,
        why: Option<&Error>,
    ) -> Self {
        LeaseStatus {
            state,
            shares,
            attempts,
            why: why.map(on_one_line),
        }
    }
}

/// An error and all that has caused it.
fn on_one_line(error: &Error) -> String {
    let mut line = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// Where a manager reads its slots.
type Slots = Box<dyn Fn() -> Vec<SlotStatus> + Send + Sync>;

/// What a manager has besides its tables for those who inspect it.
#[derive(Default)]
pub(crate) struct Observed {
    pub(crate) latencies: Arc<Latencies>,
    pub(crate) slots: Option<Slots>,
}

impl Manager {
    /// What there is at this moment: slots, attachments, mounts, stacks, views, holders, what is pending and why, and how long
    /// the calls of each step have taken.
    ///
    /// It waits for nothing, calls no backend but for a look at the slots, and is no atomic picture: what changes meanwhile may
    /// be seen before or after.
    pub fn inspect(&self) -> Inspection {
        let mut inspection = Inspection {
            frozen: self.holders().is_frozen(),
            slots: self
                .observed
                .slots
                .as_ref()
                .map(|slots| slots())
                .unwrap_or_default(),
            attachments: self.attachments().inspect(),
            mounts: self.mounts().inspect(),
            stacks: stack::inspect(&self.stacks),
            views: view::inspect(&self.views),
            holders: self
                .holders()
                .named()
                .into_iter()
                .filter_map(holder)
                .collect(),
            steps: self.observed.latencies.read(),
        };
        let Inspection {
            attachments,
            mounts,
            stacks,
            views,
            holders,
            ..
        } = &mut inspection;
        attachments.sort_by(|one, other| (&one.disk, &one.id).cmp(&(&other.disk, &other.id)));
        mounts.sort_by(|one, other| (&one.path, &one.locator).cmp(&(&other.path, &other.locator)));
        stacks.sort_by(|one, other| one.target.cmp(&other.target));
        views.sort_by(|one, other| one.target.cmp(&other.target));
        holders.sort_by(|one, other| one.name.cmp(&other.name));
        inspection
    }
}

fn holder(record: Record) -> Option<HolderStatus> {
    let Record::Holder(HolderRecord { name, of }) = record else {
        return None;
    };
    Some(HolderStatus {
        name: name.to_string(),
        of: of.to_string(),
    })
}
