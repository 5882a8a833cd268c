//! The status of a run for people, in 80 columns.

use std::fmt::Write as _;
use std::ops::Range;

use blockmount::placement::SlotUse;
use blockmount::{AttachmentStatus, LeaseState, LeaseStatus, SlotStatus, StepStatus};
use blockmount_containerd::service::{ActivationState, ActivationStatus};
use comfy_table::{CellAlignment, Table};

use super::tree::Status;
use crate::failure::printable;
use crate::report::table;
use crate::terminal::wrapped;

/// The columns of a terminal that nobody has made wider.
const COLUMNS: u16 = 80;
/// The columns that the second of a list is given. The first, which is a path or a name, has what the others leave.
const SECOND: usize = 18;

/// All of it. Of each list at most `rows` lines are shown, and how many more there are.
pub(crate) fn text(status: &Status, rows: usize) -> String {
    let parts = parts(status);
    let texts = parts.iter().map(|part| part.text(rows));
    texts.collect::<Vec<_>>().join("\n")
}

/// As much of it as has room in so many lines, the most important first.
pub(super) fn fitted(status: &Status, mut lines: usize) -> String {
    let mut shown = Vec::new();
    for part in parts(status) {
        let rows = (1..=part.len().min(lines)).rev();
        let fits = |text: &String| text.lines().count() <= lines;
        if let Some(text) = rows.map(|rows| part.text(rows)).find(fits) {
            lines -= text.lines().count();
            shown.push(text);
        }
    }
    shown.join("\n")
}

/// One thing that is shown, in lines that can be left out from its end.
enum Part {
    Head(String),
    Pending(Vec<String>),
    List {
        header: &'static [&'static str],
        rows: Vec<Vec<String>>,
        /// The columns with numbers, which stand on the right.
        numbers: Range<usize>,
    },
}

impl Part {
    fn list(header: &'static [&'static str], rows: impl Iterator<Item = Vec<String>>) -> Self {
        Part::List {
            header,
            rows: rows.collect(),
            numbers: header.len() - 1..header.len(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Part::Head(_) => 1,
            Part::Pending(lines) => lines.len(),
            Part::List { rows, .. } => rows.len(),
        }
    }

    fn text(&self, most: usize) -> String {
        let mut text = match self {
            Part::Head(text) => return text.clone(),
            Part::Pending(lines) => {
                let shown = &lines[..lines.len().min(most)];
                format!("pending\n{}", shown.join("\n"))
            }
            Part::List {
                header,
                rows,
                numbers,
            } => list(header, &rows[..rows.len().min(most)], numbers.clone()),
        };
        if let Some(more) = self.len().checked_sub(most).filter(|more| *more > 0) {
            let _ = write!(text, "\n  and {more} more");
        }
        text
    }
}

/// The parts that have something to show, the most important first.
fn parts(status: &Status) -> Vec<Part> {
    let manager = &status.manager;
    let steps = Part::List {
        header: &["step", "calls", "failed", "p50", "p90", "p99", "max"],
        rows: manager.steps.iter().map(times).collect(),
        numbers: 1..7,
    };
    let activations = status.activations.iter().map(activation);
    let stacks = manager.stacks.iter().map(|stack| {
        let scratch = stack.scratch.as_ref().map_or("", |_| ", scratch");
        let of = match stack.layers.len() {
            1 => format!("1 layer{scratch}"),
            count => format!("{count} layers{scratch}"),
        };
        let kind = access(stack.scratch.is_none());
        line(&stack.target, of, kind, &stack.lease)
    });
    let views = manager.views.iter().map(|view| {
        let of = view.source.clone().unwrap_or_else(|| "-".to_owned());
        line(&view.target, of, "view", &view.lease)
    });
    let mounts = manager.mounts.iter().map(|mount| {
        let path = mount.path.as_deref().unwrap_or("-");
        let kind = access(mount.read_only);
        line(path, mount.locator.clone(), kind, &mount.lease)
    });
    let disks = manager.attachments.iter().map(attachment);
    let all = [
        Part::Head(head(status)),
        Part::Pending(pending(status)),
        steps,
        Part::list(&["activation", "namespace", "state", "mounts"], activations),
        Part::list(
            &["tree", "of", "kind", "state", "shares"],
            stacks.chain(views),
        ),
        Part::list(&["mount", "of", "access", "state", "shares"], mounts),
        Part::list(&["disk", "at", "access", "state", "shares"], disks),
    ];
    all.into_iter().filter(|part| part.len() > 0).collect()
}

