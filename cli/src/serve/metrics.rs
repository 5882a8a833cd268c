//! The status of a server as metrics, by the conventions of OpenMetrics.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use blockmount::{LeaseState, LeaseStatus, StepStatus};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::status::{Source, Status};

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

/// All metrics, read when they are asked for.
pub(super) fn text(source: &Source) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Metrics(source.read())));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Metrics(Status);

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Metrics(status) = self;
        let manager = &status.manager;
        let mut info = encoder.encode_descriptor(
            "build",
            "The program that serves",
            None,
            MetricType::Info,
        )?;
        info.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let since = now.as_secs().saturating_sub(status.up_seconds);
        let seconds = Unit::Seconds;
        let mut start = encoder.encode_descriptor(
            "start_time",
            "When the server has begun to serve, as time since 1970",
            Some(&seconds),
            MetricType::Gauge,
        )?;
        start.encode_gauge(&(since as f64))?;
        let leases: [(&str, &str, Vec<&LeaseStatus>); 4] = [
            (
                "attachments",
                "Disks of the VM",
                manager.attachments.iter().map(|one| &one.lease).collect(),
            ),
            (
                "mounts",
                "Devices that are mounted in the guest",
                manager.mounts.iter().map(|one| &one.lease).collect(),
            ),
            (
                "stacks",
                "Layers that are seen as one tree",
                manager.stacks.iter().map(|one| &one.lease).collect(),
            ),
            (
                "views",
                "Mounts that are seen at further places",
                manager.views.iter().map(|one| &one.lease).collect(),
            ),
        ];
        for (name, help, leases) in &leases {
            by_state(&mut encoder, name, help, leases)?;
        }
        let shares = leases.iter().map(|(name, _, leases)| {
            let shares = leases.iter().map(|lease| lease.shares as i64).sum();
            ([("kind", *name)], shares)
        });
        gauges(&mut encoder, "shares", "Shares of what is up", shares)?;
        let holders = manager.holders.len() as i64;
        let mut held = encoder.encode_descriptor(
            "holders",
            "Names that hold something",
            None,
            MetricType::Gauge,
        )?;
        held.encode_gauge(&holders)?;
        slots(&mut encoder, status)?;
        activations(&mut encoder, status)?;
        steps(&mut encoder, &manager.steps)
    }
}

fn by_state(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    leases: &[&LeaseStatus],
) -> Result<(), fmt::Error> {
    let names = STATES.map(|state| state.to_string());
    let counts = STATES.iter().zip(&names).map(|(state, name)| {
        let count = leases.iter().filter(|lease| lease.state == *state).count();
        ([("state", &**name)], count as i64)
    });
    gauges(encoder, name, help, counts)
}

fn slots(encoder: &mut DescriptorEncoder<'_>, status: &Status) -> Result<(), fmt::Error> {
    let mut slots = BTreeMap::new();
    for slot in &status.manager.slots {
        *slots
            .entry((&*slot.transport, slot.usage.to_string()))
            .or_insert(0_i64) += 1;
    }
    let slots = slots.iter().map(|((transport, usage), count)| {
        ([("transport", *transport), ("usage", &**usage)], *count)
    });
    gauges(encoder, "slots", "Slots that are not free", slots)
}

fn activations(encoder: &mut DescriptorEncoder<'_>, status: &Status) -> Result<(), fmt::Error> {
    let mut namespaces = BTreeMap::new();
    for activation in &status.activations {
        *namespaces.entry(&*activation.namespace).or_insert(0_i64) += 1;
    }
    let namespaces = namespaces
        .iter()
        .map(|(namespace, count)| ([("namespace", *namespace)], *count));
    gauges(
        encoder,
        "activations",
        "Lists of mounts that clients have activated",
        namespaces,
    )
}

fn gauges<'a, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: impl Iterator<Item = ([(&'a str, &'a str); N], i64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in series {
        family.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}

fn steps(encoder: &mut DescriptorEncoder<'_>, steps: &[StepStatus]) -> Result<(), fmt::Error> {
    let help = "How long calls of the backends took that have succeeded";
    let seconds = Unit::Seconds;
    let mut times =
        encoder.encode_descriptor("step_duration", help, Some(&seconds), MetricType::Histogram)?;
    for step in steps {
        let name = step.step.to_string();
        let labels = [("step", &*name)];
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
    for step in steps {
        let name = step.step.to_string();
        let labels = [("step", &*name)];
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
