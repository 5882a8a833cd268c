//! The log of programs of this kind, on stderr.

use std::fmt;
use std::io::{self, Write as _};

use blockmount::printable;
use tracing::field::Field;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{FormatFields, Writer, debug_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, Registry};

use crate::AgentError;

/// What is logged.
#[derive(Debug, Clone, PartialEq)]
pub struct LogFilter(Targets);

impl LogFilter {
    /// Reads a filter: levels, alone or for a part of the program, such as `info` or
    /// `blockmount_agent=debug,blockmount_linux=trace`.
    ///
    /// # Errors
    ///
    /// Names the word that is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let level = |word: &str| {
            let known = !word.is_empty();
            let parsed = known.then(|| word.parse::<LevelFilter>().ok()).flatten();
            parsed.ok_or_else(|| {
                format!(
                    "there is no level {word:?}; the levels are off, error, warn, info, debug and trace, alone or as TARGET=LEVEL"
                )
            })
        };
        let mut targets = Targets::new();
        for directive in text.split(',').map(str::trim) {
            targets = match directive.rsplit_once('=') {
                None => targets.with_default(level(directive)?),
                Some((target, word)) if is_target(target) => {
                    targets.with_target(target, level(word)?)
                }
                Some((target, _)) => return Err(format!("{target:?} is no part of a program")),
            };
        }
        Ok(LogFilter(targets))
    }

    /// What `-v` that often means: only what goes wrong, then the steps, then their details, then everything.
    pub fn verbose(times: u8) -> Self {
        let level = match times {
            0 => LevelFilter::ERROR,
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        };
        LogFilter(Targets::new().with_default(level))
    }
}

/// The path of a module of Rust.
fn is_target(target: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':' | b'-');
    !target.is_empty() && target.bytes().all(is_part)
}

/// Starts logging to stderr. Control characters in what is logged, which images and guests may have brought in, are
/// escaped. A log that cannot be written is no reason to stop while devices are mounted.
///
/// # Errors
///
/// If the process has a log already.
pub fn start_log(filter: LogFilter, is_colourful: bool) -> Result<(), AgentError> {
    let lines = tracing_subscriber::fmt::layer()
        .fmt_fields(fields())
        .with_writer(io::stderr)
        .with_ansi(is_colourful)
        .log_internal_errors(false);
    begin(lines, filter)
}

/// The same with an object of JSON in each line, for a log that programs read.
///
/// # Errors
///
/// If the process has a log already.
#[cfg(feature = "json")]
pub fn start_json_log(filter: LogFilter) -> Result<(), AgentError> {
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .with_writer(io::stderr)
        .log_internal_errors(false);
    begin(lines, filter)
}

fn begin<L>(lines: L, filter: LogFilter) -> Result<(), AgentError>
where
    L: Layer<Registry> + Send + Sync,
{
    let log = tracing_subscriber::registry().with(lines).with(filter.0);
    log.try_init()
        .map_err(|_| AgentError::new("this process has a log already"))
}

/// How the fields of events and of spans are written.
fn fields() -> impl for<'writer> FormatFields<'writer> + 'static {
    let write = |writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug| match field.name()
    {
        "message" => write!(writer, "{}", printable(format_args!("{value:?}"))),
        // What the `log` crate adds is in the line already.
        name if name.starts_with("log.") => Ok(()),
        name => write!(writer, "{name}={}", printable(format_args!("{value:?}"))),
    };
    debug_fn(write).delimited(" ")
}

/// Says a line on stderr, which may be closed.
pub(crate) fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn words_that_are_no_levels_are_refused_by_name() {
        for (text, word) in [
            ("debgu", "\"debgu\""),
            ("blockmount", "\"blockmount\""),
            ("blockmount=debgu", "\"debgu\""),
            ("a=b=debug", "\"a=b\""),
            ("", "\"\""),
            ("info,", "\"\""),
            ("=info", "\"\""),
        ] {
            let error = LogFilter::parse(text).unwrap_err();
            assert!(error.contains(word), "{text:?}: {error}");
        }
        let known = "the levels are off, error, warn, info, debug and trace";
        assert!(LogFilter::parse("debgu").unwrap_err().contains(known));
        for text in [
            "info",
            "WARN",
            "off",
            "blockmount::machine=info, error",
            "blockmount_linux=trace",
        ] {
            LogFilter::parse(text).unwrap();
        }
    }

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn x13_no_field_of_an_event_or_of_a_span_forges_a_line() {
        for is_colourful in [false, true] {
            let kept = Kept::default();
            let writer = kept.clone();
            let lines = tracing_subscriber::fmt::layer()
                .fmt_fields(fields())
                .with_ansi(is_colourful)
                .with_writer(move || writer.clone());
            let log = tracing_subscriber::registry().with(lines);
            tracing::subscriber::with_default(log, || {
                let evil = "a\n1970 ERROR forged\u{1b}[2J";
                let span = tracing::error_span!("attach", disk = %evil);
                span.in_scope(|| tracing::error!(error = %evil, number = 7, "said {evil}"));
            });
            let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), 1, "{text}");
            assert!(
                text.contains("disk=a\\n1970") && text.contains("number=7"),
                "{text}"
            );
            assert!(!text.contains("\u{1b}[2J"), "{text:?}");
        }
    }
}
