//! Talking to the user, on streams that may be closed at any moment.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::{Context, Failure};

/// Says a line on stderr. A stream that is gone is no reason to stop: what is held must be released
/// all the same, so that `eprintln!`, which panics, will not do.
pub(crate) fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Prints a result on stdout.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
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
        let target = match io::stderr().is_terminal() {
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
        self.0.suspend(|| say(format_args!("{line}")));
    }

    /// Takes the moving line away.
    pub(crate) fn done(&self) {
        self.0.finish_and_clear();
    }
}
