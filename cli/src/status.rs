//! How the runs are doing that hold something: mounts, and servers.

mod socket;
pub(crate) mod text;
mod tree;

use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use blockmount::HolderName;
use serde::Serialize;

use crate::args::StatusArgs;
use crate::failure::{Context, FAILED, Failure};
use crate::interrupt::Interrupt;
use crate::run::{self, Kept, RunPaths, runs};
use crate::terminal::{print, print_json, wrapped};

pub(crate) use socket::{Offered, offer};
pub(crate) use tree::{Source, Status};

/// How often the runs are asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// The lines of a list, where it is shown for a moment only, and to no terminal.
const WATCHED_ROWS: usize = 12;
/// The lines of a run of which nothing is shown but how much it has.
const LEAST_ROWS: usize = 4;
/// The lines of a terminal that does not say how many it has.
const ROWS: usize = 24;
/// Shows another picture in place of what a terminal shows, and puts that back.
const OTHER_SCREEN: &str = "\u{1b}[?1049h\u{1b}[?25l";
const FIRST_SCREEN: &str = "\u{1b}[?25h\u{1b}[?1049l";
/// Goes to the upper left corner; clears to the end of a line, and of the picture.
const HOME: &str = "\u{1b}[H";
const END_OF_LINE: &str = "\u{1b}[K";
const END_OF_SCREEN: &str = "\u{1b}[J";

/// All runs of this user that hold something, and those that did when their programs ended.
#[derive(Debug, Serialize)]
struct Report {
    runs: Vec<Status>,
    ended: Vec<EndedRun>,
}

#[derive(Debug, Serialize)]
struct EndedRun {
    name: String,
    /// The command that goes on with it.
    resume: String,
}

/// Shows it once, or again and again until a signal. `Ok` is the exit status.
pub(crate) async fn run(args: StatusArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    if !args.watch {
        let report = Report::read(&args).await?;
        match args.json {
            true => print_json(&report)?,
            false => print(&report.to_text(usize::MAX))?,
        }
        let is_missing = args.name.is_some() && report.runs.is_empty();
        return Ok(if is_missing { FAILED } else { 0 });
    }
    let is_drawn = io::stdout().is_terminal() && !args.json;
    let screen = is_drawn.then(Screen::open).transpose()?;
    loop {
        let report = Report::read(&args).await?;
        match (args.json, &screen) {
            (true, _) => {
                let line = serde_json::to_string(&report);
                print(&line.context(|| "cannot write the status as json".to_owned())?)?;
            }
            (false, Some(screen)) => screen.draw(&report)?,
            (false, None) => print(&format!("{}\n", report.to_text(WATCHED_ROWS)))?,
        }
        tokio::select! {
            // Nothing tells of every change of every run.
            () = tokio::time::sleep(AGAIN) => {}
            _ = interrupt.requested() => return Ok(0),
        }
    }
}

impl Report {
    async fn read(args: &StatusArgs) -> Result<Self, Failure> {
        let mut report = Report {
            runs: Vec::new(),
            ended: Vec::new(),
        };
        for paths in all_runs()? {
            match socket::ask(&paths.status_socket()).await {
                Ok(Some(status)) => {
                    let wanted = args.name.as_ref().map(HolderName::as_str);
                    if wanted.is_none() || wanted == status.name.as_deref() {
                        report.runs.push(status);
                    }
                }
                Ok(None) => {
                    report
                        .ended
                        .extend(EndedRun::of(&paths, args.name.as_ref()));
                }
                Err(error) => {
                    let run = &paths.id;
                    tracing::warn!(run, %error, "a run does not say how it is doing");
                }
            }
        }
        report.runs.sort_by(|one, other| {
            let key = |status: &Status| {
                (
                    status.command.clone(),
                    status.name.clone(),
                    status.process,
                    status.vm.clone(),
                )
            };
            key(one).cmp(&key(other))
        });
        Ok(report)
    }

    fn to_text(&self, rows: usize) -> String {
        let runs = self.runs.iter().map(|status| text::text(status, rows));
        self.with_ended(runs.collect())
    }

    /// As much of it as has room in so many lines, about the same for each run.
    fn fitted(&self, lines: usize) -> String {
        let ended = match self.ended.is_empty() {
            true => 0,
            false => self.with_ended(Vec::new()).lines().count() + 1,
        };
        let mut left = lines.saturating_sub(ended);
        let mut parts = Vec::new();
        for (index, status) in self.runs.iter().enumerate() {
            let others = self.runs.len() - index;
            // An empty line is between two.
            let own = ((left + 1) / others).saturating_sub(1);
            let text = text::fitted(status, own.max(LEAST_ROWS).min(left));
            if text.is_empty() {
                parts.push(format!("and {others} more"));
                break;
            }
            left = left.saturating_sub(text.lines().count() + 1);
            parts.push(text);
        }
        self.with_ended(parts)
    }

    fn with_ended(&self, mut parts: Vec<String>) -> String {
        for EndedRun { name, resume } in &self.ended {
            let line = format!("{name}: its program has ended; go on with it: {resume}");
            parts.push(wrapped(&line, "  "));
        }
        match parts.is_empty() {
            true => "nothing is held".to_owned(),
            false => parts.join("\n\n"),
        }
    }
}

impl EndedRun {
    /// None for a run that lives, and holds nothing yet or anymore, or that nobody can go on with, or that has another name than the
    /// wanted one.
    fn of(paths: &RunPaths, wanted: Option<&HolderName>) -> Option<Self> {
        if paths.is_alive().unwrap_or(true) {
            return None;
        }
        let Kept::Resumable(remembered) = paths.kept() else {
            return None;
        };
        if wanted.is_some_and(|wanted| !remembered.is_called(wanted)) {
            return None;
        }
        Some(EndedRun {
            name: remembered.name.to_string(),
            resume: remembered.resuming(),
        })
    }
}

fn all_runs() -> Result<Vec<RunPaths>, Failure> {
    let what = || format!("cannot look at the runs in {}", runs().display());
    let entries = match fs::read_dir(runs()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(what)?,
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    let ids = names.filter_map(|name| name.into_string().ok());
    let ids = ids.filter(|id| run::is_id(id));
    Ok(ids.map(|id| RunPaths::of(&id)).collect())
}

/// A terminal that shows another picture until this is dropped.
struct Screen;

impl Screen {
    fn open() -> Result<Self, Failure> {
        put(OTHER_SCREEN)?;
        Ok(Screen)
    }

    /// Line by line over what is there, so that nothing flickers.
    fn draw(&self, report: &Report) -> Result<(), Failure> {
        let size = rustix::termios::tcgetwinsize(io::stdout());
        let rows = size.map_or(0, |size| usize::from(size.ws_row));
        let rows = if rows == 0 { ROWS } else { rows };
        let text = report.fitted(rows - 1);
        let mut picture = String::from(HOME);
        // A terminal that is given more lines than it has scrolls its top away.
        for line in text.lines().take(rows - 1) {
            picture.push_str(line);
            picture.push_str(END_OF_LINE);
            picture.push_str("\r\n");
        }
        picture.push_str(END_OF_LINE);
        picture.push_str("Ctrl-C ends it");
        picture.push_str(END_OF_SCREEN);
        put(&picture)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = put(FIRST_SCREEN);
    }
}

fn put(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    let written = written.and_then(|()| stdout.flush());
    written.context(|| "cannot write to the terminal".to_owned())
}