fn head(status: &Status) -> String {
    let name = status
        .name
        .as_deref()
        .map(|name| format!(" {}", printable(name)));
    let guest = match &*status.guest {
        "local" => "this machine",
        "qemu" => "a virtual machine of its own",
        _ => "a virtual machine of somebody else",
    };
    let vm = status.vm.as_deref().map(|vm| format!(", vm {vm}"));
    let first = format!(
        "{}{}{}: process {}, up {}, {guest}, at {}",
        status.command,
        name.unwrap_or_default(),
        vm.unwrap_or_default(),
        status.process,
        duration(status.up_seconds),
        printable(&status.at)
    );
    let manager = &status.manager;
    let frozen = if manager.frozen { "; frozen" } else { "" };
    let counts = format!(
        "disks: {}, mounts: {}, stacks: {}, views: {}, holders: {}; slots: {}{frozen}",
        manager.attachments.len(),
        manager.mounts.len(),
        manager.stacks.len(),
        manager.views.len(),
        manager.holders.len(),
        slots(&manager.slots),
    );
    let mut lines = vec![wrapped(&first, "  ")];
    if let Some(why) = &status.lost {
        lines.push(wrapped(&format!("lost: {}", printable(why)), "  "));
    }
    lines.push(wrapped(&counts, "  "));
    lines.join("\n")
}

/// How many slots there are of each use, by transport: `scsi 3 occupied, 1 foreign`.
fn slots(slots: &[SlotStatus]) -> String {
    let mut counted: Vec<(&str, SlotUse, usize)> = Vec::new();
    for slot in slots {
        let same = |(transport, usage, _): &&mut (&str, SlotUse, usize)| {
            (*transport, *usage) == (&*slot.transport, slot.usage)
        };
        match counted.iter_mut().find(same) {
            Some((_, _, count)) => *count += 1,
            None => counted.push((&slot.transport, slot.usage, 1)),
        }
    }
    if counted.is_empty() {
        return "none in use".to_owned();
    }
    let counted = counted.iter();
    let counted = counted.map(|(transport, usage, count)| format!("{count} {transport} {usage}"));
    counted.collect::<Vec<_>>().join(", ")
}

fn attachment(attachment: &AttachmentStatus) -> Vec<String> {
    let disk = attachment.disk.as_deref().unwrap_or(&attachment.id);
    let at = attachment.locator.clone().unwrap_or_else(|| "-".to_owned());
    line(disk, at, access(attachment.read_only), &attachment.lease)
}

fn line(what: &str, of: String, kind: &str, lease: &LeaseStatus) -> Vec<String> {
    vec![
        what.to_owned(),
        shorten(&of, SECOND),
        kind.to_owned(),
        lease.state.to_string(),
        lease.shares.to_string(),
    ]
}

fn access(read_only: bool) -> &'static str {
    match read_only {
        true => "ro",
        false => "rw",
    }
}

fn activation(activation: &ActivationStatus) -> Vec<String> {
    let state = match activation.state {
        ActivationState::Up if activation.temporary => "up, temporary",
        ActivationState::Up => "up",
        ActivationState::Unclaimed => "unclaimed",
        ActivationState::Ending => "ending",
        _ => "pending",
    };
    vec![
        activation.name.clone(),
        shorten(&activation.namespace, SECOND),
        state.to_owned(),
        activation.mounts.to_string(),
    ]
}

