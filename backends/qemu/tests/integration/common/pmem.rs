//! A QEMU with VPMEM, whose guest is played by the test over QEMU's `qtest` protocol: it reads and writes
//! physical memory, and ejects what is in a slot as ACPI does.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use blockmount::Disk;
use blockmount_qemu::QemuVpmem;
use blockmount_qemu::qmp::{Deadlines, Qmp};
use serde_json::{Value, json};

use super::{LONG, Monitor, Qemu};

pub const MIB: u64 = 1 << 20;

/// How large the devices of the tests are, in bytes.
pub const DEVICE: u64 = 64 * MIB;

/// Ports of the ACPI hot-plug controller of q35: which bus is meant, and which of its slots is ejected (QEMU's
/// `docs/specs/acpi_pci_hotplug`).
const SELECT_BUS: u16 = 0x0cd0;
const EJECT: u16 = 0x0cc8;

pub struct Pmem {
    pub qemu: Qemu,
    pub guest: Guest,
    /// Where the attacher makes its files.
    pub files: tempfile::TempDir,
    ports: Vec<String>,
}

impl Pmem {
    /// With so many root ports, 8 memory slots, and a GiB of address space for devices.
    pub fn start(ports: usize) -> Self {
        Self::start_with(ports, 1 << 30)
    }

    pub fn start_with(ports: usize, room: u64) -> Self {
        Self::start_further(ports, room, &[])
    }

    /// With a monitor that many can connect to, one after the other, at `qmp` in a directory. It runs, so that it closes the
    /// files that are taken back.
    pub fn start_reachable(ports: usize, directory: &Path) -> Self {
        let monitor = format!(
            "unix:{},server=on,wait=off",
            directory.join("qmp").display()
        );
        let pmem = Self::start_further(ports, 1 << 30, &["-qmp", &monitor]);
        pmem.qemu.execute("cont", json!({}));
        pmem
    }

    fn start_further(ports: usize, room: u64, further: &[&str]) -> Self {
        let files = tempfile::tempdir_in("/var/tmp").unwrap();
        let ports: Vec<String> = (0..ports).map(|n| format!("rp{n}")).collect();
        let path = files.path().join("qtest");
        let listener = UnixListener::bind(&path).unwrap();
        let memory = format!("64M,slots=8,maxmem={}M", 64 + room / MIB);
        let qtest = format!("unix:{}", path.display());
        let mut more: Vec<String> = ["-M", "nvdimm=on", "-m", &memory, "-qtest", &qtest]
            .map(str::to_owned)
            .to_vec();
        more.extend(["-qtest-log", "/dev/null"].map(str::to_owned));
        for (at, id) in (1..).zip(&ports) {
            let port = format!("pcie-root-port,id={id},chassis={at},slot={at}");
            more.extend(["-device".to_owned(), port]);
        }
        let more: Vec<&str> = more
            .iter()
            .map(String::as_str)
            .chain(further.iter().copied())
            .collect();
        let qemu = Qemu::start_with(0, &more);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        std::fs::remove_file(&path).unwrap();
        let guest = Guest {
            qtest: Arc::new(Mutex::new(BufReader::new(stream))),
            monitor: qemu.monitor.clone(),
        };
        Pmem {
            qemu,
            guest,
            files,
            ports,
        }
    }

    pub async fn virtio(&mut self) -> QemuVpmem {
        let qmp = self.qemu.qmp(Deadlines::default()).await;
        self.virtio_over(qmp)
    }

    pub fn virtio_over(&self, qmp: Qmp) -> QemuVpmem {
        QemuVpmem::virtio(qmp, self.ports.clone(), DEVICE, self.files.path()).unwrap()
    }

    pub async fn nvdimm(&mut self) -> QemuVpmem {
        let qmp = self.qemu.qmp(Deadlines::default()).await;
        QemuVpmem::nvdimm(qmp, 8, DEVICE, self.files.path()).unwrap()
    }

