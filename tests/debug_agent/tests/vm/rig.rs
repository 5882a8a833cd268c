//! A VM for one test: restored, reached by its agent and its debug agent, and compared with its first moment at the end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmount::{
    Disk, ErrorKind, Manager, ManagerBuilder, Mount, MountOptions, MountRequest, Recovery, Snapshot,
};
use blockmount_bridge::{BridgeGuest, Deadlines};
use blockmount_qemu::qmp::NONE;
use blockmount_qemu::{
    AEAD_MODULES, Accelerator, AgentChannel, GuestImage, GuestKernel, GuestStream, QemuScsi,
    QemuVpmem, Vm, VmBuilder,
};
use blockmount_scsi::ScsiTransport;
use blockmount_vpmem::{Mode, VpmemTransport};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex, OnceCell};

use blockmount_debug_agent::kit;
use blockmount_debug_agent::kit::images;

/// Where the agent mounts what has no path of the caller's.
pub const MOUNTS: &str = "/run/mounts";
/// How long the guest's kernel may take to come to all events of the hypervisor, on a busy machine.
const REMOVAL: Duration = Duration::from_secs(60);
/// Where the agent finds keys by their files.
pub const KEYS: &str = "/run/keys";
const CONTROLLERS: u8 = 4;
const MEMORY_PORTS: u8 = 4;
/// How large each device of persistent memory is, in bytes.
pub const MEMORY_SIZE: u64 = 64 << 20;
/// Long enough for a busy machine.
const OPENING: Duration = Duration::from_secs(60);

/// How long an agent may take to open its port and to say hello, before it counts as lost.
const ANSWERING: Duration = Duration::from_secs(20);
/// How long a disk may take to appear: with 256 plugged at once under emulation, on a machine with a load of ten.
const APPEARING: Duration = Duration::from_secs(240);

/// Everything that our crates log. What those below them say of each system call would hold up the console for minutes.
const ALL_OF_OURS: &str =
    "blockmount=trace,blockmount_agent=trace,blockmount_bridge=trace,blockmount_linux=trace";

/// The guest's files, read and packed once for all tests of this program.
static IMAGE: OnceCell<GuestImage> = OnceCell::const_new();

async fn image() -> GuestImage {
    IMAGE.get_or_init(|| build_image(&[])).await.clone()
}

/// The guest's files, with further arguments for its agent.
async fn build_image(more: &[&str]) -> GuestImage {
    let mut arguments = Vec::new();
    for root in [MOUNTS, "/run/containers", "/run/gcs"] {
        arguments.extend(["--root".to_owned(), root.to_owned()]);
    }
    let roots = arguments.join("\n");
    let debug_agent = format!("/programs/blockmount-debug-agent\n{roots}\n");
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    for number in 0..CONTROLLERS {
        let address = blockmount_qemu::controller_address(number);
        arguments.extend(["--scsi-controller".to_owned(), format!("pci:{address}")]);
    }
    for number in 0..MEMORY_PORTS {
        let address = blockmount_qemu::memory_port_address(number);
        arguments.extend(["--vpmem".to_owned(), format!("port:{address}")]);
    }
    arguments.extend(["--keys".to_owned(), KEYS.to_owned()]);
    let appearing = APPEARING.as_secs().to_string();
    for timeout in ["--device-timeout", "--format-timeout"] {
        arguments.extend([timeout.to_owned(), appearing.clone()]);
    }
    let kernel = GuestKernel::find().unwrap();
    GuestImage::builder(kernel)
        .program(env!("CARGO_BIN_EXE_agent-under-test"))
        .add_program(env!("CARGO_BIN_EXE_blockmount-debug-agent"))
        .filesystem_tools()
        .encryption_tools()
        .modules_if_there(&AEAD_MODULES)
        .file("/etc/blockmount/agent.args", arguments.join("\n") + "\n")
        .file("/etc/blockmount/programs/debug-agent", debug_agent)
        .build()
        .await
        .unwrap()
}

/// Where the state is that all tests share.
pub fn states() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("states")
}

/// Starts a VM from the state that all tests share.
pub async fn start() -> Vm {
    builder().await.start().await.unwrap()
}

