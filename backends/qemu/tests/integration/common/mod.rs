//! What the tests share: a QEMU that has no guest system, and a monitor of it that is not our client.
// Each test file is a crate and uses some of it; a panic here is a test's failure message.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod hook;
pub mod lossy;
pub mod peer;
pub mod pmem;

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockmount_qemu::QemuScsi;
use blockmount_qemu::qmp::{Deadlines, Qmp};
use blockmount_scsi::ScsiAddress;
use serde_json::{Value, json};

/// Longer than anything takes that does not fail.
pub const LONG: Duration = Duration::from_secs(60);

/// For tests in which something is not answered.
pub const SHORT_DEADLINES: Deadlines = Deadlines {
    call: Duration::from_secs(1),
    greeting: LONG,
};

/// A QEMU with some virtio-scsi controllers, whose processor never starts.
pub struct Qemu {
    child: Child,
    directory: tempfile::TempDir,
    controllers: Vec<String>,
    /// The end of its monitor that a test has not taken yet.
    stream: Option<tokio::net::UnixStream>,
    pub monitor: Arc<Mutex<Monitor>>,
}

impl Qemu {
    pub fn start(controllers: usize) -> Self {
        Self::start_with(controllers, &[])
    }

    pub fn start_with(controllers: usize, more: &[&str]) -> Self {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let controllers: Vec<String> = (0..controllers).map(|n| format!("scsi{n}")).collect();
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-S",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-m",
            "32M",
        ]);
        command.args(more);
        for id in &controllers {
            command.args(["-device", &format!("virtio-scsi-pci,id={id}")]);
        }
        // QEMU connects to us: there is nothing to wait for but its coming.
        let listeners = ["one", "two"].map(|name| {
            let path = directory.path().join(name);
            command.args(["-qmp", &format!("unix:{}", path.display())]);
            UnixListener::bind(path).unwrap()
        });
        let mut child = command.spawn().unwrap_or_else(|error| match error.kind() {
            ErrorKind::NotFound => panic!("no qemu-system-x86_64 here; run tests/setup.sh"),
            _ => panic!("cannot start qemu-system-x86_64: {error}"),
        });
        let [stream, monitor] = listeners.map(|listener| accept(&listener, &mut child));
        stream.set_nonblocking(true).unwrap();
        Qemu {
            child,
            directory,
            controllers,
            stream: Some(tokio::net::UnixStream::from_std(stream).unwrap()),
            monitor: Arc::new(Mutex::new(Monitor::new(monitor))),
        }
    }

    /// Its monitor, once.
    pub fn stream(&mut self) -> tokio::net::UnixStream {
        self.stream.take().unwrap()
    }

    pub async fn qmp(&mut self, deadlines: Deadlines) -> Qmp {
        Qmp::connect_with(self.stream(), deadlines).await.unwrap()
    }

    pub async fn scsi(&mut self) -> QemuScsi {
        self.scsi_with(Deadlines::default()).await
    }

    pub async fn scsi_with(&mut self, deadlines: Deadlines) -> QemuScsi {
        let qmp = self.qmp(deadlines).await;
        self.attacher(qmp)
    }

    pub fn attacher(&self, qmp: Qmp) -> QemuScsi {
        QemuScsi::new(qmp, self.controllers.clone()).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A raw image of a size in bytes; all zeros.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// Has QEMU make a qcow2 image of 4 MiB.
    pub fn qcow2(&self, name: &str, more: Value) -> PathBuf {
        let (path, mut monitor) = (self.image(name, 0), self.monitor.lock().unwrap());
        let file = json!({"driver": "file", "node-name": "made", "filename": path});
        monitor.done("blockdev-add", file);
        let mut options = json!({"driver": "qcow2", "file": "made", "size": 4 << 20});
        for (option, value) in more.as_object().unwrap() {
            options[option] = value.clone();
        }
        monitor.job("blockdev-create", json!({"options": options}));
        monitor.done("blockdev-del", json!({"node-name": "made"}));
        path
    }

    pub fn execute(&self, command: &str, arguments: Value) -> Value {
        self.monitor.lock().unwrap().done(command, arguments)
    }

    /// What QEMU has, in order: block devices, nodes, and devices with ids.
    pub fn tables(&self) -> Vec<String> {
        self.monitor.lock().unwrap().tables()
    }

    /// The descriptors that it was passed and has kept. One that is stopped keeps all.
    pub fn passed(&self) -> Vec<Value> {
        let sets = self.execute("query-fdsets", json!({}));
        let sets = sets.as_array().unwrap().iter();
        sets.flat_map(|set| set["fds"].as_array().unwrap().clone())
            .collect()
    }

    /// How many of its descriptors are of this file, without those that it was passed.
    pub fn opened(&self, path: &Path) -> usize {
        let wanted = std::fs::metadata(path).unwrap();
        let passed = self.passed();
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let own = descriptors.map(Result::unwrap).filter(|entry| {
            let number: u64 = entry.file_name().to_str().unwrap().parse().unwrap();
            !passed.iter().any(|passed| passed["fd"] == number)
        });
        own.filter_map(|entry| std::fs::metadata(entry.path()).ok())
            .filter(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
            .count()
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(status.success());
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = (self.child.kill(), self.child.wait());
    }
}

/// Waits for QEMU to connect, or to end.
fn accept(listener: &UnixListener, child: &mut Child) -> UnixStream {
    let listener = listener.try_clone().unwrap();
    let (sender, accepted) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(listener.accept().unwrap().0));
    match accepted.recv_timeout(LONG) {
        Ok(stream) => stream,
        Err(_) => panic!("QEMU has not started: {:?}", child.try_wait()),
    }
}

