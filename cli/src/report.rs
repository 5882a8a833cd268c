//! What the demo found, as a table for people and as JSON for programs.

use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::failure::printable;

/// The result of a demo. Its JSON form is this structure, field by field.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Where the guest is: `local` for this machine, `qemu` for a virtual one.
    pub(crate) guest: &'static str,
    /// Every disk that was used: the shared layers, topmost first, then the scratch disks.
    pub(crate) layers: Vec<LayerReport>,
    pub(crate) containers: Vec<ContainerReport>,
    /// Slots of the transport in use while both containers ran.
    pub(crate) slots: Vec<SlotReport>,
    /// Different images among `layers`.
    pub(crate) distinct_images: usize,
    /// Attachments made, over the whole run.
    pub(crate) attaches: u64,
    pub(crate) detaches: u64,
    /// Device mounts made, over the whole run; overlays are not among them.
    pub(crate) mounts: u64,
    pub(crate) unmounts: u64,
    /// Files whose digest was compared with the source, counted each time.
    pub(crate) files_checked: u64,
    /// Names that were missing, too many, or had another type or content than the source.
    pub(crate) digest_mismatches: usize,
    /// The first of them, each with where it was seen.
    pub(crate) mismatches: Vec<String>,
    /// What is ours in the kernel's tables and on the disk after everything was released.
    pub(crate) left_over: Vec<String>,
    /// From before the first attachment to after the last check.
    pub(crate) seconds: f64,
    /// How long adding disks takes beside the least it can take; measured where there is a VM.
    pub(crate) speed: Option<Speed>,
}

/// Which of the two kinds of disk it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Layer,
    Scratch,
}

/// One disk.
#[derive(Debug, Serialize)]
pub(crate) struct LayerReport {
    pub(crate) source: String,
    pub(crate) role: Role,
    pub(crate) partition: Option<u32>,
    pub(crate) filesystem: String,
    pub(crate) transport: String,
    pub(crate) locator: String,
    pub(crate) device: String,
    pub(crate) path: String,
    pub(crate) attach_ms: f64,
    pub(crate) mount_ms: f64,
    /// Why a transport that was asked before has not taken it.
    pub(crate) passed_on: Option<String>,
    /// How many containers had it at once.
    pub(crate) containers: usize,
}

/// One container.
#[derive(Debug, Serialize)]
pub(crate) struct ContainerReport {
    pub(crate) name: &'static str,
    pub(crate) path: String,
    pub(crate) scratch: String,
    pub(crate) overlay_ms: f64,
    pub(crate) files: u64,
}

/// One slot in use.
#[derive(Debug, Serialize)]
pub(crate) struct SlotReport {
    /// As the transport numbers it: `3`, or `0/3` for LUN 3 of SCSI controller 0.
    pub(crate) slot: String,
    /// `occupied`, or `quarantined` while it is unknown what is in it.
    pub(crate) state: String,
    pub(crate) device: String,
    pub(crate) read_only: bool,
    /// Whether the device goes around the page cache of the file beneath.
    pub(crate) direct_io: bool,
    pub(crate) disk: String,
}

/// How many mismatches are worth listing.
pub(crate) const LISTED: usize = 20;

/// A time in milliseconds, to the microsecond.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

impl Report {
    /// Whether everything was as it should be.
    pub(crate) fn is_good(&self) -> bool {
        self.digest_mismatches == 0
            && self.left_over.is_empty()
            && self.files_checked > 0
            && self.attaches == self.distinct_images as u64
            && self.detaches == self.attaches
            && self.unmounts == self.mounts
    }

    /// Everything, for people.
    pub(crate) fn to_text(&self) -> String {
        let mut text = format!(
            "{}\n{}\nSlots in use\n{}\n",
            self.layer_table(),
            passed_on(
                self.layers
                    .iter()
                    .map(|layer| (&*layer.source, &layer.passed_on))
            ),
            self.slot_table()
        );
        text += &format!(
            "\nContainers\n{}\n\n{}",
            self.container_table(),
            self.summary()
        );
        if let Some(Speed { one, many }) = &self.speed {
            text += &format!("\n{}\n{}", one.to_text(), many.to_text());
        }
        for mismatch in &self.mismatches {
            text += &format!("\n  mismatch: {}", printable(mismatch));
        }
        for left in &self.left_over {
            text += &format!("\n  left over: {}", printable(left));
        }
        text
    }