/// A VM that goes on from the state that all tests share.
pub async fn builder() -> VmBuilder {
    machine(image().await).saved_states(states())
}

fn machine(image: GuestImage) -> VmBuilder {
    Vm::builder(image)
        // Whether there is a faster one must make no difference to what is tested.
        .accelerator(Accelerator::Emulation)
        .controllers(CONTROLLERS)
        .persistent_memory(MEMORY_PORTS, u64::from(MEMORY_PORTS) * MEMORY_SIZE)
}

/// A VM with a manager of its disks.
pub struct Rig {
    pub vm: Vm,
    pub scsi: Arc<ScsiTransport<QemuScsi>>,
    /// Used by the manager if the test asks for it.
    pub vpmem: Arc<VpmemTransport<QemuVpmem>>,
    pub guest: BridgeGuest<AgentChannel>,
    pub manager: Manager,
    /// For images, on this machine.
    pub dir: TempDir,
    debug_agent: Mutex<Option<GuestStream>>,
    before: State,
}

/// All that QEMU and the guest's kernel list.
#[derive(Debug, PartialEq, Eq)]
pub struct State(BTreeMap<&'static str, Value>);

impl State {
    /// Without the SCSI disks that the guest's kernel lists. Those that QEMU has stay.
    fn without_guests_disks(&self) -> State {
        let mut state = State(self.0.clone());
        let guest = state.0.get_mut("guest").unwrap();
        guest["scsi_devices"] = json!([]);
        let disks = guest["block_devices"].as_array_mut().unwrap();
        disks.retain(|disk| !disk["scsi_address"].is_string());
        state
    }
}

/// What the manager of a VM is built from.
struct Backends {
    scsi: Arc<ScsiTransport<QemuScsi>>,
    vpmem: Arc<VpmemTransport<QemuVpmem>>,
    guest: BridgeGuest<AgentChannel>,
}

impl Backends {
    async fn of(vm: &Vm, dir: &TempDir, mode: Option<Mode>) -> (Self, ManagerBuilder) {
        let attacher = vm.vpmem(MEMORY_SIZE, dir.path()).unwrap();
        let geometry = attacher.geometry();
        let mode_or_other = mode.unwrap_or(Mode::WholeDevices);
        let vpmem = VpmemTransport::new(attacher, geometry, mode_or_other, &[]);
        let vpmem = Arc::new(vpmem.unwrap());
        let attacher = vm.scsi();
        let geometry = attacher.geometry();
        let scsi = Arc::new(ScsiTransport::new(attacher, geometry, &[]).unwrap());
        // The guest gives up first, and both only where the machine is not just busy.
        let deadlines = Deadlines {
            call: 2 * APPEARING,
            negotiation: ANSWERING,
            ..Deadlines::default()
        };
        let guest = vm
            .guest_within("blockmount.agent", deadlines)
            .await
            .unwrap();
        let mut builder = Manager::builder();
        if mode.is_some() {
            builder = builder.transport(vpmem.clone());
        }
        let builder = builder
            .transport(scsi.clone())
            .unplugger(guest.clone())
            .mounter(guest.clone())
            .combiner(guest.clone())
            .binder(guest.clone())
            .mount_root(MOUNTS);
        (Backends { scsi, vpmem, guest }, builder)
    }
}

impl Rig {
    /// Releases what was added while the agent was killed, and asserts that nothing is left, in doubt or pending.
    pub async fn settle(&self, added: impl IntoIterator<Item = Result<Mount, blockmount::Error>>) {
        for outcome in added {
            match outcome {
                Ok(mount) => {
                    if let Err(doubtful) = mount.release().await {
                        doubtful.retry().await.unwrap();
                    }
                }
                // It may have been done, or the agent was not there.
                Err(error) => assert!(
                    matches!(error.kind(), ErrorKind::Uncertain | ErrorKind::Other),
                    "{error}: {}",
                    error.cause()
                ),
            }
        }
        let drained = self.manager.drain().await;
        assert!(drained.is_clean(), "{drained:?}");
        self.assert_as_at_first().await;
    }

    /// A VM whose disks are all on SCSI.
    pub async fn start() -> Rig {
        Self::start_with(None).await
    }

    /// A VM whose disks are offered to VPMEM first, then to SCSI.
    pub async fn start_with_vpmem(mode: Mode) -> Rig {
        Self::start_with(Some(mode)).await
    }

    /// A VM whose agent logs everything that it can, on the console.
    pub async fn start_logging() -> Rig {
        let image = build_image(&["--log", ALL_OF_OURS]).await;
        let machine = machine(image).saved_states(states());
        Self::start_in(machine.start().await.unwrap(), None).await
    }

    async fn start_with(mode: Option<Mode>) -> Rig {
        Self::start_in(start().await, mode).await
    }

    async fn start_in(vm: Vm, mode: Option<Mode>) -> Rig {
        let dir = kit::temp();
        let (backends, builder) = Backends::of(&vm, &dir, mode).await;
        let mut rig = Self::around(vm, backends, builder.build(), dir).await;
        rig.before = rig.state().await;
        rig
    }

    /// The VM of a rig that goes on in another QEMU, which has its disks, with a manager that is restored; then the first QEMU ends.
    pub async fn go_on_in(self, vm: Vm, snapshot: Snapshot) -> (Rig, Recovery) {
        let (backends, builder) = Backends::of(&vm, &self.dir, None).await;
        let recovery = builder.restore(snapshot, None).await.unwrap();
        self.vm.shut_down().await;
        let manager = recovery.manager().clone();
        let mut rig = Self::around(vm, backends, manager, self.dir).await;
        rig.before = self.before;
        (rig, recovery)
    }

    async fn around(vm: Vm, backends: Backends, manager: Manager, dir: TempDir) -> Rig {
        let debug_agent = vm.connect("blockmount.debug", OPENING).await.unwrap();
        let Backends { scsi, vpmem, guest } = backends;
        Rig {
            vm,
            scsi,
            vpmem,
            guest,
            manager,
            dir,
            debug_agent: Mutex::new(Some(debug_agent)),
            before: State(BTreeMap::new()),
        }
    }

    /// Asks the debug agent, and expects an answer.
    pub async fn ask(&self, question: Value) -> Value {
        let answer = self.ask_and_see(question.clone()).await;
        assert!(answer.get("failed").is_none(), "{question}: {answer}");
        answer
    }

    /// Asks the debug agent, whatever it answers.
    pub async fn ask_and_see(&self, question: Value) -> Value {
        let mut stream = self.debug_agent.lock().await;
        let stream = stream.as_mut().unwrap();
        let exchange = async {
            let bytes = serde_json::to_vec(&question).unwrap();
            stream.write_u32_le(bytes.len() as u32).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            let length = stream.read_u32_le().await.unwrap();
            let mut answer = vec![0; length as usize];
            stream.read_exact(&mut answer).await.unwrap();
            serde_json::from_slice(&answer).unwrap()
        };
        let answered = tokio::time::timeout(Duration::from_secs(300), exchange).await;
        match answered {
            Ok(answer) => answer,
            Err(_) => panic!(
                "the debug agent does not answer {question}\n{}",
                self.condition().await
            ),
        }
    }

    /// What can be seen of a guest that does not answer: its processor and its console.
    async fn condition(&self) -> String {
        let mut seen = String::new();
        for command in [
            "info status",
            "info registers",
            "info registers",
            "info chardev",
        ] {
            let arguments = json!({ "command-line": command });
            let execute = self.vm.qmp().execute("human-monitor-command", arguments);
            let answer: Result<Value, _> = execute.await;
            let text = match &answer {
                Ok(answer) => answer.as_str().unwrap_or_default().to_owned(),
                Err(error) => error.to_string(),
            };
            let lines = text
                .lines()
                .filter(|line| !line.contains("XMM") && !line.contains("FPR"));
            seen += &format!("{command}:\n{}\n", lines.collect::<Vec<_>>().join("\n"));
        }
        seen + &self.vm.console()
    }

    /// Gives the line to the debug agent up, for somebody else to have it.
    pub async fn release_debug_agent(&self) {
        self.debug_agent.lock().await.take();
    }

    /// A new line to the debug agent.
    pub async fn reconnect_debug_agent(&self) {
        let stream = self.vm.connect("blockmount.debug", OPENING).await;
        *self.debug_agent.lock().await = Some(stream.unwrap());
    }

    /// The names below a directory of the guest, and the digests of files.
    pub async fn tree(&self, path: &Path) -> BTreeMap<String, Value> {
        let answer = self.ask(json!({ "tree": { "path": path } })).await;
        let nodes = answer["tree"]["nodes"].as_array().unwrap();
        let node = |node: &Value| (node[0].as_str().unwrap().to_owned(), node[1].clone());
        nodes.iter().map(node).collect()
    }

    /// Asserts that a file of the guest has this content.
    pub async fn assert_content(&self, path: &Path, text: &str) {
        use sha2::{Digest, Sha256};
        let tree = self.tree(path.parent().unwrap()).await;
        let name = path.file_name().unwrap().to_str().unwrap();
        let digest = Sha256::digest(text);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(tree.get(name), Some(&json!({ "file": digest })), "{path:?}");
    }

    pub async fn tables(&self) -> Value {
        self.ask(json!("tables")).await["tables"].clone()
    }

    pub async fn state(&self) -> State {
        let mut state = BTreeMap::from([("guest", self.tables().await)]);
        for command in ["query-block", "query-named-block-nodes"] {
            let answer = self.vm.qmp().execute(command, NONE).await.unwrap();
            state.insert(command, sorted(&answer));
        }
        let path = json!({ "path": "/machine/peripheral" });
        let answer = self.vm.qmp().execute("qom-list", path).await.unwrap();
        // Each question comes over a port, which is none of the disks.
        let devices = answer.as_array().unwrap().iter();
        let disks = devices.filter(|device| device["type"] != "child<virtserialport>");
        state.insert("qom-list", sorted(&disks.cloned().collect()));
        State(state)
    }

    /// From now on, what there is now counts as there at the start: a packed device stays as long as its VM.
    pub async fn begin_here(&mut self) {
        self.before = self.state().await;
    }

    /// Asserts that everything is as it was at the start. After a burst of hot-plugs the guest's kernel looks for disks, finds those
    /// anew that it has no more and QEMU has still, and removes them when it comes to the events of their end. QEMU is asked as well:
    /// no disk that it has is waited for.
    pub async fn assert_as_at_first(&self) {
        let deadline = Instant::now() + REMOVAL;
        let before = self.before.without_guests_disks();
        let mut state = self.state().await;
        while state != self.before
            && state.without_guests_disks() == before
            && Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
            state = self.state().await;
        }
        assert_eq!(state, self.before);
    }

    /// Ends the VM, and asserts that nothing was left in it and nothing is left of it.
    pub async fn end(self) {
        let drained = self.manager.drain().await;
        assert!(drained.is_clean(), "{drained:?}");
        self.assert_as_at_first().await;
        self.end_as_it_is().await;
    }

    /// Ends the VM, whatever is in it, and asserts that nothing is left of it.
    pub async fn end_as_it_is(self) {
        let directory = self.vm.directory().to_owned();
        self.vm.shut_down().await;
        assert!(!self.vm.is_running());
        drop(self);
        // The last clone may be with a task that is about to end.
        kit::eventually("the removal of the VM's files", || !directory.exists());
    }

    /// A path for an image.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A read-only disk with an erofs that has one file, `id`, with this text.
    pub fn layer(&self, text: &str) -> Disk {
        let path = self.path(&format!("{text}.erofs"));
        images::image("erofs", &path, &[("id", text)]);
        Disk::virtual_disk(path).read_only()
    }

    /// An empty ext4 to write to.
    pub fn scratch(&self, name: &str) -> Disk {
        let path = self.path(name);
        images::image("ext4", &path, &[]);
        Disk::virtual_disk(path)
    }
}

/// QEMU lists things in any order.
fn sorted(list: &Value) -> Value {
    let mut list = list.as_array().unwrap().clone();
    list.sort_by_key(Value::to_string);
    list.into()
}

/// A read-only mount, wherever the manager likes.
pub fn read_only() -> MountRequest {
    MountRequest::new(MountOptions::read_only())
}
