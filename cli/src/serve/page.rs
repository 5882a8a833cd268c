//! A page that draws the slots and how long each step takes: HTML and SVG, drawn anew for each request.

use std::fmt::{self, Write as _};

use blockmount::placement::SlotUse;
use blockmount::{LeaseState, SlotStatus, StepStatus};

use crate::status::Status;
use crate::status::text::{seconds, text};

/// How often a browser asks again.
const AGAIN_SECONDS: u32 = 2;
/// A drawing has this width of its own. As wide as a narrow window, so that its text is not made smaller there.
const WIDTH: f64 = 600.0;
/// A slot is a square with some space around it.
const SLOT: f64 = 18.0;
const PITCH: f64 = 22.0;
/// The names of steps are this wide.
const NAMES: f64 = 90.0;
const ROW: f64 = 26.0;
/// The times that are drawn: from 10 microseconds to 100 seconds, each power of ten as wide as the next.
const SHORTEST: f64 = 1e-5;
const LONGEST: f64 = 1e2;
/// As many lines of a list as are shown.
const ROWS: usize = 200;

const STYLE: &str = "\
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;padding:0 1em;max-width:860px;color:#222;background:#fff}\
h1{font-size:1.4em}h2{font-size:1.2em;margin-top:2em;border-top:1px solid #ccc;padding-top:1em}h3{font-size:1.1em;margin-top:2em}\
pre{font:12px/1.15 ui-monospace,monospace;overflow-x:auto}svg{display:block;max-width:720px}\
text{font:12px system-ui,sans-serif;fill:currentColor}.axis{stroke:#ccc}.quiet{fill:#777}\
.occupied{fill:#2b7bba}.quarantined{fill:#d43d3d}.retained{fill:#c9a227}.foreign{fill:#999}.pinned{fill:#555}\
.half{fill:#2b7bba}.most{fill:#8fbfe0}.all{fill:#d6e8f5}.longest{stroke:#d43d3d;stroke-width:2}\
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}.axis{stroke:#444}.most{fill:#336688}.all{fill:#234}}";

/// The whole page: what a server is for, one after the other.
pub(super) fn html(statuses: &[Status]) -> String {
    let mut page = String::new();
    write(&mut page, statuses).expect("a string takes all that is written to it");
    page
}

fn write(page: &mut String, statuses: &[Status]) -> fmt::Result {
    let first = statuses.first();
    let command = first.map_or("serve", |status| &status.command);
    let name = first.and_then(|status| status.name.as_deref());
    let title = format!("blockmount {command} {}", name.unwrap_or_default());
    let title = Escaped(title.trim_end());
    write!(
        page,
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <meta http-equiv=refresh content={AGAIN_SECONDS}><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
    )?;
    for status in statuses {
        section(page, status)?;
    }
    page.push_str("<p><a href=/metrics>metrics</a> <a href=/status.json>JSON</a></html>\n");
    Ok(())
}

fn section(page: &mut String, status: &Status) -> fmt::Result {
    // Where there are several, each has its name.
    if let Some(vm) = &status.vm {
        write!(page, "<h2>VM {}</h2>", Escaped(vm))?;
    }
    if let Some(why) = &status.lost {
        write!(page, "<p><strong>lost</strong>: {}", Escaped(why))?;
    }
    let pending = pending(status);
    if pending > 0 {
        write!(
            page,
            "<p><strong>{pending} pending</strong>: see below why."
        )?;
    }
    page.push_str("<h3>Slots</h3>");
    slots(page, &status.manager.slots)?;
    page.push_str("<h3>Time of each step</h3>");
    steps(page, &status.manager.steps)?;
    write!(
        page,
        "<h3>All of it</h3><pre>{}</pre>",
        Escaped(&text(status, ROWS))
    )
}

fn pending(status: &Status) -> usize {
    let manager = &status.manager;
    let attachments = manager.attachments.iter().map(|one| one.lease.state);
    let mounts = manager.mounts.iter().map(|one| one.lease.state);
    let stacks = manager.stacks.iter().map(|one| one.lease.state);
    let views = manager.views.iter().map(|one| one.lease.state);
    let states = attachments.chain(mounts).chain(stacks).chain(views);
    states.filter(|state| *state == LeaseState::Pending).count()
}

