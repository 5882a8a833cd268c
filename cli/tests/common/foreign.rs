//! A virtual machine that a test starts by hand, as somebody does who knows QEMU and not us.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockmount_agent::{Endpoints, termination};
use blockmount_checker::Checker;
use blockmount_checker::protocol::Tables;
use blockmount_debug_agent::kit::serving;
use blockmount_debug_agent::{DebugServer, PORT};
use blockmount_qemu::{GuestImage, GuestImageBuilder, GuestKernel, PROGRAMS, QemuScsi, Qmp};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::{LONGEST, eventually, kill_after};

/// What its guest's agent is told: more than `examples/guest_image.rs` says, since the bus has two controllers.
const ARGUMENTS: &str = "--scsi-controller\npci:0000:00:10.0\n--scsi-controller\npci:0000:00:11.0\n\
                         --root\n/mnt\n--root\n/run/mounts\n--root\n/run/blockmount\n";
/// Below these that agent mounts.
const ROOTS: [&str; 3] = ["/mnt", "/run/mounts", "/run/blockmount"];
const DEBUG_AGENT: &str = "/etc/blockmount/programs/debug-agent";
const CHECKER: &str = "/init\nchecker\n/mnt\n/run/mounts\n/run/blockmount\n";

pub struct ForeignMachine {
    pub dir: TempDir,
    qemu: Child,
    runtime: Runtime,
}

impl ForeignMachine {
    /// Starts a machine with two disks of its own, at LUNs 0 and 2 of the first controller.
    pub fn start() -> Self {
        Self::start_with(|image| image)
    }

    /// The same with a debug agent in its guest, which is the program of this test: in the guest its test of this name has to
    /// [be one](serve_in_guest).
    pub fn start_with_debug_agent(
        test: &str,
        more: impl FnOnce(GuestImageBuilder) -> GuestImageBuilder,
    ) -> Self {
        let program = std::env::current_exe().unwrap();
        let name = program.file_name().unwrap().to_str().unwrap();
        let words = format!("{PROGRAMS}/{name}\n--exact\n{test}\n--nocapture\n--test-threads\n1\n");
        Self::start_with(|image| more(image.add_program(&program).file(DEBUG_AGENT, words)))
    }

