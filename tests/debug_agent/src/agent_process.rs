//! Which process the agent is.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal};

use blockmount_checker::Context;

/// How long a killed agent may take to end: its mounts under way come to their end first.
const ENDS: Duration = Duration::from_secs(20);

/// The process of this program that has the same parent as this one, if there is any.
pub(super) fn find(program: &Path) -> io::Result<Option<u32>> {
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get());
    let entries = fs::read_dir("/proc").context(|| "cannot read /proc".to_owned())?;
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids
        .filter(|pid| *pid != std::process::id())
        .find(|pid| is_agent(*pid, parent, program)))
}

/// Whether a process runs this program and has this parent. One that has ended does not.
fn is_agent(pid: u32, parent: Option<i32>, program: &Path) -> bool {
    let is_agent = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
    let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    is_agent && parent_in(&String::from_utf8_lossy(&stat)) == parent
}

/// The fourth field of `/proc/PID/stat`; the second is a name in brackets that may have anything in it.
fn parent_in(stat: &str) -> Option<i32> {
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(1)?.parse().ok()
}

/// Kills the agent, and waits until it has ended.
pub(super) async fn kill(program: &Path) -> io::Result<u32> {
    let Some(number) = find(program)? else {
        return Err(io::Error::other("there is no agent to kill"));
    };
    let what = || format!("cannot kill the agent, process {number}");
    let pid = Pid::from_raw(number.cast_signed()).ok_or_else(|| io::Error::other(what()))?;
    let process = pidfd_open(pid, PidfdFlags::NONBLOCK).context(what)?;
    // The descriptor means the process that was found: its number was not given to another one meanwhile.
    if find(program)? != Some(number) {
        return Err(io::Error::other(format!("{}: it has just ended", what())));
    }
    pidfd_send_signal(&process, Signal::KILL).context(what)?;
    let ended = tokio::task::spawn_blocking(move || {
        let mut fds = [rustix::event::PollFd::new(
            &process,
            rustix::event::PollFlags::IN,
        )];
        let limit = rustix::event::Timespec::try_from(ENDS).expect("20 seconds are not too many");
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&limit)))
    });
    match ended.await.context(what)?.context(what)? {
        0 => Err(io::Error::other(format!(
            "{}: it did not end within {ENDS:?}",
            what()
        ))),
        _ => Ok(number),
    }
}

/// Whether the agent is pid 1, and the machine therefore its own.
pub(super) fn is_our_machine(program: &Path) -> io::Result<()> {
    let first = fs::read_link("/proc/1/exe").context(|| "cannot look at pid 1".to_owned())?;
    match first == program {
        true => Ok(()),
        false => Err(io::Error::other(
            "this machine is not turned off for its host: its pid 1 is another program",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_found_behind_any_name() {
        assert_eq!(parent_in("7 (a) b) 3 (c) S 42 7 7 0"), Some(42));
        assert_eq!(parent_in("7 (a) S 1"), Some(1));
        for text in ["", "7 (a", "7 (a)", "7 (a) S", "7 (a) S x"] {
            assert_eq!(parent_in(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_test_has_no_agent() {
        assert_eq!(find(Path::new("/init")).unwrap(), None);
        let parent = getppid().map(|pid| pid.as_raw_nonzero().get());
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert_eq!(parent_in(&stat), parent);
    }
}
