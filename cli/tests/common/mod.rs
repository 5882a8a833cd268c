//! Driving the real program, and looking for what it left.
// Each test file uses a part, and a panic anywhere here is a failure message.
#![allow(
    dead_code,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::unwrap_used
)]

pub mod agent;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// No command of these tests takes longer, even on a busy machine.
const LONGEST: Duration = Duration::from_secs(120);

/// The program, with these arguments, saying which run it is.
pub fn program<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockmount"));
    command
        .args(["--log", "error,blockmount::machine=info"])
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// The program, run by nobody. It is copied to where nobody may go.
pub fn as_nobody<A: AsRef<OsStr>>(dir: &Path, arguments: impl IntoIterator<Item = A>) -> Command {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let copy = dir.join("blockmount");
    // By another process: were it open for writing here, a test that forks meanwhile would keep it open.
    run_tool({
        let mut cp = tool("cp");
        cp.arg(env!("CARGO_BIN_EXE_blockmount")).arg(&copy);
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

/// Runs the program to its end.
pub fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Answer {
    finish(
        program(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    )
}

/// What the program said.
pub struct Answer {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
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
fn kill_after(pid: u32, after: Duration) -> std::sync::mpsc::Sender<()> {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if wait.recv_timeout(after) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            signal(pid, Signal::KILL);
        }
    });
    done
}

pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    let _ = kill_process(pid, signal);
}

/// A `mount` that holds its stack.
pub struct Held {
    child: Child,
    pub json: Value,
    stdout: BufReader<ChildStdout>,
    /// What was read of stderr so far.
    said: Vec<u8>,
}

/// Starts `blockmount mount --json` and waits until it holds.
pub fn hold<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Held, Answer> {
    let mut command = program(["mount", "--json"]);
    command
        .args(arguments)
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
                child,
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
        self.child.id()
    }

    /// Sends a signal, and waits for the end.
    pub fn end(self, with: Signal) -> Answer {
        signal(self.child.id(), with);
        self.wait()
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Answer {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        let mut answer = finish(self.child);
        answer
            .stderr
            .insert_str(0, &String::from_utf8_lossy(&self.said));
        answer
    }

    /// Waits for a line on stderr that has these words.
    pub fn wait_for(&mut self, words: &str) -> String {
        let watch = kill_after(self.child.id(), LONGEST);
        let stderr = self.child.stderr.as_mut().unwrap();
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

/// A directory on a disk, for images and targets.
pub fn temp() -> TempDir {
    tempfile::Builder::new()
        .prefix("blockmount-test-")
        .tempdir_in("/var/tmp")
        .unwrap()
}

/// Makes an image with these files by a tool that needs no root.
pub fn image(filesystem: &str, image: impl AsRef<Path>, files: &[(&str, &str)]) {
    let (image, content) = (image.as_ref(), tempfile::tempdir().unwrap());
    for (name, text) in files {
        let path = content.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let mut command = match filesystem {
        "erofs" => tool("mkfs.erofs"),
        "squashfs" => tool("mksquashfs"),
        "ext4" => tool("mkfs.ext4"),
        other => panic!("no images of {other}"),
    };
    match filesystem {
        "erofs" => command.arg(image).arg(content.path()),
        "squashfs" => command
            .arg(content.path())
            .arg(image)
            .args(["-noappend", "-no-progress"]),
        _ => {
            fs::File::create(image).unwrap().set_len(8 << 20).unwrap();
            command
                .args(["-q", "-F", "-L", "test-label", "-d"])
                .arg(content.path())
                .arg(image)
        }
    };
    run_tool(command);
}

/// Makes an image with a GPT, and an ext4 with these files on partition 2.
pub fn partitioned(disk: impl AsRef<Path>, files: &[(&str, &str)]) {
    let (disk, filesystem) = (disk.as_ref(), tempfile::NamedTempFile::new().unwrap());
    image("ext4", filesystem.path(), files);
    fs::File::create(disk).unwrap().set_len(12 << 20).unwrap();
    let mut sfdisk = tool("sfdisk")
        .arg("-q")
        .arg(disk)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    use std::io::{Seek, SeekFrom, Write};
    let table = "label: gpt\nstart=2048,size=2048,name=first\nstart=4096,size=16384,name=second\n";
    sfdisk
        .stdin
        .take()
        .unwrap()
        .write_all(table.as_bytes())
        .unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let mut disk = fs::File::options().write(true).open(disk).unwrap();
    disk.seek(SeekFrom::Start(4096 * 512)).unwrap();
    std::io::copy(&mut fs::File::open(filesystem.path()).unwrap(), &mut disk).unwrap();
}

fn tool(name: &str) -> Command {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut command = Command::new(name);
    command.env("PATH", path);
    command
}

fn run_tool(mut command: Command) {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(
        status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&stderr)
    );
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

/// Which run it was, if it came so far.
pub fn run_id(stderr: &str) -> Option<&str> {
    let (_, after) = stderr.split_once("/run/blockmount/")?;
    after.get(..16)
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
