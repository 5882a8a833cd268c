//! The command line as a whole: read, completed by shells, and described in manual pages.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;

use clap::{ColorChoice, Command, CommandFactory as _, FromArgMatches as _};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args::Cli;
use crate::failure::{Context, Failure};
use crate::terminal::print_bytes;

/// What the command line asks for. Help, and what makes no sense, end the program.
pub(crate) fn read() -> Cli {
    let command = command().color(colours_of_help(std::env::args_os()));
    let read = Cli::from_arg_matches(&command.get_matches());
    read.unwrap_or_else(|error| error.format(&mut self::command()).exit())
}

fn command() -> Command {
    Cli::command()
}

/// Colours of help and of complaints, which are printed before `--color` has been read.
fn colours_of_help(words: impl Iterator<Item = impl AsRef<OsStr>>) -> ColorChoice {
    let mut choice = ColorChoice::Auto;
    let mut is_next = false;
    for word in words.map(|word| word.as_ref().to_owned()) {
        let value = match word.to_str().and_then(|word| word.strip_prefix("--color=")) {
            Some(value) => Some(value.to_owned()),
            None if is_next => word.to_str().map(str::to_owned),
            None => None,
        };
        choice = match value.as_deref() {
            Some("always") => ColorChoice::Always,
            Some("never") => ColorChoice::Never,
            _ => choice,
        };
        is_next = word == "--color";
    }
    choice
}

/// Prints the script for a shell. `Ok` is the exit status.
pub(crate) fn completions(shell: Shell) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "blockmount", &mut script);
    print_bytes(&script)?;
    Ok(0)
}

/// Prints the manual page, or writes those of all commands into a directory. `Ok` is the exit status.
pub(crate) fn man(to: Option<&Path>) -> Result<u8, Failure> {
    let mut command = command().color(ColorChoice::Never);
    command.build();
    let Some(directory) = to else {
        print_bytes(&page(command).context(|| "cannot make the manual page".to_owned())?)?;
        return Ok(0);
    };
    let visible = command
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    // Its help is no page of its own.
    let named = visible.filter(|command| command.get_name() != "help");
    let below: Vec<Command> = named.cloned().collect();
    for command in std::iter::once(command).chain(below) {
        let name = command
            .get_display_name()
            .unwrap_or(command.get_name())
            .to_owned();
        let path = directory.join(format!("{name}.1"));
        let written = page(command).and_then(|page| fs::write(&path, page));
        written.context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(0)
}

fn page(command: Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_colours_of_help_are_asked_for_anywhere() {
        for (words, expected) in [
            (&["blockmount", "--help"][..], ColorChoice::Auto),
            (
                &["blockmount", "--color", "never", "--help"],
                ColorChoice::Never,
            ),
            (
                &["blockmount", "mount", "--color=always"],
                ColorChoice::Always,
            ),
            (&["blockmount", "--color=blue"], ColorChoice::Auto),
        ] {
            assert_eq!(colours_of_help(words.iter()), expected, "{words:?}");
        }
    }
}
