//! The status of a run for people, in 80 columns.

use std::fmt::Write as _;

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
/// The columns that a path is given.
const PATH: usize = 34;

/// All of it. Of each list at most `rows` lines are shown, and how many more there are.
pub(crate) fn text(status: &Status, rows: usize) -> String {
    let manager = &status.manager;
    let mut parts = vec![head(status)];
    if !manager.attachments.is_empty() {
        let lines = manager.attachments.iter().map(attachment);
        parts.push(list(
            &["disk", "at", "access", "state", "shares"],
            lines,
            rows,
        ));
    }
    if !manager.mounts.is_empty() {
        let lines = manager.mounts.iter().map(|mount| {
            let path = mount.path.as_deref().unwrap_or("-");
            let locator = mount.locator.clone();
            line(path, locator, access(mount.read_only), &mount.lease)
        });
        parts.push(list(
            &["mount", "of", "access", "state", "shares"],
            lines,
            rows,
        ));
    }
    if !manager.stacks.is_empty() || !manager.views.is_empty() {
        let stacks = manager.stacks.iter().map(|stack| {
            let scratch = stack.scratch.as_ref().map_or("", |_| ", scratch");
            let of = match stack.layers.len() {
                1 => format!("1 layer{scratch}"),
                count => format!("{count} layers{scratch}"),
            };
            line(
                &stack.target,
                of,
                access(stack.scratch.is_none()),
                &stack.lease,
            )
        });
        let views = manager.views.iter().map(|view| {
            let of = view.source.as_deref().unwrap_or("-");
            line(&view.target, shorten(of, 18), "view", &view.lease)
        });
        let header = ["tree", "of", "kind", "state", "shares"];
        parts.push(list(&header, stacks.chain(views), rows));
    }
    if !status.activations.is_empty() {
        let header = ["activation", "namespace", "state", "mounts"];
        parts.push(list(
            &header,
            status.activations.iter().map(activation),
            rows,
        ));
    }
    let pending = pending(status);
    if !pending.is_empty() {
        parts.push(format!("pending\n{}", pending.join("\n")));
    }
    if !manager.steps.is_empty() {
        let header = ["step", "calls", "failed", "p50", "p90", "p99", "max"];
        let mut table = list_of(&header);
        for step in &manager.steps {
            table.add_row(times(step));
        }
        align(&mut table, 1..7);
        parts.push(table.to_string());
    }
    parts.join("\n")
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
    let first = format!(
        "{}{}: process {}, up {}, {guest}, at {}",
        status.command,
        name.unwrap_or_default(),
        status.process,
        duration(status.up_seconds),
        printable(&status.at)
    );
    let manager = &status.manager;
    let frozen = if manager.frozen { "; frozen" } else { "" };
    let counts = format!(
        "{} disks, {} mounts, {} stacks, {} views, {} holders; slots: {}{frozen}",
        manager.attachments.len(),
        manager.mounts.len(),
        manager.stacks.len(),
        manager.views.len(),
        manager.holders.len(),
        slots(&manager.slots),
    );
    format!("{}\n{}", wrapped(&first, "  "), wrapped(&counts, "  "))
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
        shorten(what, PATH),
        shorten(&of, 18),
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
        shorten(&activation.name, PATH),
        shorten(&activation.namespace, 18),
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

fn list(header: &[&str], lines: impl Iterator<Item = Vec<String>>, rows: usize) -> String {
    let mut table = list_of(header);
    let (mut shown, mut more) = (0, 0);
    for line in lines {
        match shown < rows {
            true => {
                table.add_row(line);
                shown += 1;
            }
            false => more += 1,
        }
    }
    align(&mut table, header.len() - 1..header.len());
    let mut text = table.to_string();
    if more > 0 {
        let _ = write!(text, "\n  and {more} more");
    }
    text
}

fn list_of(header: &[&str]) -> Table {
    let mut table = table(header);
    table.set_width(COLUMNS);
    table
}

/// Numbers stand on the right.
fn align(table: &mut Table, columns: std::ops::Range<usize>) {
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
                "stacks": [{"target": "/run/blockmount/activated/7/4", "layers": ["/a", "/b"], "scratch": "/s", "state": "up", "shares": 1}],
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
        // Lines are broken at spaces.
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
