//! What a clean-up has found and done, as a table or as JSON.

use std::fmt;
use std::path::Path;

use blockmount_linux::mapper::Marked;
use blockmount_linux::mountinfo::MountInfo;
use blockmount_loopback::BoundLoop;
use serde::Serialize;

use super::scan::{Dead, Living, Resumable};
use crate::failure::printable;
use crate::terminal::wrapped;

/// Everything that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) dry_run: bool,
    /// How many runs are alive, and were left alone.
    pub(crate) living_runs: usize,
    /// Those of them that are known here.
    pub(crate) living: Vec<Living>,
    /// Runs that have ended, and were kept because they can be resumed.
    pub(crate) resumable: Vec<Resumable>,
    /// Runs that have left something.
    pub(crate) dead_runs: usize,
    pub(crate) items: Vec<Item>,
}

/// What stands for the run of what belongs to none.
const NO_RUN: &str = "none";

/// One thing that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Item {
    run: String,
    what: What,
    #[serde(rename = "where")]
    at: String,
    /// What is behind it: the source of a mount, the name of a mapped device, the file of a loop device.
    of: String,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    Mount,
    /// What is made of another device: it decrypts it, or checks its integrity.
    MappedDevice,
    LoopDevice,
    /// A virtual machine that lives on.
    Machine,
    /// Disks and mounts in a virtual machine of somebody else.
    InMachine,
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
    /// It is not for this clean-up to remove, and why: its run may be alive where another directory of runs is.
    Elsewhere(String),
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
            run: NO_RUN.to_owned(),
            what: What::Files,
            at: at.display().to_string(),
            of: "a state of a guest that was not saved to its end".to_owned(),
            outcome,
        }
    }

    /// What a run has left in a virtual machine with this monitor.
    pub(crate) fn in_machine(run: &str, monitor: &Path, outcome: Outcome) -> Self {
        Item {
            run: run.to_owned(),
            what: What::InMachine,
            at: monitor.display().to_string(),
            of: "disks and mounts in a virtual machine".to_owned(),
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

    pub(crate) fn mapped(dead: &Dead, marked: &Marked, outcome: Outcome) -> Self {
        let at = format!("/dev/dm-{}", marked.device.number.minor);
        Item {
            of: marked.device.name.clone(),
            ..Item::new(dead, What::MappedDevice, Path::new(&at), outcome)
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
    /// Whether nothing had to be left that is for this clean-up to remove.
    pub(crate) fn is_clean(&self) -> bool {
        !self
            .items
            .iter()
            .any(|item| matches!(item.outcome, Outcome::Left(_)))
    }

    fn is_all_elsewhere(&self) -> bool {
        let mut items = self.items.iter();
        items.all(|item| matches!(item.outcome, Outcome::Elsewhere(_)))
    }

    pub(crate) fn to_text(&self) -> String {
        let living = match self.living_runs {
            0 => String::new(),
            1 => "; 1 run is alive and was left alone".to_owned(),
            count => format!("; {count} runs are alive and were left alone"),
        };
        let processes = self.living.iter().filter_map(|living| living.process);
        let living = processes.fold(living, |text, process| {
            text + &format!("\nalive: process {process}")
        });
        let kept = self.resumable.iter().map(|kept| {
            let (name, target) = (&kept.name, printable(kept.target.display()));
            format!(
                "\n{name} at {target} is kept; go on with it: {}",
                kept.resuming
            )
        });
        let living = kept.fold(living, |text, line| text + &line);
        if self.items.is_empty() {
            return format!("nothing to clean up{living}");
        }
        let verdict = match (self.dry_run, self.is_clean()) {
            _ if self.is_all_elsewhere() => "nothing to clean up that is of a run here",
            (true, _) => "nothing was removed; run it without --dry-run to do so",
            (false, true) => "all that is of runs here was removed",
            (false, false) => "some of it is left; when it is no longer in use, run it again",
        };
        format!("{}\n{verdict}{living}", self.list())
    }

    /// What was found, by run.
    fn list(&self) -> String {
        let mut runs: Vec<&str> = Vec::new();
        for item in &self.items {
            if !runs.contains(&&*item.run) {
                runs.push(&item.run);
            }
        }
        let mut text = String::new();
        for run in runs {
            text += &match run {
                NO_RUN => "of no run:\n".to_owned(),
                run => format!("run {}:\n", printable(run)),
            };
            let items = self.items.iter().filter(|item| item.run == run);
            items.for_each(|item| text += &item.to_text());
        }
        text
    }
}

impl Item {
    /// As lines for a terminal.
    fn to_text(&self) -> String {
        let (what, at) = (self.what.to_string(), printable(&self.at));
        let of = match self.of.is_empty() {
            true => String::new(),
            false => format!(" ({})", printable(&self.of)),
        };
        let (outcome, why) = match &self.outcome {
            Outcome::Found => ("found", None),
            Outcome::Removed => ("removed", None),
            Outcome::Left(why) => ("left", Some(why)),
            Outcome::Elsewhere(why) => ("elsewhere", Some(why)),
        };
        let line = format!("  {outcome:<9} {what:<15} {at}{of}");
        let line = match why {
            None => line,
            Some(why) => format!("{line}: {}", printable(why)),
        };
        wrapped(&line, "            ") + "\n"
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            What::Mount => "mount",
            What::MappedDevice => "mapped device",
            What::LoopDevice => "loop device",
            What::Machine => "virtual machine",
            What::InMachine => "in a machine",
            What::Directory => "directory",
            What::Files => "files",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(items: Vec<Item>) -> Report {
        Report {
            dry_run: false,
            living_runs: 0,
            living: Vec::new(),
            resumable: Vec::new(),
            dead_runs: 0,
            items,
        }
    }

    fn item(at: &str, outcome: Outcome) -> Item {
        Item {
            run: "0123456789abcdef".to_owned(),
            what: What::LoopDevice,
            at: at.to_owned(),
            of: "/home/someone/images/base.img".to_owned(),
            outcome,
        }
    }

    #[test]
    fn what_is_of_a_run_elsewhere_is_no_failure() {
        let elsewhere = || item("/dev/loop1", Outcome::Elsewhere("x".to_owned()));
        let only = report(vec![elsewhere()]);
        assert!(only.is_clean());
        assert!(
            only.to_text().contains("nothing to clean up"),
            "{}",
            only.to_text()
        );
        let left = item("/dev/loop2", Outcome::Left("it is in use".to_owned()));
        assert!(!report(vec![elsewhere(), left]).is_clean());
    }

    #[test]
    fn the_list_fits_80_columns_and_breaks_no_path() {
        let long = format!("/var/tmp/{}", "d/".repeat(50));
        let why = "it is in use by process 1234 (a-program), and whoever made it has to remove it before that".to_owned();
        let text = report(vec![
            item(&long, Outcome::Left(why.clone())),
            item("/dev/loop0", Outcome::Left(why)),
        ])
        .to_text();
        assert!(text.contains(&long), "{text}");
        let too_long = |line: &&str| line.chars().count() > 80 && !line.contains(&long);
        assert_eq!(text.lines().find(too_long), None, "{text}");
    }
}
