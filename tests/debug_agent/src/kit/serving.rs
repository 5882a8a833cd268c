//! Running an agent as an ordinary process, and asking a debug agent.

use std::ffi::OsStr;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockmount_bridge::{BridgeGuest, GuestConnection};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Answer, LONGEST, eventually, finish, signal, temp};

/// A program that serves on a socket in a directory of its own. It is ended with the value.
#[derive(Debug)]
pub struct Serving {
    child: Option<Child>,
    /// For the socket, and whatever else belongs to it.
    pub dir: TempDir,
}

impl Serving {
    /// Starts a program with its socket, and these arguments; waits until it listens.
    pub fn start<A: AsRef<OsStr>>(program: &str, dir: TempDir, arguments: &[A]) -> Self {
        let mut program = Command::new(program);
        program
            .arg("--unix")
            .arg(dir.path().join("socket"))
            .stdin(Stdio::null())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = Some(program.spawn().unwrap());
        let serving = Serving { child, dir };
        eventually("listening", || {
            BlockingStream::connect(serving.socket()).is_ok()
        });
        serving
    }

    /// An agent that mounts below `root` in its directory.
    pub fn agent(program: &str, dir: TempDir) -> Self {
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (root, journal) = (at("root"), at("journal"));
        Self::start(program, dir, &["--root", &root, "--journal", &journal])
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// A new connection to it.
    pub async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).await.unwrap()
    }

    /// The host's end, negotiated.
    pub async fn guest(&self) -> BridgeGuest {
        let stream = self.connect().await;
        BridgeGuest::new(GuestConnection::connect(stream).await.unwrap())
    }

    /// Sends a signal, and waits for the end. The directory stays.
    pub fn end(mut self, with: Signal) -> (Answer, TempDir) {
        let child = self.child.take().unwrap();
        signal(child.id(), with);
        let answer = match with {
            // A status that `finish` takes for its own doing.
            Signal::KILL => {
                let output = child.wait_with_output().unwrap();
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                Answer {
                    code: output.status.code(),
                    stdout: text(&output.stdout),
                    stderr: text(&output.stderr),
                }
            }
            _ => finish(child),
        };
        let dir = std::mem::replace(&mut self.dir, temp());
        (answer, dir)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Asks a debug agent once, in its protocol as it is documented: a length in four bytes, and JSON, both ways.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, request: Value) -> Value {
    let text = request.to_string();
    let length = u32::try_from(text.len()).unwrap().to_le_bytes();
    stream.write_all(&length).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let length = timeout(LONGEST, stream.read_u32_le()).await.unwrap();
    let mut answer = vec![0; length.unwrap() as usize];
    stream.read_exact(&mut answer).await.unwrap();
    serde_json::from_slice(&answer).unwrap()
}

/// Whether something is mounted exactly there.
pub fn is_mounted(path: &Path) -> bool {
    let table = blockmount_linux::mountinfo::read().unwrap();
    !blockmount_linux::mountinfo::at(&table, path).is_empty()
}