/// A square for each slot that is not free, in rows, and what the colours mean.
fn slots(page: &mut String, slots: &[SlotStatus]) -> fmt::Result {
    if slots.is_empty() {
        page.push_str("<p>All are free.");
        return Ok(());
    }
    let columns = (WIDTH / PITCH) as usize;
    let rows = slots.len().div_ceil(columns);
    let legend = rows as f64 * PITCH + 18.0;
    svg(page, legend + 8.0, "the slots that are not free")?;
    for (index, slot) in slots.iter().enumerate() {
        let (x, y) = (
            (index % columns) as f64 * PITCH,
            (index / columns) as f64 * PITCH,
        );
        let (class, disk) = (
            slot.usage,
            slot.disk.as_deref().unwrap_or("no disk is known"),
        );
        write!(
            page,
            "<rect class={class} x={x} y={y} width={SLOT} height={SLOT} rx=3><title>{}:{} {class}: {}</title></rect>",
            Escaped(&slot.transport),
            Escaped(&slot.address),
            Escaped(disk),
        )?;
    }
    let uses = [
        SlotUse::Occupied,
        SlotUse::Quarantined,
        SlotUse::Retained,
        SlotUse::Foreign,
        SlotUse::Pinned,
    ];
    let used = uses
        .into_iter()
        .filter(|usage| slots.iter().any(|slot| slot.usage == *usage));
    for (index, usage) in used.enumerate() {
        let x = index as f64 * 118.0;
        let count = slots.iter().filter(|slot| slot.usage == usage).count();
        write!(
            page,
            "<rect class={usage} x={x} y={} width=12 height=12 rx=2></rect><text x={} y={legend}>{count} {usage}</text>",
            legend - 11.0,
            x + 18.0,
        )?;
    }
    page.push_str("</svg>");
    Ok(())
}

/// A bar for each step: to the median, to 90 and to 99 of 100 calls, and a mark at the longest.
fn steps(page: &mut String, steps: &[StepStatus]) -> fmt::Result {
    let steps: Vec<&StepStatus> = steps.iter().filter(|step| step.succeeded > 0).collect();
    if steps.is_empty() {
        page.push_str("<p>Nothing was done yet.");
        return Ok(());
    }
    let bottom = steps.len() as f64 * ROW;
    svg(page, bottom + 44.0, "how long each step takes")?;
    let decades = [
        "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s",
    ];
    for (power, name) in decades.iter().enumerate() {
        let x = at(SHORTEST * 10_f64.powi(power as i32));
        let anchor = if power + 1 == decades.len() {
            "end"
        } else {
            "middle"
        };
        write!(
            page,
            "<line class=axis x1={x:.1} x2={x:.1} y1=0 y2={bottom}></line>\
             <text class=quiet x={x:.1} y={} text-anchor={anchor}>{name}</text>",
            bottom + 16.0,
        )?;
    }
    for (index, step) in steps.iter().enumerate() {
        let y = index as f64 * ROW;
        write!(page, "<g><title>{}</title>", said(step))?;
        write!(page, "<text x=0 y={}>{}</text>", y + 17.0, step.step)?;
        let bars = [
            ("all", step.p99_seconds),
            ("most", step.p90_seconds),
            ("half", step.p50_seconds),
        ];
        for (class, time) in bars {
            let width = at(time) - NAMES;
            write!(
                page,
                "<rect class={class} x={NAMES} y={} width={width:.1} height={} rx=2></rect>",
                y + 4.0,
                ROW - 9.0
            )?;
        }
        let x = at(step.max_seconds);
        write!(
            page,
            "<line class=longest x1={x:.1} x2={x:.1} y1={} y2={}></line></g>",
            y + 2.0,
            y + ROW - 3.0
        )?;
    }
    write!(
        page,
        "<text class=quiet x={NAMES} y={}>from dark to light: 50, 90 and 99 of 100 calls; the line is the longest</text></svg>",
        bottom + 36.0
    )
}

fn said(step: &StepStatus) -> String {
    format!(
        "{}: {} calls, {} failed; p50 {}, p90 {}, p99 {}, max {}",
        step.step,
        step.succeeded,
        step.failed,
        seconds(step.p50_seconds),
        seconds(step.p90_seconds),
        seconds(step.p99_seconds),
        seconds(step.max_seconds)
    )
}

/// Where a time is drawn.
fn at(time: f64) -> f64 {
    let time = time.clamp(SHORTEST, LONGEST);
    let part = (time / SHORTEST).log10() / (LONGEST / SHORTEST).log10();
    NAMES + part * (WIDTH - NAMES)
}

fn svg(page: &mut String, height: f64, label: &str) -> fmt::Result {
    write!(
        page,
        "<svg role=img aria-label=\"{label}\" viewBox=\"0 0 {WIDTH} {height}\" width=\"100%\">"
    )
}

/// Names of others are text, and nothing else.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_others_are_text() {
        let text = Escaped("<script>'a' & \"b\"").to_string();
        assert_eq!(text, "&lt;script&gt;&#39;a&#39; &amp; &quot;b&quot;");
    }

    #[test]
    fn times_are_drawn_in_their_order_and_inside() {
        let times = [0.0, 1e-5, 1e-4, 0.5, 100.0, 1e9];
        let drawn: Vec<f64> = times.iter().map(|time| at(*time)).collect();
        assert!(drawn.is_sorted(), "{drawn:?}");
        assert_eq!((drawn[0], drawn[5]), (NAMES, WIDTH));
    }
}
