//! Starting a VM: by booting its guest, or from a saved state.

use std::error::Error as StdError;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::error::VmError;
use super::hardware::{Hardware, KERNEL_LINE, MAX_CONTROLLERS, MAX_MEMORY_PORTS};
use super::image::{GuestImage, hexadecimal};
use super::saved::States;
use super::vm::Vm;

/// How long a hypervisor in hardware may take until the guest answers; it takes a second where it works.
const KVM_TIMEOUT: Duration = Duration::from_secs(15);

/// Whether this process has seen that no guest comes up on KVM, so that it is tried once.
static NO_KVM: AtomicBool = AtomicBool::new(false);

const KVM: &str = "kvm";
const EMULATION: &str = "tcg,thread=multi";

/// How long saving a state may take. It is a copy of the guest's memory, without the pages that are empty.
const SAVING: Duration = Duration::from_secs(60);

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Accelerator {
    /// KVM where a guest really comes up on it, else emulation. A `/dev/kvm` that opens proves nothing:
    /// on some machines every guest dies on it. So it is tried, for at most 15 seconds.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation (QEMU's TCG), which works everywhere.
    Emulation,
}

/// Configures a [`Vm`].
#[derive(Debug, Clone)]
pub struct VmBuilder {
    pub(super) image: GuestImage,
    pub(super) qemu: PathBuf,
    accelerator: Accelerator,
    pub(super) hardware: Hardware,
    pub(super) directory: Option<PathBuf>,
    states: Option<States>,
    pub(super) agent: String,
    pub(super) timeout: Duration,
    pub(super) detached: bool,
}

impl Vm {
    /// Configures a VM that boots an image.
    pub fn builder(image: GuestImage) -> VmBuilder {
        VmBuilder::new(image)
    }
}

impl VmBuilder {
    fn new(image: GuestImage) -> Self {
        VmBuilder {
            image,
            qemu: "qemu-system-x86_64".into(),
            accelerator: Accelerator::Auto,
            hardware: Hardware::default(),
            directory: None,
            states: None,
            agent: "blockmount.agent".to_owned(),
            timeout: Duration::from_secs(120),
            detached: false,
        }
    }

    /// The program to start; `qemu-system-x86_64` of the search path by default.
    #[must_use]
    pub fn qemu(mut self, program: impl Into<PathBuf>) -> Self {
        self.qemu = program.into();
        self
    }

    /// What runs the guest's instructions.
    #[must_use]
    pub fn accelerator(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = accelerator;
        self
    }

    /// The guest's memory in MiB; 512 by default.
    #[must_use]
    pub fn memory(mut self, mebibytes: u32) -> Self {
        self.hardware.memory = mebibytes;
        self
    }

    /// How many SCSI controllers of 256 LUNs each it has, from 1 to [`MAX_CONTROLLERS`]; 4 by default.
    #[must_use]
    pub fn controllers(mut self, number: u8) -> Self {
        self.hardware.controllers = number;
        self
    }

    /// How many devices of persistent memory can be plugged, at most [`MAX_MEMORY_PORTS`], and how many bytes they may
    /// have together. None by default.
    #[must_use]
    pub fn persistent_memory(mut self, devices: u8, bytes: u64) -> Self {
        self.hardware.memory_ports = devices;
        // The room is divided at multiples of a GiB, so that each device may need one more.
        let gibibytes = bytes.div_ceil(1 << 30) + 2 * u64::from(devices);
        self.hardware.memory_room = gibibytes << 10;
        self
    }

    /// The machine type: `q35`, which is the default, or a version of it such as `pc-q35-7.1`.
    #[must_use]
    pub fn machine(mut self, machine: impl Into<String>) -> Self {
        self.hardware.machine = machine.into();
        self
    }

    /// Adds a device, as QEMU's option `-device` takes it: `virtio-rng-pci`. The slots of the PCI bus from 0x18 on are
    /// free.
    #[must_use]
    pub fn device(self, device: impl Into<String>) -> Self {
        self.arguments(["-device".to_owned(), device.into()])
    }