    /// A read-only disk that is filled with one byte.
    pub fn disk(&self, name: &str, byte: u8, size: u64) -> Disk {
        let path = self.path(name);
        std::fs::write(&path, vec![byte; usize::try_from(size).unwrap()]).unwrap();
        Disk::virtual_disk(path).read_only()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.qemu.path(name)
    }

    /// The names of the files that the attacher has made.
    pub fn files_left(&self) -> usize {
        std::fs::read_dir(self.files.path()).unwrap().count()
    }

    /// How many blocks are in use by files of ours that QEMU has open, whatever their name.
    pub fn blocks_in_use(&self) -> u64 {
        open_files_below(self.qemu.pid(), self.files.path())
    }
}

/// What a guest can do.
#[derive(Clone)]
pub struct Guest {
    qtest: Arc<Mutex<BufReader<UnixStream>>>,
    pub monitor: Arc<Mutex<Monitor>>,
}

impl Guest {
    fn say(&self, command: &str) -> String {
        let mut qtest = self.qtest.lock().unwrap();
        writeln!(qtest.get_mut(), "{command}").unwrap();
        let mut answer = String::new();
        qtest.read_line(&mut answer).unwrap();
        let answer = answer.trim_end().strip_prefix("OK").map(str::trim_start);
        answer.unwrap_or_else(|| panic!("{command}")).to_owned()
    }

    fn ask(&self, command: &str, arguments: Value) -> Value {
        self.monitor.lock().unwrap().done(command, arguments)
    }

    /// Where the device is in physical memory, and its size.
    pub fn region(&self, device: u64) -> Option<(u64, u64)> {
        let devices = self.ask("query-memory-devices", json!({}));
        let ours = |found: &&Value| found["data"]["id"] == format!("bm-vpmem-{device}");
        let data = devices.as_array().unwrap().iter().find(ours)?["data"].clone();
        let address = data["memaddr"].as_u64().or(data["addr"].as_u64());
        Some((address.unwrap(), data["size"].as_u64().unwrap()))
    }

    /// What is at an offset of a device.
    pub fn read(&self, device: u64, offset: u64, length: u64) -> Vec<u8> {
        let (start, _) = self.region(device).unwrap();
        let hex = self.say(&format!("read {:#x} {length:#x}", start + offset));
        let digits = hex.strip_prefix("0x").unwrap();
        let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
        (0..digits.len()).step_by(2).map(byte).collect()
    }

    pub fn write(&self, device: u64, offset: u64, byte: u8) {
        let (start, _) = self.region(device).unwrap();
        self.say(&format!("memset {:#x} 0x1000 {byte:#x}", start + offset));
    }

    /// Lets go of what is at a root port. If nothing is there, nothing happens.
    pub fn eject(&self, port: u64) {
        let bus = format!("/machine/peripheral/rp{port}/rp{port}");
        let property = json!({"path": bus, "property": "acpi-pcihp-bsel"});
        let bus = self.ask("qom-get", property).as_u64().unwrap();
        self.say(&format!("outl {SELECT_BUS:#x} {bus:#x}"));
        self.say(&format!("outl {EJECT:#x} 0x1"));
    }

    /// What QEMU has, in order.
    pub fn tables(&self) -> Vec<String> {
        let mut tables = Vec::new();
        for path in ["/objects", "/machine/peripheral"] {
            let members = self.ask("qom-list", json!({"path": path}));
            let members = members.as_array().unwrap().iter();
            tables.extend(members.map(|member| format!("{path} {}", member["name"])));
        }
        let memory = self.ask("query-memory-devices", json!({}));
        let memory = memory.as_array().unwrap().iter();
        tables.extend(memory.map(|device| format!("memory {}", device["data"])));
        tables.sort();
        tables
    }
}

/// The blocks of each file below a directory that a process has open, whether or not it has a name.
fn open_files_below(pid: u32, directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut blocks = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let Ok(target) = std::fs::read_link(&path) else {
            continue;
        };
        if target.starts_with(directory) {
            blocks += std::fs::metadata(&path).unwrap().blocks();
        }
    }
    blocks
}
