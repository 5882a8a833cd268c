//! The program as pid 1: the whole user space of a virtual machine that is there to mount disks.
//!
//! It sets the machine up, starts an agent and the other programs of the image, and from then on only reaps and restarts
//! its children. It never ends: the kernel panics when pid 1 does.

mod modules;
mod setup;
mod supervisor;
mod words;

use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::path::Path;

use crate::AgentError;
use crate::args::Asked;
use crate::error::{Context, one_line};
use crate::log::say;
use supervisor::Supervisor;
use words::{lines, words};

/// The agent's arguments in the initramfs, one a line.
pub const ARGUMENTS: &str = "/etc/blockmount/agent.args";
/// The programs that run beside the agent, a file for each: its path in the first line, an argument in each of the others.
pub const PROGRAMS: &str = "/etc/blockmount/programs";
/// The modules to load, one path a line, each after what it needs.
const MODULES: &str = "/etc/blockmount/modules";

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
///
/// `own` are the words of an agent's command line after its name and before its arguments, which `parse` understands.
pub(crate) fn run(
    own: Vec<&'static str>,
    parse: impl FnOnce(Vec<OsString>) -> Result<Asked, AgentError>,
) -> ! {
    let Err(error) = try_run(own, parse);
    say(format_args!("blockmount init: {}", one_line(&error)));
    setup::power_off()
}

fn try_run(
    own: Vec<&'static str>,
    parse: impl FnOnce(Vec<OsString>) -> Result<Asked, AgentError>,
) -> Result<Infallible, AgentError> {
    setup::mount_all();
    setup::use_console();
    let arguments = arguments()?;
    let asked = parse(arguments.clone())
        .context(|| format!("the arguments in {ARGUMENTS} or blockmount.arg= make no sense"))?;
    let Asked::Serve(options) = asked else {
        return Err(AgentError::new("the arguments are not those of an agent"));
    };
    options.start_log()?;
    modules::load_all(Path::new(MODULES));
    let mut supervisor = Supervisor::default();
    for (name, words) in programs(Path::new(PROGRAMS))? {
        supervisor.keep(name, words);
    }
    // A whole machine may have been restored from a saved state.
    let arguments = std::iter::once("--set-clock".into()).chain(arguments);
    let words = std::iter::once("/proc/self/exe".into())
        .chain(own.into_iter().map(OsString::from))
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

#[cfg(test)]
mod tests {
    use super::*;

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