    fn start_with(more: impl FnOnce(GuestImageBuilder) -> GuestImageBuilder) -> Self {
        let dir = tempfile::Builder::new().prefix("vm").tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let kernel = GuestKernel::find().unwrap();
        let image = GuestImage::builder(kernel)
            .program(env!("CARGO_BIN_EXE_blockmount"))
            .file("/etc/blockmount/agent.args", ARGUMENTS)
            .file("/etc/blockmount/programs/checker", CHECKER)
            .filesystem_tools();
        let image = runtime.block_on(more(image).build()).unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("guest.cpio"), image.initramfs()).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-accel",
                "tcg,thread=multi",
            ])
            .args([
                "-M",
                "q35,sata=off,smbus=off,usb=off,vmport=off",
                "-cpu",
                "max",
                "-m",
                "512M",
            ])
            .arg("-kernel")
            .arg(image.kernel().image())
            .arg("-initrd")
            .arg(at("guest.cpio"))
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off",
            ])
            .args([
                "-device",
                "virtio-scsi-pci,id=scsi0,addr=0x10",
                "-device",
                "virtio-scsi-pci,id=scsi1,addr=0x11",
            ])
            .args(["-device", "virtio-serial-pci,id=serial"])
            .args(["-serial", &format!("file:{}", at("console").display())]);
        for name in ["agent", "checker", "debug"] {
            let socket = at(name);
            command.args([
                "-chardev",
                &format!(
                    "socket,id={name},path={},server=on,wait=off",
                    socket.display()
                ),
                "-device",
                &format!("virtserialport,bus=serial.0,name=blockmount.{name},chardev={name}"),
            ]);
        }
        for lun in [0, 2] {
            let file = at(&format!("own-{lun}.img"));
            fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
            command.args([
                "-drive",
                &format!("if=none,id=own{lun},format=raw,file={}", file.display()),
                "-device",
                &format!("scsi-hd,id=theirs{lun},bus=scsi0.0,lun={lun},drive=own{lun}"),
            ]);
        }
        command.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", at("qmp").display()),
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let qemu = command.spawn().unwrap();
        let machine = ForeignMachine { dir, qemu, runtime };
        eventually("the sockets of a machine", || machine.at("qmp").exists());
        machine
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the command line says of it.
    pub fn words(&self) -> Vec<String> {
        let (qmp, agent) = (self.at("qmp"), self.at("agent"));
        vec![
            "--vm".to_owned(),
            format!("qemu:{}", qmp.display()),
            "--agent".to_owned(),
            format!("unix:{}", agent.display()),
        ]
    }

    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    pub fn is_alive(&mut self) -> bool {
        self.qemu.try_wait().unwrap().is_none()
    }

    /// What the guest's kernel has, as lines, asked over the checker's port. A guest that boots is waited for.
    pub fn tables(&self) -> BTreeSet<String> {
        let mut answer = self.runtime.block_on(async {
            let mut stream = UnixStream::connect(self.at("checker")).await.unwrap();
            serving::ask(&mut stream, json!("tables")).await
        });
        lines(&serde_json::from_value(answer["tables"].take()).unwrap())
    }

    pub fn ask<T>(&self, ask: impl AsyncFnOnce(&mut Checker<UnixStream>) -> T) -> T {
        self.runtime.block_on(async {
            let stream = UnixStream::connect(self.at("checker")).await.unwrap();
            ask(&mut Checker::new(stream)).await
        })
    }

    /// Asks its debug agent, and expects an answer.
    pub fn debug(&self, question: Value) -> Value {
        let answer = self.runtime.block_on(async {
            let mut stream = UnixStream::connect(self.at("debug")).await.unwrap();
            serving::ask(&mut stream, question.clone()).await
        });
        assert!(answer.get("failed").is_none(), "{question}: {answer}");
        answer
    }

    /// Runs a program in a root of the guest, and tells its exit status and what it has said on each stream.
    #[track_caller]
    pub fn run(&self, root: &Path, words: &[&str]) -> (i64, String, String) {
        let run = json!({"root": root, "words": words, "deadline": 120});
        let ended = &self.debug(json!({ "run": run }))["ended"];
        assert_eq!(ended["left_out"], 0, "{words:?}: {ended}");
        let status = ended["status"].as_i64();
        let status = status.unwrap_or_else(|| panic!("{words:?}: {ended}"));
        let text = |name: &str| ended[name].as_str().unwrap().to_owned();
        (status, text("stdout"), text("stderr"))
    }

    /// Nothing of ours is in it, and all of theirs.
    #[track_caller]
    pub fn assert_as(&self, before: &BTreeSet<String>) {
        let (ours, theirs) = self.in_qemu();
        assert_eq!(
            (ours, theirs),
            (Vec::new(), vec!["theirs0".to_owned(), "theirs2".to_owned()])
        );
        self.assert_guest_as(before);
    }

    /// Nothing of ours is in its guest.
    #[track_caller]
    pub fn assert_guest_as(&self, before: &BTreeSet<String>) {
        let now = self.tables();
        let more: Vec<_> = now.difference(before).collect();
        let less: Vec<_> = before.difference(&now).collect();
        assert!(
            more.is_empty() && less.is_empty(),
            "more: {more:?}; less: {less:?}"
        );
    }

    /// What QEMU has of ours, and of others on the SCSI controllers. Nobody else may be at its monitor.
    pub fn in_qemu(&self) -> (Vec<String>, Vec<String>) {
        self.runtime.block_on(async {
            let stream = UnixStream::connect(self.at("qmp")).await.unwrap();
            let qmp = Qmp::connect(stream).await.unwrap();
            let scsi = QemuScsi::new(qmp.clone(), ["scsi0", "scsi1"]).unwrap();
            let ours = scsi.left().await.unwrap();
            let devices = qmp
                .execute("qom-list", json!({"path": "/machine/peripheral"}))
                .await;
            let devices = devices.unwrap();
            let names = devices.as_array().unwrap().iter();
            let names = names.filter_map(|device| device["name"].as_str());
            let theirs = names.filter(|name| name.starts_with("theirs"));
            let mut theirs: Vec<String> = theirs.map(str::to_owned).collect();
            theirs.sort_unstable();
            (ours, theirs)
        })
    }

    /// Stands still, or goes on.
    pub fn command(&self, command: &str) {
        self.runtime.block_on(async {
            let stream = UnixStream::connect(self.at("qmp")).await.unwrap();
            let qmp = Qmp::connect(stream).await.unwrap();
            qmp.execute(command, json!({})).await.unwrap();
        });
    }
}

impl Drop for ForeignMachine {
    fn drop(&mut self) {
        let watch = kill_after(self.qemu.id(), LONGEST);
        let _ended = self.qemu.kill();
        let _waited = self.qemu.wait();
        drop(watch);
    }
}

fn lines(tables: &Tables) -> BTreeSet<String> {
    let mounts = tables.mounts.iter();
    let mounts =
        mounts.map(|mount| format!("mount of {} at {}", mount.filesystem, mount.mount_point));
    // Loop devices stay when nothing is bound to them any more.
    let disks = tables
        .block_devices
        .iter()
        .filter(|disk| !disk.name.starts_with("loop"))
        .map(|disk| format!("disk {}", disk.name));
    let scsi = tables
        .scsi_devices
        .iter()
        .map(|address| format!("SCSI device {address}"));
    let mapped = tables
        .dm_devices
        .iter()
        .map(|device| format!("mapped device {}", device.name));
    let directories = tables
        .directories
        .iter()
        .map(|directory| format!("directory {directory}"));
    let devices = disks.chain(scsi).chain(mapped);
    mounts.chain(devices).chain(directories).collect()
}

/// Whether this program is the debug agent of such a machine's guest.
pub fn is_in_guest() -> bool {
    Path::new(DEBUG_AGENT).exists()
}

/// Is the debug agent of this guest until it is ended.
pub fn serve_in_guest() {
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let server = DebugServer::new(ROOTS.map(PathBuf::from).into(), "/init".into());
        let endpoints = Endpoints::default().or_port(PORT);
        endpoints
            .serve(server, termination().unwrap())
            .await
            .unwrap();
    });
}

/// An image with one file in it.
pub fn layer(dir: &Path, name: &str) -> String {
    let image = dir.join(format!("{name}.erofs"));
    super::image("erofs", &image, &[("file", name)]);
    image.display().to_string()
}