    fn layer_table(&self) -> Table {
        let mut table = table(&[
            "layer",
            "filesystem",
            "transport",
            "locator",
            "device",
            "path",
            "attach ms",
            "mount ms",
            "shared by",
        ]);
        for layer in &self.layers {
            let partition = layer
                .partition
                .map_or(String::new(), |number| format!(" (partition {number})"));
            table.add_row([
                printable(format!("{}{partition}", file_name(&layer.source))).to_string(),
                layer.filesystem.clone(),
                layer.transport.clone(),
                layer.locator.clone(),
                layer.device.clone(),
                printable(&layer.path).to_string(),
                format!("{:.2}", layer.attach_ms),
                format!("{:.2}", layer.mount_ms),
                layer.containers.to_string(),
            ]);
        }
        table
    }

    fn slot_table(&self) -> Table {
        let mut table = table(&["slot", "state", "device", "access", "direct i/o", "disk"]);
        for slot in &self.slots {
            table.add_row([
                slot.slot.clone(),
                slot.state.clone(),
                slot.device.clone(),
                if slot.read_only {
                    "read-only"
                } else {
                    "read-write"
                }
                .to_owned(),
                if slot.direct_io { "yes" } else { "no" }.to_owned(),
                printable(&slot.disk).to_string(),
            ]);
        }
        table
    }

    fn container_table(&self) -> Table {
        let mut table = table(&["container", "path", "scratch", "overlay ms", "files"]);
        for container in &self.containers {
            table.add_row([
                container.name.to_owned(),
                printable(&container.path).to_string(),
                printable(&container.scratch).to_string(),
                format!("{:.2}", container.overlay_ms),
                container.files.to_string(),
            ]);
        }
        table
    }

    fn summary(&self) -> String {
        let verdict = if self.is_good() { "good" } else { "NOT GOOD" };
        let left = match self.left_over.len() {
            0 => "nothing left over".to_owned(),
            count => format!("{count} left over"),
        };
        format!(
            "{verdict}: {} images, attached {} times and mounted {} times for {} containers; {} files \
             checked, {} mismatches; {left}; {:.1} s",
            self.distinct_images,
            self.attaches,
            self.mounts,
            self.containers.len(),
            self.files_checked,
            self.digest_mismatches,
            self.seconds,
        )
    }
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Speed {
    pub(crate) one: Comparison,
    pub(crate) many: Comparison,
}

/// From the first request until all disks are mounted.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Comparison {
    /// How many disks were added at once.
    pub(crate) disks: usize,
    pub(crate) ours_ms: f64,
    /// The bare commands and mounts, in the same run.
    pub(crate) floor_ms: f64,
    pub(crate) ratio: f64,
}

impl Comparison {
    fn to_text(&self) -> String {
        let Comparison {
            disks,
            ours_ms,
            floor_ms,
            ratio,
        } = self;
        format!(
            "{disks} at once, from add to mounted: {ours_ms:.1} ms; bare commands and mounts: \
             {floor_ms:.1} ms; ratio {ratio:.2}"
        )
    }
}

/// Why disks are not on the transport that was asked first, a line each.
pub(crate) fn passed_on<'a>(disks: impl Iterator<Item = (&'a str, &'a Option<String>)>) -> String {
    let lines = disks.filter_map(|(source, why)| {
        let (name, why) = (printable(file_name(source)), printable(why.as_ref()?));
        Some(format!("{name}: {why}\n"))
    });
    lines.collect()
}

/// A table in the program's one style.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header);
    table
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            guest: "local",
            layers: Vec::new(),
            containers: Vec::new(),
            slots: Vec::new(),
            distinct_images: 2,
            attaches: 2,
            detaches: 2,
            mounts: 2,
            unmounts: 2,
            files_checked: 9,
            digest_mismatches: 0,
            mismatches: Vec::new(),
            left_over: Vec::new(),
            seconds: 1.0,
            speed: None,
        }
    }

    #[test]
    fn only_a_perfect_run_is_good() {
        assert!(report().is_good());
        let bad = [
            Report {
                attaches: 3,
                detaches: 3,
                ..report()
            },
            Report {
                detaches: 1,
                ..report()
            },
            Report {
                unmounts: 1,
                ..report()
            },
            Report {
                files_checked: 0,
                ..report()
            },
            Report {
                digest_mismatches: 1,
                ..report()
            },
            Report {
                left_over: vec!["x".into()],
                ..report()
            },
        ];
        for report in bad {
            assert!(
                !report.is_good() && report.to_text().contains("NOT GOOD"),
                "{report:?}"
            );
        }
    }
}
