//! The process of a VM: started, watched, and ended whatever happens to us.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use super::error::VmError;
use super::spawn::spawn;

/// How much of what is printed is kept, in bytes: enough for the last words of a kernel.
const KEPT: usize = 16 << 10;

/// Which process it is, also after its number was given to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Started {
    pub(super) pid: i32,
    /// When, in ticks since the boot.
    pub(super) at: u64,
}

/// A process. Dropping it kills it, and the kernel does so if we are killed, unless it is detached.
#[derive(Debug)]
pub(super) struct Process {
    pidfd: OwnedFd,
    pid: Pid,
    /// Whether it lives on when this is dropped.
    outlives: AtomicBool,
    /// How it ended, once it has.
    ended: watch::Receiver<Option<String>>,
    /// The standard output, where the guest's console is.
    pub(super) console: Tail,
    /// The standard error, where QEMU says what it does not like.
    pub(super) complaints: Tail,
}

impl Process {
    /// Starts a process that inherits descriptors. Its standard input is empty. A detached one prints to files in a directory.
    pub(super) async fn start(
        mut command: Command,
        inherited: Vec<OwnedFd>,
        detached: Option<&Path>,
    ) -> io::Result<Self> {
        let output = |name: &str| {
            let file = detached.map(|directory| File::create(directory.join(name)));
            file.map_or(Ok(Stdio::piped()), |file| file.map(Stdio::from))
        };
        command
            .stdin(Stdio::null())
            .stdout(output(CONSOLE)?)
            .stderr(output(COMPLAINTS)?);
        let is_detached = detached.is_some();
        let (started, start) = oneshot::channel();
        let (ending, ended) = watch::channel(None);
        // A thread of its own, which lives exactly as long as the process: the kernel kills the process when
        // the thread that has started it ends, and the runtime ends threads of its own when it likes.
        thread::Builder::new()
            .name("qemu".to_owned())
            .spawn(move || {
                let mut child = match spawn(&mut command, inherited, is_detached) {
                    Ok(child) => child,
                    Err(error) => return drop(started.send(Err(error))),
                };
                let pid = Pid::from_child(&child);
                // While it is not waited for, its number is its own.
                let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
                let streams = (child.stdout.take(), child.stderr.take());
                if pidfd.is_err() || started.send(pidfd.map(|fd| (fd, pid, streams))).is_err() {
                    // Nobody is there to watch over it.
                    let _ = child.kill();
                }
                let status = match child.wait() {
                    Ok(status) => status.to_string(),
                    Err(error) => error.to_string(),
                };
                ending.send_replace(Some(status));
            })?;
        let lost = |_| io::Error::other("the thread of the process has ended");
        let (pidfd, pid, (stdout, stderr)) = start.await.map_err(lost)??;
        Ok(Process {
            pidfd,
            pid,
            outlives: AtomicBool::new(false),
            ended,
            console: Tail::of(
                stdout.map(OwnedFd::from),
                detached.map(|at| at.join(CONSOLE)),
            )?,
            complaints: Tail::of(
                stderr.map(OwnedFd::from),
                detached.map(|at| at.join(COMPLAINTS)),
            )?,
        })
    }

    /// A detached process that another has started.
    pub(super) fn find(started: &Started, directory: &Path) -> io::Result<Self> {
        let pidfd = started.open()?;
        let pid = Pid::from_raw(started.pid);
        let (ending, ended) = watch::channel(None);
        let watched = pidfd.try_clone()?;
        let watch = move || {
            let mut ready = [PollFd::new(&watched, PollFlags::IN)];
            while matches!(poll(&mut ready, None), Err(Errno::INTR)) {}
            // Only its parent is told how.
            ending.send_replace(Some("it has ended".to_owned()));
        };
        thread::Builder::new()
            .name("qemu".to_owned())
            .spawn(watch)?;
        Ok(Process {
            pidfd,
            pid: pid.ok_or(io::ErrorKind::NotFound)?,
            outlives: AtomicBool::new(true),
            ended,
            console: Tail::of(None, Some(directory.join(CONSOLE)))?,
            complaints: Tail::of(None, Some(directory.join(COMPLAINTS)))?,
        })
    }

