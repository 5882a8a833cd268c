//! Which process the agent is.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal};

use crate::failure::{Context, Failure};

/// How long a killed agent may take to end: its mounts under way come to their end first.
const ENDS: Duration = Duration::from_secs(20);

/// The agent that has the same parent as this process, if there is one.
pub(super) fn find() -> Result<Option<u32>, Failure> {
    let ours = own_program()?;
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get());
    let entries = fs::read_dir("/proc").context(|| "cannot read /proc".to_owned())?;
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids
        .filter(|pid| *pid != std::process::id())
        .find(|pid| is_agent(*pid, parent, &ours)))
}

/// Whether a process is an agent of this program with this parent. One that has ended is not.
fn is_agent(pid: u32, parent: Option<i32>, ours: &PathBuf) -> bool {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let is_ours = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == *ours);
    let arguments = read("cmdline");
    let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
    is_ours
        && arguments.any(|argument| argument == b"agent")
        && parent_in(&String::from_utf8_lossy(&read("stat"))) == parent
}

/// The fourth field of `/proc/PID/stat`; the second is a name in brackets that may have anything in it.
fn parent_in(stat: &str) -> Option<i32> {
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(1)?.parse().ok()
}

/// Kills the agent, and waits until it has ended.
pub(super) async fn kill() -> Result<Option<u32>, Failure> {
    let Some(number) = find()? else {
        return Err(Failure::new("there is no agent to kill"));
    };
    let what = || format!("cannot kill the agent, process {number}");
    let pid = Pid::from_raw(number.cast_signed()).ok_or_else(|| Failure::new(what()))?;
    let process = pidfd_open(pid, PidfdFlags::NONBLOCK).context(what)?;
    // The descriptor means the process that was found: nobody has taken its number meanwhile.
    if find()? != Some(number) {
        return Err(Failure::new(what()).because("it has just ended".to_owned()));
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
        0 => Err(Failure::new(what()).because(format!("it did not end within {ENDS:?}"))),
        _ => Ok(Some(number)),
    }
}

/// Whether this program is pid 1, and the machine therefore its own.
pub(super) fn is_our_machine() -> Result<(), Failure> {
    let first = fs::read_link("/proc/1/exe").context(|| "cannot look at pid 1".to_owned())?;
    match first == own_program()? {
        true => Ok(()),
        false => Err(Failure::new(
            "this machine is not turned off for its host: its pid 1 is another program",
        )),
    }
}

fn own_program() -> Result<PathBuf, Failure> {
    fs::read_link("/proc/self/exe").context(|| "cannot find this program".to_owned())
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
        assert_eq!(find().unwrap(), None);
        let parent = getppid().map(|pid| pid.as_raw_nonzero().get());
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert_eq!(parent_in(&stat), parent);
    }
}
