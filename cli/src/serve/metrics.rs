//! The status of a server as metrics, by the conventions of OpenMetrics.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use blockmount::{LeaseState, LeaseStatus, StepStatus};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::status::Status;

/// What a scraper is told that the text is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// What stands before the names of all metrics.
const PREFIX: &str = "blockmount";
/// The states of what is shared, each of which is there as a series also where nothing is in it.
const STATES: [LeaseState; 5] = [
    LeaseState::Starting,
    LeaseState::Up,
    LeaseState::Lingering,
    LeaseState::Ending,
    LeaseState::Pending,
];

/// The labels of a series.
type Labels<'a> = Vec<(&'static str, &'a str)>;

/// All metrics of what a server is for.
pub(super) fn text(statuses: Vec<Status>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Metrics(statuses)));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Metrics(Vec<Status>);

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Metrics(statuses) = self;
        let mut info = encoder.encode_descriptor(
            "build",
            "The program that serves",
            None,
            MetricType::Info,
        )?;
        info.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        start_time(&mut encoder, statuses)?;
        let machines = statuses.iter().filter(|status| status.guest != "local");
        let up = machines.map(|status| (labels(status, []), i64::from(status.lost.is_none())));
        gauges(
            &mut encoder,
            "vm_up",
            "Whether the virtual machine is there, and not lost",
            up,
        )?;
        for (name, help, of) in LEASES {
            by_state(&mut encoder, name, help, statuses, of)?;
        }
        let shares = statuses.iter().flat_map(|status| {
            LEASES.map(|(name, _, of)| {
                let shares = of(status).iter().map(|lease| lease.shares as i64).sum();
                (labels(status, [("kind", name)]), shares)
            })
        });
        gauges(&mut encoder, "shares", "Shares of what is up", shares)?;
        let holders = statuses
            .iter()
            .map(|status| (labels(status, []), status.manager.holders.len() as i64));
        gauges(
            &mut encoder,
            "holders",
            "Names that hold something",
            holders,
        )?;
        slots(&mut encoder, statuses)?;
        activations(&mut encoder, statuses)?;
        steps(&mut encoder, statuses)
    }
}

/// What is shared, of a status.
type LeasesOf = fn(&Status) -> Vec<&LeaseStatus>;

const LEASES: [(&str, &str, LeasesOf); 4] = [
    ("attachments", "Disks of the VM", |status| {
        let all = status.manager.attachments.iter();
        all.map(|one| &one.lease).collect()
    }),
    (
        "mounts",
        "Devices that are mounted in the guest",
        |status| status.manager.mounts.iter().map(|one| &one.lease).collect(),
    ),
    ("stacks", "Layers that are seen as one tree", |status| {
        status.manager.stacks.iter().map(|one| &one.lease).collect()
    }),
    (
        "views",
        "Mounts that are seen at further places",
        |status| status.manager.views.iter().map(|one| &one.lease).collect(),
    ),
];

/// Labels, and the name of the virtual machine where a server has several.
fn labels<'a, const N: usize>(
    status: &'a Status,
    others: [(&'static str, &'a str); N],
) -> Labels<'a> {
    let vm = status.vm.as_deref().map(|vm| ("vm", vm));
    vm.into_iter().chain(others).collect()
}

fn start_time(encoder: &mut DescriptorEncoder<'_>, statuses: &[Status]) -> Result<(), fmt::Error> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let up = statuses.iter().map(|status| status.up_seconds).max();
    let since = now.as_secs().saturating_sub(up.unwrap_or_default());
    let seconds = Unit::Seconds;
    let mut start = encoder.encode_descriptor(
        "start_time",
        "When the server has begun to serve, as time since 1970",
        Some(&seconds),
        MetricType::Gauge,
    )?;
    start.encode_gauge(&(since as f64))
}

fn by_state(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    statuses: &[Status],
    of: LeasesOf,
) -> Result<(), fmt::Error> {
    let names = STATES.map(|state| state.to_string());
    let counts = statuses.iter().flat_map(|status| {
        let leases = of(status);
        let counts = STATES.iter().zip(&names).map(move |(state, name)| {
            let count = leases.iter().filter(|lease| lease.state == *state).count();
            (labels(status, [("state", name)]), count as i64)
        });
        counts.collect::<Vec<_>>()
    });
    gauges(encoder, name, help, counts)
}

fn slots(encoder: &mut DescriptorEncoder<'_>, statuses: &[Status]) -> Result<(), fmt::Error> {
    let mut slots = BTreeMap::new();
    for status in statuses {
        for slot in &status.manager.slots {
            let key = (&status.vm, &*slot.transport, slot.usage.to_string());
            slots.entry(key).or_insert((status, 0_i64)).1 += 1;
        }
    }
    let slots = slots
        .iter()
        .map(|((_, transport, usage), (status, count))| {
            let labels = labels(status, [("transport", transport), ("usage", usage)]);
            (labels, *count)
        });
    gauges(encoder, "slots", "Slots that are not free", slots)
}

fn activations(encoder: &mut DescriptorEncoder<'_>, statuses: &[Status]) -> Result<(), fmt::Error> {
    let mut namespaces = BTreeMap::new();
    for status in statuses {
        for activation in &status.activations {
            let key = (&status.vm, &*activation.namespace);
            namespaces.entry(key).or_insert((status, 0_i64)).1 += 1;
        }
    }
    let namespaces = namespaces.iter().map(|((_, namespace), (status, count))| {
        (labels(status, [("namespace", namespace)]), *count)
    });
    gauges(
        encoder,
        "activations",
        "Lists of mounts that clients have activated",
        namespaces,
    )
}

fn gauges<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: impl Iterator<Item = (Labels<'a>, i64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in series {
        family.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}

fn steps(encoder: &mut DescriptorEncoder<'_>, statuses: &[Status]) -> Result<(), fmt::Error> {
    let steps = statuses.iter().flat_map(|status| {
        let steps = status.manager.steps.iter();
        steps.map(move |step| (status, step, step.step.to_string()))
    });
    let steps: Vec<(&Status, &StepStatus, String)> = steps.collect();
    let help = "How long calls of the backends took that have succeeded";
    let seconds = Unit::Seconds;
    let mut times =
        encoder.encode_descriptor("step_duration", help, Some(&seconds), MetricType::Histogram)?;
    for (status, step, name) in &steps {
        let labels = labels(status, [("step", name)]);
        let mut series = times.encode_family(&labels)?;
        series.encode_histogram::<NoLabelSet>(
            step.total_seconds,
            step.succeeded,
            &buckets(step),
            None,
        )?;
    }
    let help = "Calls of the backends that have failed";
    let mut failures =
        encoder.encode_descriptor("step_failures", help, None, MetricType::Counter)?;
    for (status, step, name) in &steps {
        let labels = labels(status, [("step", name)]);
        let mut series = failures.encode_family(&labels)?;
        series.encode_counter::<NoLabelSet, _, f64>(&step.failed, None)?;
    }
    Ok(())
}

/// Each bound, with how many calls are between the one before and this one.
fn buckets(step: &StepStatus) -> Vec<(f64, u64)> {
    let all = step
        .buckets
        .iter()
        .map(|bucket| (bucket.below_seconds, bucket.count));
    let all = all.chain([(f64::INFINITY, step.succeeded)]);
    let mut before = 0;
    let between = all.map(|(bound, count)| {
        let between = count.saturating_sub(before);
        before = count;
        (bound, between)
    });
    between.collect()
}
