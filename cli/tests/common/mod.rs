//! Driving the real program, and looking for what it left.
// Each test file uses a part, and a panic anywhere here is a failure message.
#![allow(
    dead_code,
    unused_imports,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::unwrap_used
)]

pub mod containers;
pub mod foreign;
pub mod kills;
pub mod machines;
pub mod servers;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use blockmount_debug_agent::kit;
pub use blockmount_debug_agent::kit::images::{image, partitioned};
pub use blockmount_debug_agent::kit::{
    Answer, LONGEST, eventually, finish, in_kernel, kill_after, signal, temp,
};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// The program, with these arguments, saying which run it is.
pub fn program<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockmount"));
    command
        .args([
            "--log",
            "error,blockmount::machine=info,blockmount_containerd=warn",
        ])
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// The program, run by nobody.
pub fn as_nobody<A: AsRef<OsStr>>(dir: &Path, arguments: impl IntoIterator<Item = A>) -> Command {
    kit::as_nobody(env!("CARGO_BIN_EXE_blockmount"), dir, arguments)
}

/// Runs the program to its end.
pub fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Answer {
    kit::run(program(arguments))
}

/// What a server offers at an address over HTTP.
pub fn get(at: &Path, path: &str) -> String {
    let mut stream = UnixStream::connect(at).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A `mount` that holds its stack.
pub struct Held {
    /// Until it has been waited for.
    child: Option<Child>,
    pub json: Value,
    stdout: BufReader<ChildStdout>,
    /// What was read of stderr so far.
    said: Vec<u8>,
}

/// Starts `blockmount mount --json`, and waits until it holds.
pub fn hold<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Held, Answer> {
    let mut command = program(["mount", "--json"]);
    command.args(arguments);
    hold_by(command)
}

/// The same after a shell command in a mount namespace of its own.
pub fn after_mounting(script: &str, arguments: Vec<String>) -> Command {
    let program = program(["mount", "--json"]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-ec"])
        .arg(format!("{script}; exec \"$0\" \"$@\""))
        .arg(program.get_program())
        .args(program.get_args())
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// Starts such a command in a process group of its own, as a shell does, and waits until it holds.
pub fn hold_by(mut command: Command) -> Result<Held, Answer> {
    command
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    let watch = kill_after(child.id(), LONGEST);
    while stdout.read_line(&mut text).unwrap() > 0 {
        if text.ends_with("\n}\n") {
            let json = serde_json::from_str(&text).unwrap();
            drop(watch);
            return Ok(Held {
                child: Some(child),
                json,
                stdout,
                said: Vec::new(),
            });
        }
    }
    drop(watch);
    Err(finish(child))
}

impl Held {
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Sends a signal, and waits for the end.
    pub fn end(self, with: Signal) -> Answer {
        signal(self.pid(), with);
        self.wait()
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Answer {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        let mut answer = finish(self.child.take().unwrap());
        answer
            .stderr
            .insert_str(0, &String::from_utf8_lossy(&self.said));
        answer
    }

    /// Kills it, and returns what it has said on stderr.
    pub fn kill(mut self) -> String {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let stderr = child.stderr.as_mut().unwrap();
        stderr.read_to_end(&mut self.said).unwrap();
        String::from_utf8_lossy(&self.said).into_owned()
    }

    /// Waits for a line on stderr that has these words.
    pub fn wait_for(&mut self, words: &str) -> String {
        let watch = kill_after(self.pid(), LONGEST);
        let child = self.child.as_mut().unwrap();
        let stderr = child.stderr.as_mut().unwrap();
        let (start, mut byte) = (self.said.len(), [0]);
        // Byte by byte: what comes after the line is for `end` to read.
        while stderr.read(&mut byte).unwrap() > 0 {
            self.said.push(byte[0]);
            let said = String::from_utf8_lossy(&self.said[start..]);
            if byte[0] == b'\n' && said.contains(words) {
                drop(watch);
                return said.into_owned();
            }
        }
        panic!("no {words:?} in {}", String::from_utf8_lossy(&self.said));
    }
}

/// Cleans up, and asserts that all that is there of runs that are known here is removed: what others on this machine have
/// elsewhere is left.
#[track_caller]
pub fn clean_up(words: &[&str]) -> Answer {
    let answer = run(["cleanup", "--json"].iter().chain(words));
    let json = answer.json();
    let items = json["items"].as_array().unwrap();
    for item in items {
        assert!(item["outcome"]["left"].is_null(), "{answer}");
    }
    answer
}

/// A clean-up is about all runs, also that of the test next door.
static CLEAN_UPS: RwLock<()> = RwLock::new(());

/// For a test that removes what others may have left, or leaves what others may remove.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    CLEAN_UPS.write().unwrap_or_else(PoisonError::into_inner)
}

/// For a test that leaves only runs with names, and removes them by name: a clean-up by the next test leaves them.
pub fn by_name() -> RwLockReadGuard<'static, ()> {
    CLEAN_UPS.read().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Held {
    /// A test that fails leaves nothing that holds mounts, disks and locks.
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let watch = kill_after(child.id(), LONGEST);
        signal(child.id(), Signal::TERM);
        drop(child.wait());
        drop(watch);
    }
}

/// Asserts that nothing is left of a run: not in the kernel's tables, not on the disk.
///
/// Other runs go on at the same time; only what has to do with this one counts.
#[track_caller]
pub fn assert_nothing_left(answer: &Answer, directory: &TempDir) {
    let name = directory.path().file_name().unwrap();
    assert_eq!(in_kernel(name), Vec::<String>::new(), "{answer}");
    let Some(id) = run_id(&answer.stderr) else {
        return;
    };
    assert_eq!(in_kernel(id), Vec::<String>::new(), "{answer}");
    for directory in [
        format!("/run/blockmount/{id}"),
        format!("/var/tmp/blockmount-{id}"),
    ] {
        assert!(
            !Path::new(&directory).exists(),
            "{directory} is left by {answer}"
        );
    }
}

/// What a bench of 1 and of 3 disks, 2 rounds each, has to say: each step, beside what is barer.
pub fn assert_measured(answer: &Answer, guest: &str) {
    let json = answer.json();
    assert_eq!(
        (&json["guest"], &json["rounds"]),
        (&guest.into(), &2.into())
    );
    let sizes = json["sizes"].as_array().unwrap();
    let disks: Vec<_> = sizes.iter().map(|size| &size["disks"]).collect();
    assert_eq!(disks, [1, 3], "{answer}");
    let is_positive = |times: &serde_json::Value| {
        let times = ["p50", "p90", "p99"].map(|name| times[name].as_f64().unwrap());
        assert!(times[0] > 0.0 && times.is_sorted(), "{times:?}: {answer}");
    };
    for size in sizes {
        for way in ["up", "down"] {
            is_positive(&size[way]["ours"]);
            is_positive(&size[way]["floor"]);
            assert!(size[way]["ratio"].as_f64().unwrap() > 0.0, "{answer}");
        }
        let steps = size["steps"].as_array().unwrap();
        let names: Vec<_> = steps.iter().map(|step| &step["step"]).collect();
        assert_eq!(names, ["attach", "mount", "unmount", "unplug", "detach"]);
        for (index, step) in steps.iter().enumerate() {
            is_positive(&step["ours"]);
            match index < 3 {
                true => is_positive(&step["floor"]),
                false => assert!(step["floor"].is_null(), "{answer}"),
            }
        }
    }
}

/// Which run it was, if it came so far.
pub fn run_id(stderr: &str) -> Option<&str> {
    let (_, after) = stderr.split_once("/run/blockmount/")?;
    after.get(..16)
}