/// What could not be torn down yet, and why.
fn pending(status: &Status) -> Vec<String> {
    let manager = &status.manager;
    let attachments = manager
        .attachments
        .iter()
        .map(|attachment| &attachment.lease);
    let mounts = manager.mounts.iter().map(|mount| &mount.lease);
    let stacks = manager.stacks.iter().map(|stack| &stack.lease);
    let views = manager.views.iter().map(|view| &view.lease);
    let leases = views.chain(stacks).chain(mounts).chain(attachments);
    let leases = leases.filter(|lease| lease.state == LeaseState::Pending);
    let lines = leases.map(|lease| {
        let why = printable(lease.why.as_deref().unwrap_or("for no known reason"));
        let tried = match lease.attempts {
            1 => "tried once".to_owned(),
            attempts => format!("tried {attempts} times"),
        };
        wrapped(&format!("  {why} ({tried})"), "    ")
    });
    lines.collect()
}

fn times(step: &StepStatus) -> Vec<String> {
    let times = [
        step.p50_seconds,
        step.p90_seconds,
        step.p99_seconds,
        step.max_seconds,
    ];
    let mut cells = vec![
        step.step.to_string(),
        step.succeeded.to_string(),
        step.failed.to_string(),
    ];
    cells.extend(times.map(seconds));
    cells
}

/// A time with three digits at most before its unit.
pub(crate) fn seconds(time: f64) -> String {
    match time {
        0.0 => "-".to_owned(),
        time if time < 0.001 => format!("{:.0} µs", time * 1e6),
        time if time < 0.1 => format!("{:.1} ms", time * 1e3),
        time if time < 1.0 => format!("{:.0} ms", time * 1e3),
        time => format!("{time:.1} s"),
    }
}

fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if days > 0 => format!("{days} d {} h", hours % 24),
        () if hours > 0 => format!("{hours} h {} min", minutes % 60),
        () if minutes > 0 => format!("{minutes} min {} s", seconds % 60),
        () => format!("{seconds} s"),
    }
}

/// A text in so many columns: of a longer one the end, which tells paths apart.
fn shorten(text: &str, columns: usize) -> String {
    let text = printable(text).to_string();
    let count = text.chars().count();
    match count <= columns {
        true => text,
        false => {
            let end: String = text.chars().skip(count + 1 - columns).collect();
            format!("…{end}")
        }
    }
}

fn list(header: &[&str], rows: &[Vec<String>], numbers: Range<usize>) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    // A frame on both sides, and three spaces between two columns.
    let others: usize = (1..header.len()).map(|column| width(column) + 3).sum();
    let first = usize::from(COLUMNS).saturating_sub(others + 4);
    let mut table = table(header);
    table.set_width(COLUMNS);
    for row in rows {
        let mut row = row.clone();
        row[0] = shorten(&row[0], first);
        table.add_row(row);
    }
    align(&mut table, numbers);
    table.to_string()
}