    /// Adds words to QEMU's command line. A [saved state](Self::saved_states) depends on them, but not on the content
    /// of files that they name.
    #[must_use]
    pub fn arguments<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.hardware.more.extend(words.into_iter().map(Into::into));
        self
    }

    /// Where the VM's directory is made; the system's directory for temporary files by default. Its path has to be
    /// short, because it is the place of sockets: at most 80 bytes.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Goes on from a saved state in this directory, and makes it first if it is not there. By default every VM
    /// boots. The directory must be nobody else's to write to; states that were not used for two weeks are removed. Where no
    /// state can be read or saved, the guest boots, and a warning is logged.
    #[must_use]
    pub fn saved_states(mut self, directory: impl AsRef<Path>) -> Self {
        self.states = Some(States::in_directory(directory.as_ref()));
        self
    }

    /// The name of the virtio-serial port by which it is known that the guest is up: its program opens such a
    /// port. `blockmount.agent` by default.
    #[must_use]
    pub fn agent(mut self, port: impl Into<String>) -> Self {
        self.agent = port.into();
        self
    }

    /// How long the guest may take until its program opens a port; 120 seconds by default, of which emulation on a
    /// busy machine takes five.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Makes a VM that can live on when this process ends ([`Vm::outlive`]), for another to reach it again by its directory
    /// ([`Vm::reattach`]), which is not removed with it.
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.detached = true;
        self
    }

    /// Starts the VM, and returns when its guest is up.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be started or ends, or the guest does not come up in time. Nothing is left then.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped, but for a state that is being saved.
    pub async fn start(self) -> Result<Vm, VmError> {
        self.check()?;
        if self.accelerator == Accelerator::Kvm {
            return self.start_on(KVM, self.timeout).await;
        }
        if self.accelerator == Accelerator::Auto && self.may_have_kvm() {
            match self.start_on(KVM, KVM_TIMEOUT.min(self.timeout)).await {
                Err(error) if error.was_cut_off() => return Err(error),
                Err(error) => tracing::info!(%error, "KVM does not work; going on with emulation"),
                started => return started,
            }
            NO_KVM.store(true, Ordering::Relaxed);
            self.states.iter().for_each(States::note_no_kvm);
        }
        self.start_on(EMULATION, self.timeout).await
    }

    /// Whether KVM is there, and is not known to be of no use.
    fn may_have_kvm(&self) -> bool {
        // What one directory remembers holds for the machine, so for VMs without saved states as well.
        if self.states.as_ref().is_some_and(States::knows_no_kvm) {
            NO_KVM.store(true, Ordering::Relaxed);
        }
        let opens = || {
            File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_ok()
        };
        !NO_KVM.load(Ordering::Relaxed) && opens()
    }

    /// What it would be started with, if no start has to show whether KVM works.
    pub(super) fn known_accelerator(&self) -> &'static str {
        match self.accelerator {
            Accelerator::Kvm => KVM,
            Accelerator::Auto if self.may_have_kvm() => KVM,
            _ => EMULATION,
        }
    }

    pub(super) fn check(&self) -> Result<(), VmError> {
        let Hardware {
            controllers,
            memory_ports,
            ..
        } = self.hardware;
        if !(1..=MAX_CONTROLLERS).contains(&controllers) {
            return Err(VmError::new(format!(
                "a VM cannot have {controllers} SCSI controllers here, only 1 to {MAX_CONTROLLERS}"
            )));
        }
        if memory_ports > MAX_MEMORY_PORTS {
            return Err(VmError::new(format!(
                "a VM cannot have {memory_ports} ports for persistent memory here, at most {MAX_MEMORY_PORTS}"
            )));
        }
        Ok(())
    }

    async fn start_on(&self, accelerator: &str, timeout: Duration) -> Result<Vm, VmError> {
        let Some(states) = &self.states else {
            return self.launch(accelerator, None, timeout).await;
        };
        match self.start_saved(states, accelerator, timeout).await {
            Ok(vm) => Ok(vm),
            Err(NotStarted::Vm(error)) => Err(error),
            Err(NotStarted::States(error)) => {
                let error: &(dyn StdError + 'static) = &error;
                tracing::warn!(error, "the guest boots, since no saved state can be used");
                self.launch(accelerator, None, timeout).await
            }
        }
    }

    /// Goes on from a saved state, which is made if there is none.
    async fn start_saved(
        &self,
        states: &States,
        accelerator: &str,
        timeout: Duration,
    ) -> Result<Vm, NotStarted> {
        let key = self.key(accelerator).await?;
        if let Some(state) = open(states, &key).await.map_err(NotStarted::States)? {
            match self.launch(accelerator, Some(state), timeout).await {
                Err(error) if error.was_cut_off() => return Err(error.into()),
                Err(error) => {
                    let error: &(dyn StdError + 'static) = &error;
                    tracing::warn!(error, "a saved state does not work, and is made anew");
                    states.forget(&key);
                }
                Ok(restored) => return Ok(restored),
            }
        }
        self.save(accelerator, states, &key, timeout).await?;
        let vanished = || VmError::new("the state that was just saved has vanished");
        let state = open(states, &key).await;
        let state = state.and_then(|state| state.ok_or_else(vanished));
        let state = state.map_err(NotStarted::States)?;
        Ok(self.launch(accelerator, Some(state), timeout).await?)
    }

    /// A digest of all that a state depends on.
    async fn key(&self, accelerator: &str) -> Result<String, VmError> {
        let mut command = tokio::process::Command::new(&self.qemu);
        let output = command.arg("--version").kill_on_drop(true).output();
        let output = tokio::time::timeout(Duration::from_secs(60), output)
            .await
            .map_err(|elapsed| self.no_qemu(elapsed))?
            .map_err(|error| self.no_qemu(error))?;
        let words = self.hardware.arguments(accelerator).join(" ");
        let digest = Sha256::new()
            .chain_update(&output.stdout)
            .chain_update(words)
            .chain_update(KERNEL_LINE)
            .chain_update(self.image.digest());
        Ok(hexadecimal(&digest.finalize()))
    }

    pub(super) fn no_qemu(
        &self,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> VmError {
        let name = self.qemu.display();
        VmError::new(format!("cannot run {name}; is QEMU for x86-64 installed?")).because(error)
    }

    /// Boots a guest and saves its state, unless another process has just done so.
    async fn save(
        &self,
        accelerator: &str,
        states: &States,
        key: &str,
        timeout: Duration,
    ) -> Result<(), NotStarted> {
        let waiting = states.clone();
        let making = tokio::task::spawn_blocking(move || waiting.lock());
        let lost = |error| VmError::new("waiting for a saved state was lost").because(error);
        let late = || VmError::new("another process makes the saved state, and takes too long");
        // The other one boots a guest with the same timeout, and then saves it.
        let making = tokio::time::timeout(2 * timeout, making)
            .await
            .map_err(|elapsed| late().because(elapsed))
            .and_then(|made| made.map_err(lost)?)
            .map_err(NotStarted::States)?;
        if let Ok(Some(_)) = open(states, key).await {
            return Ok(());
        }
        let maker = VmBuilder {
            detached: false,
            ..self.clone()
        };
        let vm = maker.launch(accelerator, None, timeout).await?;
        let saved = self.write_state(&vm, &states.draft()).await;
        vm.shut_down().await;
        let published = saved.and_then(|()| states.publish(&making, key));
        published.map_err(|error| {
            states.forget_draft();
            NotStarted::States(error)
        })
    }

    async fn write_state(&self, vm: &Vm, file: &Path) -> Result<(), VmError> {
        // A port is no part of what the next VM starts with.
        vm.ports().settled().await?;
        let saved = vm.qmp().migrate_to(file, SAVING).await;
        saved
            .map(drop)
            .map_err(|error| VmError::new("cannot save the state of a VM").because(error))
    }
}

/// Why a VM has not gone on from a saved state.
enum NotStarted {
    /// It does not start at all.
    Vm(VmError),
    /// The states cannot be used. They only save time.
    States(VmError),
}

impl From<VmError> for NotStarted {
    fn from(error: VmError) -> Self {
        NotStarted::Vm(error)
    }
}

async fn open(states: &States, key: &str) -> Result<Option<File>, VmError> {
    let (states, key) = (states.clone(), key.to_owned());
    let opened = tokio::task::spawn_blocking(move || states.open(&key)).await;
    opened.map_err(|error| VmError::new("opening a saved state was lost").because(error))?
}
