//! Servers of containerd's service, and a client of them that is not ours.

use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Answer, LONGEST, finish, kill_after, program, signal};

/// A server with a directory of its own, and what it tells its service manager.
pub struct Server {
    child: Option<Child>,
    notified: UnixDatagram,
    name: String,
}

/// The name of the servers of one test.
pub fn name(dir: &TempDir) -> String {
    let name = dir.path().file_name().unwrap().to_str().unwrap();
    format!("test{}", name.trim_start_matches('.'))
}

pub fn socket(dir: &TempDir) -> PathBuf {
    dir.path().join("socket")
}

impl Server {
    /// Starts one, by another program if one is named, with these words and a file that says where.
    pub fn start(dir: &TempDir, before: &[&str], words: &[&str]) -> Self {
        Server::start_with(dir, before, words, "")
    }

    /// The same with more in the file.
    fn start_with(dir: &TempDir, before: &[&str], words: &[&str], more: &str) -> Self {
        let path = dir.path().join("notify");
        let _absent = fs::remove_file(&path);
        let notified = UnixDatagram::bind(&path).unwrap();
        notified.set_read_timeout(Some(LONGEST)).unwrap();
        let server = program(["serve", "--log-format", "json", "--name", &name(dir)]);
        let mut command = Command::new(before.first().map_or(server.get_program(), AsRef::as_ref));
        command.args(before.iter().skip(1));
        if !before.is_empty() {
            command.arg(server.get_program());
        }
        let config = dir.path().join("serve.toml");
        let text = format!("address = {:?}\nallow-users = [65534]\n{more}", socket(dir));
        fs::write(&config, text).unwrap();
        let child = command
            .args(server.get_args())
            .arg("--config")
            .arg(config)
            .args(words)
            .env("NOTIFY_SOCKET", path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Server {
            child: Some(child),
            notified,
            name: name(dir),
        }
    }

    /// The same until it is ready, or an end that says why it is not.
    #[track_caller]
    pub fn ready(dir: &TempDir, words: &[&str]) -> Self {
        Server::ready_with(dir, words, "")
    }

    /// The same with more in its file.
    #[track_caller]
    pub fn ready_with(dir: &TempDir, words: &[&str], more: &str) -> Self {
        let mut server = Server::start_with(dir, &[], words, more);
        let deadline = Instant::now() + LONGEST;
        // One that has ended says nothing any more.
        server.await_at_most(Duration::from_secs(1));
        let mut heard = [0; 256];
        let length = loop {
            match server.notified.recv(&mut heard) {
                Ok(length) => break length,
                Err(error) => {
                    let child = server.child.as_mut().unwrap();
                    let is_alive = child.try_wait().unwrap().is_none();
                    if !is_alive || Instant::now() > deadline {
                        let said = server.child.take().map_or(String::new(), said_of);
                        panic!("{error}: {said}");
                    }
                }
            }
        };
        assert!(heard[..length].starts_with(b"READY=1"));
        server.await_at_most(LONGEST);
        server
    }

    fn await_at_most(&self, timeout: Duration) {
        self.notified.set_read_timeout(Some(timeout)).unwrap();
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    #[track_caller]
    pub fn hears(&self, expected: &str) {
        let mut heard = [0; 256];
        let length = self.notified.recv(&mut heard).unwrap();
        let heard = String::from_utf8_lossy(&heard[..length]);
        assert!(heard.starts_with(expected), "{heard}");
    }

    /// Waits for a line on stderr that has these words.
    #[track_caller]
    pub fn wait_for(&mut self, words: &str) -> String {
        let child = self.child.as_mut().unwrap();
        let watch = kill_after(child.id(), LONGEST);
        let (mut line, mut byte) = (Vec::new(), [0]);
        // Byte by byte: what comes after the line is for the end.
        while child.stderr.as_mut().unwrap().read(&mut byte).unwrap() > 0 {
            if byte[0] != b'\n' {
                line.push(byte[0]);
                continue;
            }
            let said = String::from_utf8_lossy(&line).into_owned();
            if said.contains(words) {
                drop(watch);
                return said;
            }
            line.clear();
        }
        panic!("it has not said {words:?}");
    }

    /// Ends it as a service manager does.
    pub fn end(mut self) -> Answer {
        let child = self.child.take().unwrap();
        signal(child.id(), Signal::TERM);
        let watch = kill_after(child.id(), LONGEST);
        let answer = finish(child);
        drop(watch);
        answer
    }

    /// Waits until it has ended by itself.
    pub fn wait(mut self) -> Answer {
        let child = self.child.take().unwrap();
        let watch = kill_after(child.id(), LONGEST);
        let answer = finish(child);
        drop(watch);
        answer
    }

    /// Kills it, and returns what it has said.
    pub fn kill(mut self) -> String {
        said_of(self.child.take().unwrap())
    }
}

fn said_of(mut child: Child) -> String {
    child.kill().unwrap();
    child.wait().unwrap();
    let mut said = String::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    said
}

impl Drop for Server {
    /// A test that fails leaves no server, and nothing that it has activated.
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let watch = kill_after(child.id(), LONGEST);
        signal(child.id(), Signal::TERM);
        drop(child.wait());
        drop(watch);
        let discard = format!("--resumable={}", self.name);
        drop(program(["cleanup", &discard]).output());
    }
}

/// A client in Python that knows nothing but containerd's protocol.
pub struct Client {
    child: Child,
    asks: Option<ChildStdin>,
    hears: BufReader<ChildStdout>,
}

impl Client {
    pub fn of(dir: &TempDir) -> Self {
        Client::start(dir, &[])
    }