    /// Has it live on when this is dropped.
    pub(super) fn outlive(&self) {
        self.outlives.store(true, Ordering::Relaxed);
    }

    pub(super) fn started(&self) -> io::Result<Started> {
        Started::of(self.pid)
    }

    /// Waits until it has ended, and says how. Cancel safe.
    pub(super) async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        let lost = || "nobody knows how".to_owned();
        match ended.wait_for(Option::is_some).await {
            Ok(status) => status.clone().unwrap_or_else(lost),
            Err(_) => lost(),
        }
    }

    /// Waits until it has ended and all that it printed is read. Cancel safe.
    pub(super) async fn read_out(&self) {
        self.ended().await;
        self.complaints.end().await;
        self.console.end().await;
    }

    /// Whether it runs still.
    pub(super) fn is_running(&self) -> bool {
        self.ended.borrow().is_none()
    }

    /// Whether somebody has ended it by a signal, or has stopped it: then what it has not done says nothing about what it
    /// was given.
    pub(super) fn was_cut_off(&self) -> bool {
        const BY_OTHERS: [&str; 5] = ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"];
        match &*self.ended.borrow() {
            Some(status) => BY_OTHERS.iter().any(|signal| status.contains(signal)),
            None => {
                let stat = format!("/proc/{}/stat", self.pid.as_raw_pid());
                let stat = std::fs::read_to_string(stat).unwrap_or_default();
                // The state comes after the name, which may have parentheses itself.
                let state = stat.rsplit(") ").next().unwrap_or_default();
                state.starts_with(['T', 't'])
            }
        }
    }

    /// Adds to an error what QEMU and the guest have said last.
    pub(super) fn explain(&self, error: VmError) -> VmError {
        let said = [
            ("QEMU says", &self.complaints),
            ("the guest printed last", &self.console),
        ];
        said.into_iter().fold(error, |error, (who, tail)| {
            let words = tail.last_words();
            match words.is_empty() {
                true => error,
                false => error.and(&format!("{who}: {words}")),
            }
        })
    }

    /// Kills it, if it has not ended by itself.
    pub(super) fn kill(&self) {
        // The descriptor means this process and no other that gets its number.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.outlives.load(Ordering::Relaxed) {
            self.kill();
        }
    }
}

/// The files to which a detached process prints.
const CONSOLE: &str = "console";
const COMPLAINTS: &str = "complaints";

/// The end of what a process prints; the rest is forgotten. Clones share it.
#[derive(Clone)]
pub(super) struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    /// Where all of it is, if it is not read from a pipe.
    file: Option<PathBuf>,
    /// Closed at the end of the stream.
    reading: watch::Receiver<()>,
}

