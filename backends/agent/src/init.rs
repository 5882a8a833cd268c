//! The program as pid 1: the whole user space of a virtual machine that is there to mount disks.
//!
//! It sets the machine up, starts an agent and the other programs of the image, and from then on only reaps and restarts
//! its children. It never ends: the kernel panics when pid 1 does.

mod modules;
mod setup;
mod supervisor;

use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use crate::AgentError;
use crate::args::Asked;
use crate::error::{Context, one_line};
use crate::program::{Program, log_as_asked, say};
use supervisor::Supervisor;

/// The agent's arguments in the initramfs, one a line.
pub const ARGUMENTS: &str = "/etc/blockmount/agent.args";
/// The programs that run beside the agent, a file for each: its path in the first line, an argument in each of the others.
pub const PROGRAMS: &str = "/etc/blockmount/programs";
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
pub(crate) fn run(program: Program) -> ! {
    let Err(error) = try_run(program);
    say(format_args!("blockmount init: {}", one_line(&error)));
    setup::power_off()
}

fn try_run(mut program: Program) -> Result<Infallible, AgentError> {
    setup::mount_all();
    setup::use_console();
    let arguments = arguments()?;
    let asked = program
        .parse(arguments.iter().cloned())
        .context(|| format!("the arguments in {ARGUMENTS} or blockmount.arg= make no sense"))?;
    let Asked::Serve(options) = asked else {
        return Err(AgentError::new("the arguments are not those of an agent"));
    };
    log_as_asked(&options)?;
    modules::load_all(Path::new(MODULES));
    let mut supervisor = Supervisor::default();
    for (name, words) in programs(Path::new(PROGRAMS))? {
        supervisor.keep(name, words);
    }
    // A whole machine may have been restored from a saved state.
    let arguments = std::iter::once("--set-clock".into()).chain(arguments);
    // An agent that is started by hand with these arguments behaves the same.
    let own = program.command().iter().skip(1).map(OsString::from);
    let words = std::iter::once("/proc/self/exe".into())
        .chain(own)
        .chain(arguments);
    supervisor.keep("agent".to_owned(), words.collect());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "cannot start the runtime".to_owned())?;
    runtime.block_on(supervisor.run())
}

/// The agent's arguments: those of the initramfs, then those of the kernel's command line.
fn arguments() -> Result<Vec<OsString>, AgentError> {
    let read = |path: &str| match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.context(|| format!("cannot read {path}")),
    };
    let mut arguments = lines(&read(ARGUMENTS)?);
    arguments.extend(words(&read("/proc/cmdline")?));
    Ok(arguments)
}

/// The programs that a directory lists, each with its arguments, sorted by their names.
fn programs(directory: &Path) -> Result<Vec<(String, Vec<OsString>)>, AgentError> {
    let what = || format!("cannot read the programs in {}", directory.display());
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(what)?,
    };
    let mut programs = Vec::new();
    for entry in entries {
        let path = entry.context(what)?.path();
        let words = lines(&std::fs::read(&path).context(what)?);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if words.is_empty() {
            return Err(AgentError::new(format!(
                "{} names no program",
                path.display()
            )));
        }
        programs.push((name.into_owned(), words));
    }
    programs.sort();
    Ok(programs)
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
        let file = b"--root\n/run/layers of mine\n\n# why\n  --serial \n";
        assert_eq!(lines(file), ["--root", "/run/layers of mine", "--serial"]);
        let line = b"quiet blockmount.arg=--vsock console=ttyS0\tblockmount.arg=7 blockmount.arg= blockmount.args=x\n";
        assert_eq!(words(line), ["--vsock", "7"]);
        assert!(lines(b"").is_empty() && words(b"\n").is_empty());
    }

    #[test]
    fn programs_are_files_with_a_path_and_arguments() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("b"), "/bin/b\n--name\nwith space\n").unwrap();
        std::fs::write(dir.path().join("a"), "/bin/a\n").unwrap();
        let found = programs(dir.path()).unwrap();
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let expected = [
            ("a".to_owned(), words(&["/bin/a"])),
            ("b".to_owned(), words(&["/bin/b", "--name", "with space"])),
        ];
        assert_eq!(found, expected);
        std::fs::write(dir.path().join("c"), "# nothing\n").unwrap();
        assert!(programs(dir.path()).is_err());
        assert!(programs(&dir.path().join("absent")).unwrap().is_empty());
    }

    #[test]
    fn a_process_of_a_test_is_not_the_first() {
        assert!(!is_asked_for());
    }
}
