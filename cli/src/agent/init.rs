//! The program as pid 1: the whole user space of a virtual machine that is there to mount disks.
//!
//! It sets the machine up, starts an agent, and from then on only buries and restarts its children. It
//! never ends: the kernel panics when pid 1 does.

mod modules;
mod setup;
mod supervisor;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use clap::Parser;

use crate::args::{Cli, Cmd};
use crate::failure::{Context, Failure};
use crate::terminal::say;
use supervisor::Supervisor;

/// The agent's arguments in the initramfs, one a line.
pub(crate) const ARGUMENTS: &str = "/etc/blockmount/agent.args";
/// The modules to load, one path a line, each after what it needs.
const MODULES: &str = "/etc/blockmount/modules";
/// A word of the kernel's command line that is an argument of the agent.
const WORD: &[u8] = b"blockmount.arg=";

/// Whether the kernel started this process as the first of the machine. A container's first process is
/// pid 1 too, but has another name.
pub(crate) fn is_asked_for() -> bool {
    std::process::id() == 1
        && std::env::args_os()
            .next()
            .is_none_or(|name| name == "/init")
}

/// Runs the machine. Where that is impossible, says why on the console and turns the machine off, so that its
/// host need not wait for it in vain.
pub(crate) fn run() -> ! {
    let Err(failure) = try_run();
    say(format_args!("blockmount init: {failure}"));
    setup::power_off()
}

fn try_run() -> Result<std::convert::Infallible, Failure> {
    setup::mount_all();
    setup::use_console();
    let arguments = arguments()?;
    let words = ["blockmount", "agent"].map(OsString::from);
    let cli = Cli::try_parse_from(words.into_iter().chain(arguments.iter().cloned()))
        .context(|| format!("the arguments in {ARGUMENTS} or blockmount.arg= make no sense"))?;
    crate::start_log(&cli)?;
    let Cmd::Agent(agent) = cli.command else {
        return Err(Failure::new("the arguments are not those of an agent"));
    };
    modules::load_all(Path::new(MODULES));
    let mut supervisor = Supervisor::default();
    if agent.witness {
        let roots = agent
            .roots
            .iter()
            .flat_map(|root| ["--root".into(), root.into()]);
        let witness = std::iter::once("witness".into()).chain(roots);
        supervisor.keep("witness", witness.collect());
    }
    // What is left are the arguments as they came: an agent started by hand behaves the same.
    let arguments = arguments.into_iter().filter(|word| word != "--witness");
    let agent = std::iter::once("agent".into()).chain(arguments);
    supervisor.keep("agent", agent.collect());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "cannot start the runtime".to_owned())?;
    runtime.block_on(supervisor.run())
}

/// The agent's arguments: those of the initramfs, then those of the kernel's command line.
fn arguments() -> Result<Vec<OsString>, Failure> {
    let read = |path: &str| match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.context(|| format!("cannot read {path}")),
    };
    let mut arguments = lines(&read(ARGUMENTS)?);
    arguments.extend(words(&read("/proc/cmdline")?));
    Ok(arguments)
}

/// The lines of a file; empty ones are left out, and those that begin with `#`.
fn lines(text: &[u8]) -> Vec<OsString> {
    text.split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .map(|line| OsString::from_vec(line.to_vec()))
        .collect()
}

/// The arguments among the words of a kernel's command line.
fn words(command_line: &[u8]) -> Vec<OsString> {
    command_line
        .split(u8::is_ascii_whitespace)
        .filter_map(|word| word.strip_prefix(WORD))
        .filter(|argument| !argument.is_empty())
        .map(|argument| OsString::from_vec(argument.to_vec()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_lines_and_words() {
        let file = b"--root\n/run/layers of mine\n\n# why\n  --witness \n";
        assert_eq!(lines(file), ["--root", "/run/layers of mine", "--witness"]);
        let line = b"quiet blockmount.arg=--vsock console=ttyS0\tblockmount.arg=7 blockmount.arg= blockmount.args=x\n";
        assert_eq!(words(line), ["--vsock", "7"]);
        assert!(lines(b"").is_empty() && words(b"\n").is_empty());
    }

    #[test]
    fn a_process_of_a_test_is_not_the_first() {
        assert!(!is_asked_for());
    }
}
