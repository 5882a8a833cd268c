//! Running the tools of filesystems: bounded in time and in what they say, never left behind.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use blockmount::BackendError;
use rustix::fs::{Access, access};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
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

/// How a tool ended, with its answer.
pub(crate) struct Answer {
    /// Nothing if a signal ended it.
    pub(crate) status: Option<i32>,
    /// What it said, for a program to read.
    pub(crate) out: Vec<u8>,
    /// What it complained about.
    pub(crate) complaint: String,
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
        let answer = self.answer(arguments, &[], LONGEST, timeout).await?;
        let out = as_line(&answer.out);
        let said = match answer.complaint.is_empty() {
            true => shortened(&out),
            false => answer.complaint,
        };
        Ok(Ended {
            status: answer.status,
            said,
            out: blockmount::printable(&out).to_string(),
        })
    }

    /// The same for a tool that is given some input, and whose answer is wanted as it is, up to so many bytes.
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run).
    ///
    /// # Cancel safety
    ///
    /// The tool is killed.
    pub(crate) async fn answer(
        &self,
        arguments: impl IntoIterator<Item = OsString>,
        input: &[u8],
        most: usize,
        timeout: Duration,
    ) -> Result<Answer, BackendError> {
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
        let mut child = self.start(arguments, !input.is_empty())?;
        let (out, error) = (child.stdout.take(), child.stderr.take());
        let given = give(child.stdin.take(), input);
        let all = async {
            let (out, error) = (first_of(out, most), first_of(error, LONGEST));
            tokio::join!(out, error, given, child.wait())
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((out, error, (), status)) = tokio::time::timeout(left, all).await else {
            // It is gone before anybody else is told that the device is free.
            let _ended_anyhow = child.kill().await;
            return Err(too_late());
        };
        let status =
            status.map_err(|error| errno_error(format!("cannot wait for {name}"), error))?;
        Ok(Answer {
            status: status.code(),
            out,
            complaint: shortened(&as_line(&error)),
        })
    }

    fn start(
        &self,
        arguments: impl IntoIterator<Item = OsString>,
        has_input: bool,
    ) -> Result<Child, BackendError> {
        let input = match has_input {
            true => Stdio::piped(),
            false => Stdio::null(),
        };
        Command::new(&self.path)
            .args(arguments)
            // What the machine has configured for its own filesystems does not decide about others.
            .env_clear()
            .env("MKE2FS_CONFIG", "/dev/null")
            .env("LC_ALL", "C")
            .env("PATH", DIRECTORIES.join(":"))
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| errno_error(format!("cannot start {}", self.path.display()), error))
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

/// Gives a tool its input. One that ends without reading it says why.
async fn give(pipe: Option<ChildStdin>, input: &[u8]) {
    if let Some(mut pipe) = pipe {
        let _it_says_why = pipe.write_all(input).await;
    }
}

/// The first bytes of what a pipe has. All of it is read, or the tool would wait for us.
async fn first_of(pipe: Option<impl AsyncRead + Unpin>, most: usize) -> Vec<u8> {
    // As large as it can become, so that no copy of it is left somewhere when it grows.
    let mut first = Vec::with_capacity(most.saturating_add(1));
    let Some(mut pipe) = pipe else {
        return first;
    };
    let read = (&mut pipe).take(most as u64).read_to_end(&mut first).await;
    if read.is_ok() {
        let _rest = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await;
    }
    first
}

/// A text as one line: some tools go on with a page of usage.
fn as_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines = lines.take_while(|line| !line.starts_with("Usage:"));
    lines.collect::<Vec<_>>().join("; ")
}

fn shortened(line: &str) -> String {
    let escaped = blockmount::printable(line).to_string();
    escaped.chars().take(LONGEST_COMPLAINT).collect()
}