/// Numbers stand on the right.
fn align(table: &mut Table, columns: Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As another process sends it.
    fn status() -> Status {
        let long = format!("/var/lib/containerd/{}/layer.erofs", "snapshots/".repeat(9));
        let pending = json!({
            "locator": "scsi:0/1", "path": "/run/mounts/1", "read_only": true, "state": "pending", "shares": 0, "attempts": 2,
            "why": "cannot unmount device scsi:0/1 at /run/mounts/1: it is in use by process 12 (sleep): EBUSY",
        });
        serde_json::from_value(json!({
            "run": "0123456789abcdef", "process": 4711, "command": "serve", "name": "vm1", "guest": "qemu",
            "at": "/run/blockmount.sock", "up_seconds": 3700,
            "activations": [
                {"namespace": "default", "name": "web", "id": 7, "state": "up", "mounts": 3, "temporary": false},
                {"namespace": "default", "name": long, "id": 8, "state": "unclaimed", "mounts": 1, "temporary": false},
            ],
            "manager": {
                "frozen": false,
                "slots": [
                    {"transport": "scsi", "address": "0/0", "usage": "foreign"},
                    {"transport": "scsi", "address": "0/1", "usage": "occupied", "disk": long},
                    {"transport": "scsi", "address": "0/2", "usage": "occupied", "disk": "/b"},
                ],
                "attachments": [
                    {"id": "inode 7 of device 8", "disk": long, "read_only": true, "locator": "scsi:0/1", "state": "up", "shares": 1},
                    {"id": "inode 9 of device 8", "read_only": false, "state": "starting", "shares": 0},
                ],
                "mounts": [pending],
                "stacks": [{"target": "/run/blockmount/7f46784568212dbc/activated/7/4", "layers": ["/a", "/b"], "scratch": "/s", "state": "up", "shares": 1}],
                "views": [{"target": "/v", "source": "/run/mounts/1", "state": "up", "shares": 1}],
                "holders": [{"name": "containerd/7/0", "of": "the stack at /x"}],
                "steps": [{
                    "step": "Attach", "succeeded": 1234, "failed": 1, "total_seconds": 3.0, "p50_seconds": 0.00091,
                    "p90_seconds": 0.0123, "p99_seconds": 0.25, "max_seconds": 12.34, "buckets": [],
                }],
            },
        }))
        .unwrap()
    }

    #[test]
    fn all_of_it_is_there_in_80_columns() {
        let text = text(&status(), 20);
        let too_long = |line: &&str| line.chars().count() > 80;
        assert_eq!(text.lines().find(too_long), None, "{text}");
        // A row is one line.
        let is_broken = |line: &&str| line.starts_with('│') && line.split_whitespace().count() < 6;
        assert_eq!(text.lines().find(is_broken), None, "{text}");
        // Others are broken at spaces.
        let said = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for words in [
            "serve vm1: process 4711, up 1 h 1 min",
            "1 scsi foreign, 2 scsi occupied",
            "layer.erofs",
            "inode 9 of device 8",
            "2 layers, scratch",
            "unclaimed",
            "in use by process 12",
            "(tried 2 times)",
            "910 µs",
            "12.3 ms",
            "250 ms",
            "12.3 s",
        ] {
            assert!(said.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn the_most_important_is_there_however_few_lines_there_are() {
        let mut status = status();
        let one = status.activations[0].clone();
        status.activations = vec![one; 30];
        let head = head(&status).lines().count();
        for lines in head..80 {
            let text = fitted(&status, lines);
            assert!(text.lines().count() <= lines, "{lines}: {text}");
            assert!(text.starts_with("serve vm1: process 4711"), "{text}");
            let is_said = text.contains("pending\n  cannot unmount");
            assert_eq!(is_said, lines >= head + 3, "{lines}: {text}");
        }
        let text = fitted(&status, 23);
        assert_eq!(text.lines().count(), 23, "{text}");
        assert!(text.contains("910 µs"), "{text}");
        let shown = text.matches("default").count();
        let rest = format!("and {} more", 30 - shown);
        assert!(shown > 5 && text.contains(&rest), "{text}");
        assert_eq!(fitted(&status, 1000), super::text(&status, 1000));
    }

    #[test]
    fn long_lists_are_cut_and_say_so() {
        let mut status = status();
        let one = status.manager.attachments[0].clone();
        status.manager.attachments = vec![one; 7];
        let text = text(&status, 5);
        assert!(text.contains("and 2 more"), "{text}");
        assert_eq!(text.matches("layer.erofs   scsi:0/1 ").count(), 5, "{text}");
    }

    #[test]
    fn a_path_is_told_by_its_end() {
        assert_eq!(shorten("/a/b", 4), "/a/b");
        assert_eq!(shorten("/a/bc", 4), "…/bc");
        assert_eq!(shorten("/é/ö", 4), "/é/ö");
    }
}