impl Tail {
    /// Reads a pipe until its end, in a task.
    fn of(stream: Option<OwnedFd>, file: Option<PathBuf>) -> io::Result<Self> {
        let (at_end, reading) = watch::channel(());
        let kept = Arc::default();
        let tail = Tail {
            kept,
            file,
            reading,
        };
        if let Some(stream) = stream {
            let mut stream = pipe::Receiver::from_owned_fd(stream)?;
            let kept = tail.clone();
            tokio::spawn(async move {
                let _at_end = at_end;
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    kept.add(&buffer[..length]);
                }
            });
        }
        Ok(tail)
    }

    /// Waits until the stream has ended and is read. Cancel safe.
    async fn end(&self) {
        while self.reading.clone().changed().await.is_ok() {}
    }

    fn add(&self, bytes: &[u8]) {
        let mut kept = self.bytes();
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT);
        kept.drain(..excess);
    }

    fn bytes(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // Bytes are added and dropped; a panic between leaves bytes.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that is kept, without control characters but the line feed: a guest writes what it likes.
    pub(super) fn text(&self) -> String {
        let bytes: Vec<u8> = match &self.file {
            None => self.bytes().iter().copied().collect(),
            Some(file) => last_of(file).unwrap_or_default(),
        };
        let text = String::from_utf8_lossy(&bytes);
        text.chars()
            .filter(|c| *c == '\n' || !c.is_control())
            .collect()
    }

    /// The last lines, on one line; of a kernel that has panicked, the line that says why, which long lists of
    /// numbers follow.
    pub(super) fn last_words(&self) -> String {
        const LINES: usize = 4;
        let text = self.text();
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let lines: Vec<&str> = lines.collect();
        let panic = lines.iter().find(|line| line.contains("Kernel panic"));
        let last = &lines[lines.len().saturating_sub(LINES)..];
        let last = match panic {
            Some(panic) => vec![*panic],
            None => last.to_vec(),
        };
        last.join(" | ")
    }
}

/// The end of a file.
fn last_of(file: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(KEPT as u64)))?;
    let mut bytes = Vec::new();
    file.take(KEPT as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl fmt::Debug for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.last_words())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn says_how_it_ended_and_what_it_printed() {
        let script = "echo one; echo two >&2; exit 3";
        let process = Process::start(shell(script), Vec::new(), None)
            .await
            .unwrap();
        assert_eq!(process.ended().await, "exit status: 3");
        assert!(!process.is_running());
        // The pipes are read in tasks, which may come later than the end.
        let both = async {
            while process.console.text() != "one\n" || process.complaints.text() != "two\n" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), both)
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_dropped_process_is_killed() {
        let process = Process::start(shell("exec sleep 1000"), Vec::new(), None)
            .await
            .unwrap();
        let mut ended = process.ended.clone();
        drop(process);
        let status = ended.wait_for(Option::is_some).await.unwrap().clone();
        assert_eq!(status.as_deref(), Some("signal: 9 (SIGKILL)"));
    }

    #[tokio::test]
    async fn inherits_the_descriptors_that_were_named_and_no_others() {
        use std::os::fd::AsRawFd;
        let named = OwnedFd::from(std::fs::File::open("/etc/hostname").unwrap());
        // Not closed on exec by itself.
        let flags = rustix::fs::OFlags::RDONLY;
        let other = rustix::fs::open("/etc/hosts", flags, rustix::fs::Mode::empty()).unwrap();
        let (named_number, other_number) = (named.as_raw_fd(), other.as_raw_fd());
        let script = format!(
            "test -e /proc/self/fd/{named_number} && ! test -e /proc/self/fd/{other_number}"
        );
        let process = Process::start(shell(&script), vec![named], None)
            .await
            .unwrap();
        assert_eq!(process.ended().await, "exit status: 0");
    }

    #[tokio::test]
    async fn may_open_as_many_files_as_the_kernel_lets_it() {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let before = getrlimit(Resource::Nofile);
        let mut few = before;
        few.current = Some(1000);
        setrlimit(Resource::Nofile, few).unwrap();
        let script = "test $(ulimit -Sn) = $(ulimit -Hn)";
        let started = Process::start(shell(script), Vec::new(), None).await;
        setrlimit(Resource::Nofile, before).unwrap();
        assert_eq!(started.unwrap().ended().await, "exit status: 0");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let error = Process::start(Command::new("/no/such/program"), Vec::new(), None).await;
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_tail_is_bounded_and_printable() {
        let tail = Tail::of(None, None).unwrap();
        tail.add(&[b'x'; 3 * KEPT]);
        tail.add(b"\x1b[2Jlast\r\n\n");
        assert_eq!(tail.bytes().len(), KEPT);
        assert!(tail.last_words().ends_with("x[2Jlast"));
    }
}