    /// The same as another user.
    pub fn of_user(dir: &TempDir, user: u32) -> Self {
        Client::start(dir, &[user.to_string()])
    }

    fn start(dir: &TempDir, words: &[String]) -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut child = Command::new("/usr/bin/python3")
            .arg(here.join("tests/common/mounts_client.py"))
            .args([
                socket(dir),
                here.join("../backends/containerd/protocol/proto"),
            ])
            .args(words)
            .env_remove("PYTHONPATH")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Client {
            asks: child.stdin.take(),
            hears: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// What is answered to one line.
    #[track_caller]
    pub fn ask(&mut self, asked: &Value) -> Value {
        writeln!(self.asks.as_mut().unwrap(), "{asked}").unwrap();
        let mut line = String::new();
        self.hears.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{asked}: {error}: {line:?}"))
    }

    /// The answer to a call that has to succeed.
    #[track_caller]
    pub fn call(&mut self, method: &str, request: Value) -> Value {
        let answer = self.ask(&json!({"call": method, "request": request}));
        match answer.get("answer") {
            Some(answer) => answer.clone(),
            None => panic!("{method}: {answer}"),
        }
    }

    /// Activates a list, and says where each of its mounts is.
    #[track_caller]
    pub fn activate(&mut self, name: &str, mounts: &[Value]) -> Vec<PathBuf> {
        points(&self.call("Activate", json!({"name": name, "mounts": mounts})))
    }

    /// The same in one of several virtual machines.
    #[track_caller]
    pub fn activate_in(&mut self, vm: &str, name: &str, mounts: &[Value]) -> Vec<PathBuf> {
        let labels = json!({"blockmount.vm": vm});
        let request = json!({"name": name, "mounts": mounts, "labels": labels});
        points(&self.call("Activate", request))
    }

    #[track_caller]
    pub fn deactivate(&mut self, name: &str) {
        self.call("Deactivate", json!({"name": name}));
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.asks.take());
        drop(self.child.wait());
    }
}

fn points(answer: &Value) -> Vec<PathBuf> {
    let active = answer["info"]["active"].as_array().unwrap().iter();
    let point = |mount: &Value| mount["mountPoint"].as_str().unwrap_or_default().into();
    active.map(point).collect()
}

/// A mount of containerd's.
pub fn mount(kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Value {
    json!({"type": kind, "source": source.as_ref(), "options": options})
}

/// A layer as the erofs snapshotter describes it.
pub fn layer(image: impl AsRef<Path>) -> Value {
    mount("erofs", image, &["ro", "loop"])
}

/// The file that an active snapshot is written to.
pub fn writable(image: impl AsRef<Path>) -> Value {
    let options = [
        "rw",
        "loop",
        "X-containerd.mkfs.fs=ext4",
        "X-containerd.mkfs.size=16MiB",
    ];
    mount("mkfs/ext4", image, &options)
}

/// The overlay of an active snapshot over so many layers.
pub fn overlay(layers: usize) -> Value {
    let lower = format!("lowerdir={{{{ overlay 1 {layers} }}}}");
    let options = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        &lower,
    ];
    mount("format/mkdir/overlay", "overlay", &options)
}