/// The second monitor: blocks, and knows nothing of what is tested.
pub struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut monitor = Monitor(BufReader::new(stream));
        assert!(monitor.line().get("QMP").is_some());
        monitor.done("qmp_capabilities", json!({}));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let command = json!({"execute": command, "arguments": arguments});
        writeln!(self.0.get_mut(), "{command}").unwrap();
        loop {
            let mut line = self.line();
            if line.get("event").is_none() {
                let error = line["error"].take();
                return if error.is_null() {
                    Ok(line["return"].take())
                } else {
                    Err(error)
                };
            }
        }
    }

    pub fn done(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments);
        answer.unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    pub fn until(&mut self, event: &str, data: impl Fn(&Value) -> bool) {
        loop {
            let line = self.line();
            if line["event"] == event && data(&line["data"]) {
                return;
            }
        }
    }

    fn job(&mut self, command: &str, mut arguments: Value) {
        arguments["job-id"] = json!("job");
        let ask = json!({"execute": command, "arguments": arguments});
        writeln!(self.0.get_mut(), "{ask}").unwrap();
        self.until("JOB_STATUS_CHANGE", |data| data["status"] == "concluded");
        let jobs = self.done("query-jobs", json!({}));
        assert!(jobs[0].get("error").is_none(), "{jobs}");
        self.done("job-dismiss", json!({"id": "job"}));
    }

    pub fn tables(&mut self) -> Vec<String> {
        let mut tables = Vec::new();
        let list = |answer: &Value, what: &str, key: &str, tables: &mut Vec<String>| {
            for entry in answer.as_array().unwrap() {
                tables.push(format!("{what} {} {}", entry[key], entry["inserted"]["ro"]));
            }
        };
        list(
            &self.done("query-block", json!({})),
            "block",
            "qdev",
            &mut tables,
        );
        let nodes = self.done("query-named-block-nodes", json!({"flat": true}));
        list(&nodes, "node", "node-name", &mut tables);
        let devices = self.done("qom-list", json!({"path": "/machine/peripheral"}));
        list(&devices, "device", "name", &mut tables);
        tables.sort();
        tables
    }
}

pub fn address(text: &str) -> ScsiAddress {
    text.parse().unwrap()
}
