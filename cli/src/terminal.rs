//! Talking to the user, on streams that may be closed at any moment.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::{Context, Failure};

/// How this program talks, which is settled before it says the first word.
#[derive(Debug, Clone, Copy)]
struct Manner {
    is_colourful: bool,
    is_quiet: bool,
}

static MANNER: OnceLock<Manner> = OnceLock::new();

/// When there are colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Colour {
    Auto,
    Always,
    Never,
}

/// Settles how the program talks.
pub(crate) fn start(colour: Colour, is_quiet: bool) {
    let is_colourful = match colour {
        Colour::Always => true,
        Colour::Never => false,
        // The console of a guest ends up in a file.
        Colour::Auto => {
            let declined = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            io::stderr().is_terminal() && !declined && std::process::id() != 1
        }
    };
    // It is settled once; a second time would be the same.
    let _ = MANNER.set(Manner {
        is_colourful,
        is_quiet,
    });
}

/// Whether what is said on stderr has colours.
pub(crate) fn is_colourful() -> bool {
    MANNER.get().is_some_and(|manner| manner.is_colourful)
}

fn is_quiet() -> bool {
    MANNER.get().is_some_and(|manner| manner.is_quiet)
}

/// Says a line on stderr that nobody has to act on; not if the user wants it quiet.
pub(crate) fn note(line: fmt::Arguments<'_>) {
    if !is_quiet() {
        say(line);
    }
}

/// Says what went wrong.
pub(crate) fn complain(failure: &Failure) {
    let text = failure.to_string();
    if !is_colourful() {
        return say(format_args!("{text}"));
    }
    // The words that begin the lines, in the colours that help has.
    for line in text.lines() {
        match line.split_once(": ") {
            Some(("error", rest)) => say(format_args!("\u{1b}[1;31merror:\u{1b}[0m {rest}")),
            Some(("advice", rest)) => say(format_args!("\u{1b}[1;32madvice:\u{1b}[0m {rest}")),
            _ => say(format_args!("{line}")),
        }
    }
}

/// Says a line on stderr. A stream that is gone is no reason to stop: what is held must be released
/// all the same, so that `eprintln!`, which panics, will not do.
pub(crate) fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// The columns that text is written for.
const COLUMNS: usize = 80;

/// A line as several that fit, the further ones after an indent. What has no space in it, such as a path, is not broken, and
/// neither is a command of this program, with which the line ends.
pub(crate) fn wrapped(line: &str, indent: &str) -> String {
    let command = line.rfind("blockmount ").unwrap_or(line.len());
    let (words, command) = line.split_at(command);
    let mut text = String::new();
    let (mut column, mut is_start) = (0, true);
    for part in words.split_inclusive(' ').chain([command]) {
        let width = part.trim_end().chars().count();
        if !is_start && width > 0 && column + width > COLUMNS {
            text.truncate(text.trim_end().len());
            text += "\n";
            text += indent;
            column = indent.len();
        }
        is_start &= width == 0;
        text += part;
        column += part.chars().count();
    }
    text
}

/// Prints a result on stdout.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .context(|| "cannot write the result to stdout".to_owned())
}

/// Prints what was made on stdout, as it is.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .context(|| "cannot write the result to stdout".to_owned())
}

/// Prints a result on stdout as JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .context(|| "cannot write the result as json".to_owned())?;
    print(&text)
}

/// Shows how far long work has come, on stderr and only on a terminal.
#[derive(Clone, Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new() -> Self {
        let target = match io::stderr().is_terminal() && !is_quiet() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template("{spinner} {msg} {human_pos}");
        bar.set_style(style.expect("the template is a constant, and right"));
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Progress(bar)
    }

    /// Begins a stage.
    pub(crate) fn stage(&self, what: impl Into<String>) {
        let what = what.into();
        tracing::info!("{what}");
        self.0.reset();
        self.0.set_message(what);
    }

    /// Counts one piece of the stage.
    pub(crate) fn step(&self) {
        self.0.inc(1);
    }

    /// Says a line that stays, above what moves.
    pub(crate) fn note(&self, line: &str) {
        self.0.suspend(|| note(format_args!("{line}")));
    }

    /// Takes the moving line away.
    pub(crate) fn done(&self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_wrapped_at_words_and_long_words_stay_whole() {
        assert_eq!(wrapped("  a   b", "    "), "  a   b");
        let words = "word ".repeat(20);
        let text = wrapped(&words, "    ");
        assert!(text.lines().all(|line| line.len() <= COLUMNS), "{text}");
        assert_eq!(text.split_whitespace().count(), 20);
        assert!(text.lines().nth(1).unwrap().starts_with("    word"));
        let command = "blockmount cleanup --resumable";
        let text = wrapped(
            &format!("{}to discard it: {command}", "word ".repeat(12)),
            "  ",
        );
        assert!(text.ends_with(command), "{text}");
        let long = "x".repeat(100);
        assert_eq!(
            wrapped(&format!("a {long} b"), "  "),
            format!("a\n  {long}\n  b")
        );
    }
}
