//! The picture of a measurement: time by number of disks, ours and the floor.

use std::path::{Path, PathBuf};

use plotters::prelude::*;
use rustix::fs::{Access, access};

use super::png::Letters;
use super::report::{BenchReport, SizeReport};
use crate::failure::{Context, Failure};

const SIZE: (u32, u32) = (800, 480);
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const FLOOR: RGBColor = RGBColor(0x88, 0x88, 0x88);

/// A file for a plot that can be drawn.
pub(crate) struct Plot {
    file: PathBuf,
    format: Format,
}

enum Format {
    Svg,
    /// The letters are pixels, too.
    Png(Letters),
}

impl Plot {
    /// Refuses what cannot be drawn or written before anything is measured.
    pub(crate) fn new(file: &Path) -> Result<Self, Failure> {
        let format = match file.extension().and_then(|extension| extension.to_str()) {
            Some("svg") => Format::Svg,
            Some("png") => Format::Png(Letters::of_this_machine(file)?),
            _ => {
                let what = format!("cannot draw {}", file.display());
                let why = "a plot is an SVG or a PNG, and its name ends in .svg or .png";
                return Err(Failure::usage(what).because(why));
            }
        };
        let parent = file
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        // The file itself if it is there: it is only replaced when there is something to draw.
        let written = match file.exists() {
            true => file,
            false => parent.unwrap_or(Path::new(".")),
        };
        access(written, Access::WRITE_OK).context(|| format!("cannot write {}", file.display()))?;
        Ok(Plot {
            file: file.to_owned(),
            format,
        })
    }

    /// Draws both ways of ours and of the floor, on logarithmic axes.
    pub(crate) fn draw(&self, report: &BenchReport) -> Result<(), Failure> {
        let Plot { file, format } = self;
        let mut text = String::new();
        let drawn = render(report, &mut text).and_then(|()| match format {
            Format::Svg => Ok(text.into_bytes()),
            Format::Png(letters) => letters.png(&text, SIZE),
        });
        let drawn = drawn.map_err(|error| error.to_string());
        let drawn = drawn.context(|| format!("cannot draw {}", file.display()))?;
        std::fs::write(file, drawn).context(|| format!("cannot write {}", file.display()))
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }
}

/// A line of the plot.
type Line = (&'static str, RGBColor, bool, fn(&SizeReport) -> f64);

const LINES: [Line; 4] = [
    ("up", OURS, true, |size| size.up.ours.p50),
    ("up, floor", FLOOR, true, |size| size.up.floor.p50),
    ("down", OURS, false, |size| size.down.ours.p50),
    ("down, floor", FLOOR, false, |size| size.down.floor.p50),
];

fn render(report: &BenchReport, text: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let times = || {
        let all = |size| LINES.map(|(.., of)| of(size));
        report.sizes.iter().flat_map(all)
    };
    let most = report.sizes.iter().map(|size| size.disks).max();
    let most = most.unwrap_or(1) as f64 * 1.2;
    let lowest = times().fold(f64::INFINITY, f64::min).max(0.001);
    let highest = times().fold(lowest, f64::max);
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let caption = format!(
        "Disks mounted and taken out, all at once ({})",
        report.guest
    );
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (0.9..most).log_scale(),
            (lowest * 0.7..highest * 1.5).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("disks")
        .y_desc("ms, median")
        .x_label_formatter(&|disks| format!("{disks:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    for (name, colour, is_solid, of) in LINES {
        let points = report
            .sizes
            .iter()
            .map(|size| (size.disks as f64, of(size)));
        let style = colour.stroke_width(2);
        let drawn = match is_solid {
            true => chart.draw_series(LineSeries::new(points.clone(), style))?,
            false => chart.draw_series(DashedLineSeries::new(points.clone(), 6, 4, style))?,
        };
        drawn.label(name).legend(move |(x, y)| {
            let end = if is_solid { x + 20 } else { x + 10 };
            PathElement::new([(x, y), (end, y)], colour.stroke_width(2))
        });
        chart.draw_series(points.map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(FLOOR)
        .draw()?;
    root.present()?;
    drop(chart);
    Ok(())
}
