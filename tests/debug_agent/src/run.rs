//! A program that is run in a root, and what it says until its end.
#![allow(
    unsafe_code,
    reason = "a root is entered between fork and exec, for which the standard library has only an unsafe hook"
)]

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use blockmount_checker::Context;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, chroot, fchdir, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;

/// So many bytes of each of stdout and stderr are told.
const MOST: u64 = 64 << 10;
/// How long a killed program may take to end.
const ENDS: Duration = Duration::from_secs(20);

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The directory that it has as its root and works in.
    pub root: PathBuf,
    /// The program, by its path in that root or its name in `/bin` there, and its arguments.
    pub words: Vec<String>,
    /// How long it may take, in seconds. Then it is killed, and what it has started with it.
    pub deadline: u32,
}

/// How a program has ended. Text that is not UTF-8 is approximated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Its exit status; none after a signal.
    pub status: Option<i32>,
    /// The signal that it has ended by.
    pub signal: Option<i32>,
    /// The first 64 KiB of what it has said.
    pub stdout: String,
    /// The same on the other stream.
    pub stderr: String,
    /// How many bytes of both are left out.
    pub left_out: u64,
}

impl Run {
    /// Runs it until it has ended and closed its output.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or was killed at the deadline.
    ///
    /// # Cancel safety
    ///
    /// It is killed, and what it has started with it.
    pub async fn run(self) -> io::Result<Ended> {
        let Some((program, arguments)) = self.words.split_first() else {
            return Err(io::Error::other("there is no program to run"));
        };
        let what = format!("{program} in {}", self.root.display());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.root, flags, Mode::empty())
            .context(|| format!("cannot run {what}: there is no such root"))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", "/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let enter = move || {
            fchdir(&root)?;
            Ok(chroot(c".")?)
        };
        // SAFETY: between fork and exec it makes two system calls, and neither allocates nor locks.
        unsafe { command.pre_exec(enter) };
        let mut child = command.spawn().context(|| format!("cannot run {what}"))?;
        let mut group = Group(child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())));
        let (mut stdout, mut stderr) = (Said::default(), Said::default());
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let ending = async {
            tokio::try_join!(stdout.read(out), stderr.read(err))?;
            child.wait().await
        };
        let limit = Duration::from_secs(self.deadline.into());
        let Ok(ended) = timeout(limit, ending).await else {
            // It was not waited for, so that its number is its own still.
            drop(group);
            let gone = timeout(ENDS, child.wait()).await.is_ok();
            let fate = if gone {
                "was killed"
            } else {
                "cannot be killed"
            };
            let (stdout, stderr) = (stdout.text(), stderr.text());
            return Err(io::Error::other(format!(
                "{what} did not end within {limit:?} and {fate}; it has said {stdout:?} and {stderr:?}"
            )));
        };
        let ended = ended.context(|| format!("cannot wait for {what}"))?;
        group.0 = None;
        Ok(Ended {
            status: ended.code(),
            signal: ended.signal(),
            left_out: stdout.left_out + stderr.left_out,
            stdout: stdout.text(),
            stderr: stderr.text(),
        })
    }
}

/// A program and what it has started, which are killed with the value.
#[derive(Debug)]
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // All of them may have ended.
            let _killed = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// What was read of a stream.
#[derive(Debug, Default)]
struct Said {
    first: Vec<u8>,
    left_out: u64,
}

impl Said {
    /// Reads to the end, whatever is kept of it: who writes must not wait for ever.
    async fn read(&mut self, stream: Option<impl AsyncRead + Unpin>) -> io::Result<()> {
        let Some(mut stream) = stream else {
            return Ok(());
        };
        let mut start = (&mut stream).take(MOST);
        start.read_to_end(&mut self.first).await?;
        self.left_out = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
        Ok(())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.first).into_owned()
    }
}
