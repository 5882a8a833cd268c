//! What tests of several crates share: driving processes, and looking for what they left.
// A panic anywhere here is a failure message of a test.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod aes_xts;
pub mod images;
pub mod luks;
pub mod serving;

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// No command of these tests takes longer, even on a busy machine.
pub const LONGEST: Duration = Duration::from_secs(600);

/// Runs a command to its end.
pub fn run(mut command: Command) -> Answer {
    command.stdin(Stdio::null());
    finish(
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    )
}

/// A program, run by the user `nobody`, from a copy that this user can reach.
pub fn as_nobody<A: AsRef<OsStr>>(
    program: &str,
    dir: &Path,
    arguments: impl IntoIterator<Item = A>,
) -> Command {
    use std::os::unix::fs::PermissionsExt;
    let copy = dir.join(Path::new(program).file_name().unwrap());
    // By another process: were it open for writing here, a test that forks meanwhile would keep it open.
    images::run_tool({
        let mut cp = images::tool("cp");
        cp.arg(program).arg(&copy);
        cp
    });
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(copy);
    command.args(arguments).stdin(Stdio::null());
    if rustix::process::geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    command
}

/// What a program said.
#[derive(Debug)]
pub struct Answer {
    /// Its exit status; `None` after a signal.
    pub code: Option<i32>,
    /// All of it.
    pub stdout: String,
    /// All of it.
    pub stderr: String,
}

impl Answer {
    /// What it said on stdout.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    /// Whether its output has these words, wherever its lines are wrapped.
    pub fn has_words(&self, words: &str) -> bool {
        let output: Vec<_> = self.stdout.split_whitespace().collect();
        output.join(" ").contains(words)
    }

    /// Asserts the exit status, and that each of these is said on stderr.
    #[track_caller]
    pub fn says(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self}");
        }
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "exit {:?}\nstdout: {}\nstderr: {}",
            self.code, self.stdout, self.stderr
        )
    }
}

/// Waits for a program, with a deadline, and collects what it said.
pub fn finish(mut child: Child) -> Answer {
    let pid = child.id();
    let watch = kill_after(pid, LONGEST);
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        err.as_mut().map(|err| err.read_to_end(&mut text));
        text
    });
    let mut stdout = Vec::new();
    out.as_mut().map(|out| out.read_to_end(&mut stdout));
    let stderr = reader.join().unwrap();
    let status = child.wait().unwrap();
    drop(watch);
    assert_ne!(
        status.signal(),
        Some(9),
        "the program took longer than {LONGEST:?}"
    );
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Answer {
        code: status.code(),
        stdout: text(&stdout),
        stderr: text(&stderr),
    }
}

/// Kills a process unless the answer is dropped before.
pub fn kill_after(pid: u32, after: Duration) -> std::sync::mpsc::Sender<()> {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if wait.recv_timeout(after) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            signal(pid, Signal::KILL);
        }
    });
    done
}

/// Sends a signal, if the process is still there.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    let _ = kill_process(pid, signal);
}

/// A directory on a disk, for images and targets.
pub fn temp() -> TempDir {
    tempfile::Builder::new()
        .prefix("blockmount-test-")
        .tempdir_in("/var/tmp")
        .unwrap()
}

/// The lines of the mount table with these bytes, and the loop devices whose file's path has them.
pub fn in_kernel(part: impl AsRef<OsStr>) -> Vec<String> {
    let part = part.as_ref().as_bytes();
    let has = |bytes: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let table = fs::read("/proc/self/mountinfo").unwrap();
    let mounts = table.split(|byte| *byte == b'\n').filter(|line| has(line));
    let mut found: Vec<String> = mounts
        .map(|line| String::from_utf8_lossy(line).into_owned())
        .collect();
    for device in fs::read_dir("/sys/block").unwrap().flatten() {
        let file = fs::read(device.path().join("loop/backing_file")).unwrap_or_default();
        if has(&file) {
            let file = String::from_utf8_lossy(&file);
            found.push(format!("{:?} {file}", device.file_name()));
        }
    }
    found
}

/// Waits until something holds, which happens in another process.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONGEST;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}
