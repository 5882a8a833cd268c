//! Running the mkfs tools: bounded by a signal, never left behind.
#![allow(unsafe_code)] // One call between fork and exec, for which the standard library has only an unsafe hook.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::failure::{Context, Failure};
use crate::interrupt::Interrupt;

/// How much of a tool's complaint is worth repeating, in bytes.
const COMPLAINT: u64 = 2_000;

/// What the C library says of `ENOSPC`.
const NO_SPACE: &str = "No space left on device";

/// Finds a program by name: in `PATH`, and where administrators' tools are although `su` without a login
/// leaves them out.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .chain(system)
        .map(|directory| directory.join(program))
        .find(|candidate| rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Runs a program to its end. When a signal comes, the program is killed, and it is gone before
/// [`Interrupt::settled`] returns.
pub(crate) async fn run<A: AsRef<OsStr>>(
    interrupt: &Interrupt,
    program: &Path,
    arguments: impl IntoIterator<Item = A>,
) -> Result<(), Failure> {
    let mut command = Command::new(program);
    command.args(arguments);
    run_command(interrupt, program, command).await
}

/// The same for a program with its arguments and environment.
pub(crate) async fn run_command(
    interrupt: &Interrupt,
    program: &Path,
    mut command: Command,
) -> Result<(), Failure> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // A group of its own: a Ctrl-C at the terminal is for us, who end our children in order.
    command.process_group(0).kill_on_drop(true);
    // SAFETY: the closure only makes one system call, which is safe between fork and exec.
    unsafe {
        // If we are killed, the tool must not go on to write to what the clean-up removes. The signal is
        // bound to the thread that forks, a worker of the runtime: those live as long as we do.
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let name = program.display().to_string();
    let token = interrupt.token().clone();
    let signal = interrupt.clone();
    let work = async move {
        let mut child = command.spawn().context(|| format!("cannot start {name}"))?;
        let stderr = child.stderr.take().expect("stderr is a pipe, as asked for");
        let mut complaint = Vec::new();
        let wait = async {
            let mut stderr = stderr.take(COMPLAINT);
            let _ = stderr.read_to_end(&mut complaint).await;
            // What is beyond the limit is read too, or the tool would wait for us.
            let _ = tokio::io::copy(&mut stderr.into_inner(), &mut tokio::io::sink()).await;
            child.wait().await
        };
        let status = tokio::select! {
            status = wait => status.context(|| format!("cannot wait for {name}"))?,
            () = token.cancelled() => {
                let _ = child.kill().await;
                return Err(Failure::interrupted(signal.signal().unwrap_or("a signal")));
            }
        };
        if status.success() {
            return Ok(());
        }
        let complaint = String::from_utf8_lossy(&complaint);
        let lines = complaint.lines().map(str::trim);
        let complaint: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
        let failure = Failure::new(format!("{name} failed with {status}"));
        let failure = failure.because(complaint.join("; "));
        Err(match complaint.iter().any(|line| line.contains(NO_SPACE)) {
            true => failure.advise("free some space, most of all below /var/tmp"),
            false => failure,
        })
    };
    match interrupt.spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::new(format!("{} was lost", program.display())).because(error)),
    }
}
