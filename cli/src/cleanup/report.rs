//! What a clean-up has found and done, as a table or as JSON.

use std::fmt;
use std::path::Path;

use blockmount_linux::mountinfo::MountInfo;
use blockmount_loopback::BoundLoop;
use serde::Serialize;

use super::scan::{Dead, Resumable};
use crate::failure::printable;
use crate::report::table;

/// Everything that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) dry_run: bool,
    /// Runs that are alive, and were left alone.
    pub(crate) living_runs: usize,
    /// Runs that have ended, and were kept because they can be resumed.
    pub(crate) resumable: Vec<Resumable>,
    /// Runs that have left something.
    pub(crate) dead_runs: usize,
    pub(crate) items: Vec<Item>,
}

/// One thing that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Item {
    run: String,
    what: What,
    #[serde(rename = "where")]
    at: String,
    /// What is behind it: the source of a mount, the file of a loop device.
    of: String,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    Mount,
    LoopDevice,
    /// A virtual machine that lives on.
    Machine,
    /// A directory that was made for a target.
    Directory,
    /// One of the run's own directories, with what is in it.
    Files,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// It is there, and this was only a look.
    Found,
    Removed,
    /// It is still there, and why.
    Left(String),
}

impl Item {
    pub(crate) fn new(dead: &Dead, what: What, at: &Path, outcome: Outcome) -> Self {
        let (run, at) = (dead.paths.id.clone(), at.display().to_string());
        Item {
            run,
            what,
            at,
            of: String::new(),
            outcome,
        }
    }

    /// A state of a guest, which belongs to no run alone.
    pub(crate) fn state(at: &Path, outcome: Outcome) -> Self {
        Item {
            run: "none".to_owned(),
            what: What::Files,
            at: at.display().to_string(),
            of: "a state of a guest that was not saved to its end".to_owned(),
            outcome,
        }
    }

    pub(crate) fn mount(dead: &Dead, mount: &MountInfo, outcome: Outcome) -> Self {
        let of = format!("{} {}", mount.filesystem, mount.source.to_string_lossy());
        Item {
            of,
            ..Item::new(dead, What::Mount, &mount.mount_point, outcome)
        }
    }

    pub(crate) fn of_loop(dead: &Dead, bound: &BoundLoop, outcome: Outcome) -> Self {
        let of = bound.backing_file().display().to_string();
        Item {
            of,
            ..Item::new(dead, What::LoopDevice, &bound.node(), outcome)
        }
    }

    /// Whether it keeps the files of a run from being removed.
    pub(crate) fn is_left_of(&self, dead: &Dead) -> bool {
        self.run == dead.paths.id && matches!(self.outcome, Outcome::Left(_))
    }
}

impl Report {
    /// Whether nothing had to be left.
    pub(crate) fn is_clean(&self) -> bool {
        !self
            .items
            .iter()
            .any(|item| matches!(item.outcome, Outcome::Left(_)))
    }

    pub(crate) fn to_text(&self) -> String {
        let living = match self.living_runs {
            0 => String::new(),
            1 => "; 1 run is alive and was left alone".to_owned(),
            count => format!("; {count} runs are alive and were left alone"),
        };
        let kept = self.resumable.iter().map(|kept| {
            let (name, target) = (&kept.name, printable(kept.target.display()));
            format!(
                "\n{name} at {target} is kept; go on with it: sudo blockmount mount --resume {name}"
            )
        });
        let living = kept.fold(living, |text, line| text + &line);
        if self.items.is_empty() {
            return format!("nothing to clean up{living}");
        }
        let mut table = table(&["run", "what", "where", "of", "outcome"]);
        for item in &self.items {
            let outcome = item.outcome.to_string();
            let what = item.what.to_string();
            table.add_row(
                [&item.run, &what, &item.at, &item.of, &outcome]
                    .map(|text| printable(text).to_string()),
            );
        }
        let verdict = match (self.dry_run, self.is_clean()) {
            (true, _) => "nothing was removed; run it without --dry-run to do so",
            (false, true) => "all of it was removed",
            (false, false) => "some of it is left; when it is no longer in use, run it again",
        };
        format!("{table}\n\n{verdict}{living}")
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            What::Mount => "mount",
            What::LoopDevice => "loop device",
            What::Machine => "virtual machine",
            What::Directory => "directory",
            What::Files => "files",
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Found => f.write_str("found"),
            Outcome::Removed => f.write_str("removed"),
            Outcome::Left(reason) => write!(f, "left: {reason}"),
        }
    }
}
