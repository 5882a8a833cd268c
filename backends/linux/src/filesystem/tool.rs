//! Running the tools of filesystems: bounded in time and in what they say, never left behind.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use blockmount::BackendError;
use rustix::fs::{Access, access};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::sync::Semaphore;

use crate::errno::errno_error;

/// Where tools are. An agent that is pid 1 has no `PATH`, and one that is not need not trust its own; the last is where
/// guests that are only an agent have further programs.
const DIRECTORIES: [&str; 7] = [
    "/usr/local/sbin",
    "/usr/sbin",
    "/sbin",
    "/usr/local/bin",
    "/usr/bin",
    "/bin",
    "/programs",
];
/// As many tools write to devices at once. More would only wait for each other's writes.
const MOST_AT_ONCE: usize = 4;
/// How much of what a tool says is kept, in bytes, and how much of it an error repeats, in characters.
const LONGEST: usize = 4 << 10;
const LONGEST_COMPLAINT: usize = 400;

static RUNNING: Semaphore = Semaphore::const_new(MOST_AT_ONCE);

/// A program that is installed here.
#[derive(Debug)]
pub(crate) struct Tool {
    path: PathBuf,
    name: &'static str,
}

/// How a tool ended, with the first of what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Nothing if a signal ended it.
    pub(crate) status: Option<i32>,
    /// What it complained about, or what it said if it did not complain.
    pub(crate) said: String,
    /// What it said, whether it complained or not.
    pub(crate) out: String,
}

impl Tool {
    /// Finds a tool by name.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if it is not installed, with the package that has it.
    pub(crate) fn find(name: &'static str, package: &str) -> Result<Self, BackendError> {
        let mut candidates = DIRECTORIES.iter().map(|at| Path::new(at).join(name));
        let found = candidates.find(|path| access(path, Access::EXEC_OK).is_ok());
        found.map(|path| Tool { path, name }).ok_or_else(|| {
            BackendError::unsuitable(format!(
                "there is no {name} in this guest: install the package {package}, or add the program to the guest's image"
            ))
        })
    }

    /// Runs the tool to its end, at most until a deadline, after which it is killed. Waiting until few enough other tools
    /// run counts.
    ///
    /// # Errors
    ///
    /// `Other` if it did not end in time.
    ///
    /// # Cancel safety
    ///
    /// The tool is killed.
    pub(crate) async fn run(
        &self,
        arguments: impl IntoIterator<Item = OsString>,
        timeout: Duration,
    ) -> Result<Ended, BackendError> {
        let name = self.name;
        let deadline = Instant::now() + timeout;
        let too_late = || {
            let seconds = timeout.as_secs_f64();
            BackendError::other(format!(
                "{name} did not end in {seconds} seconds, and was killed"
            ))
        };
        let permit = tokio::time::timeout(timeout, RUNNING.acquire()).await;
        let _running = permit
            .map_err(|_| too_late())?
            .expect("the semaphore is never closed");
        let mut child = Command::new(&self.path)
            .args(arguments)
            // What the machine has configured for its own filesystems does not decide about others.
            .env_clear()
            .env("MKE2FS_CONFIG", "/dev/null")
            .env("LC_ALL", "C")
            .env("PATH", DIRECTORIES.join(":"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| errno_error(format!("cannot start {}", self.path.display()), error))?;
        let (out, error) = (child.stdout.take(), child.stderr.take());
        let both = async { tokio::join!(first_of(out), first_of(error), child.wait()) };
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((out, error, status)) = tokio::time::timeout(left, both).await else {
            // It is gone before anybody else is told that the device is free.
            let _ended_anyhow = child.kill().await;
            return Err(too_late());
        };
        let status =
            status.map_err(|error| errno_error(format!("cannot wait for {name}"), error))?;
        let escaped = |text: &str| blockmount::printable(text).to_string();
        let complaint = if error.is_empty() { &out } else { &error };
        let said = escaped(complaint).chars().take(LONGEST_COMPLAINT).collect();
        let out = escaped(&out);
        Ok(Ended {
            status: status.code(),
            said,
            out,
        })
    }

    /// The error of a tool that has failed, in its own words.
    pub(crate) fn failed(&self, ended: &Ended) -> BackendError {
        let how = match ended.status {
            Some(status) => format!("with status {status}"),
            None => "by a signal".to_owned(),
        };
        let said = match ended.said.is_empty() {
            true => String::new(),
            false => format!(": {}", ended.said),
        };
        BackendError::other(format!("{} failed {how}{said}", self.name))
    }
}

/// The first of what a pipe has, as one line: some tools go on with a page of usage. All of it is read, or the tool would
/// wait for us.
async fn first_of(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut pipe) = pipe else {
        return String::new();
    };
    let mut first = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        let room = LONGEST.saturating_sub(first.len());
        first.extend_from_slice(&buffer[..length.min(room)]);
    }
    let text = String::from_utf8_lossy(&first);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines = lines.take_while(|line| !line.starts_with("Usage:"));
    lines.collect::<Vec<_>>().join("; ")
}
