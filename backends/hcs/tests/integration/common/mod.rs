//! A VM of Hyper-V in memory: a service that keeps disks and passes requests on to an agent, which is
//! a guest of ours over a fake VM.
#![allow(dead_code, clippy::unwrap_used)] // each test file uses a part; a panic is a failure message

#[cfg(windows)]
pub(crate) mod stand_in;

use blockmount::testing::AttachIdentified as _;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::VmStep;
use blockmount::testing::conformance::{Fault, Faults, Snapshot};
use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, Disk, LayerCombiner, MountOptions, Mounter,
    Overlay, Presence, Transport, Unplugger, Usage,
};
use blockmount_bridge::gcs::messages::{ModificationRequest, RequestType, Resource};
use blockmount_bridge::gcs::{GuestConnection, GuestServer, Hresult};
use blockmount_hcs::documents::{
    DiskAddress, GuestConnectionInfo, ModifySettingRequest, Properties, PropertyQuery,
    ResourcePath, Settings,
};
use blockmount_hcs::{ComputeSystem, GuestOs, HcsError};
use blockmount_scsi::ScsiAddress;
use blockmount_vpmem::VpmemAddress;
use tempfile::TempDir;
use tokio::sync::Semaphore;

/// Longer than anything here may take.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A deadline that a test waits for, and that no other call misses on a machine that is busy.
pub(crate) const SHORT: Duration = Duration::from_secs(4);

/// How a call ends that does not end as it should.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Answer {
    /// Nothing happens, and this is the answer.
    Fail(Hresult),
    /// It happens, and this is the answer.
    DoneButFails(Hresult),
    /// There is never an answer; it has happened or not.
    Silent { happens: bool },
    /// It waits for `Model::proceed`, then happens.
    Wait,
}

/// What the service answers.
#[derive(Debug)]
pub(crate) enum Reply {
    Done,
    Fails(HcsError),
    Never,
}

#[derive(Clone)]
pub(crate) struct Model(Arc<Shared>);

struct Shared {
    devices: Devices,
    guest_os: GuestOs,
    /// None: another process has the connection to the guest.
    agent: Option<GuestConnection>,
    state: Mutex<State>,
    entered: Semaphore,
    proceed: Semaphore,
}

#[derive(Default)]
struct State {
    documents: Vec<String>,
    next: VecDeque<Answer>,
    next_properties: VecDeque<Answer>,
    asked: usize,
    windows_mounts: BTreeMap<String, i32>,
    ended: bool,
    ends_when_asked: bool,
}

/// How many [ways](Model::ways) there are.
pub(crate) const WAYS: usize = if cfg!(windows) { 2 } else { 1 };

/// What is at which place, and the fake VM that has it.
#[derive(Clone, Default)]
struct Devices {
    vm: FakeVm,
    taken: Arc<Mutex<BTreeMap<String, (Disk, DeviceLocator)>>>,
}

impl Model {
    pub(crate) async fn linux() -> Self {
        Self::new(GuestOs::Linux).await
    }

    pub(crate) async fn new(guest_os: GuestOs) -> Self {
        let devices = Devices::default();
        let (host_end, guest_end) = tokio::io::duplex(1 << 16);
        let server = GuestServer::new(Agent(devices.clone()));
        tokio::spawn(async move { server.serve(guest_end).await });
        let agent = GuestConnection::connect(host_end).await.unwrap();
        Self::with_agent(guest_os, devices, Some(agent))
    }

    /// A VM whose agent is connected to somebody else.
    pub(crate) fn without_agent() -> Self {
        Self::with_agent(GuestOs::Linux, Devices::default(), None)
    }

    fn with_agent(guest_os: GuestOs, devices: Devices, agent: Option<GuestConnection>) -> Self {
        Model(Arc::new(Shared {
            devices,
            guest_os,
            agent,
            state: Mutex::default(),
            entered: Semaphore::new(0),
            proceed: Semaphore::new(0),
        }))
    }

    /// The ways to it: as it is, and on Windows through the calls of the service too.
    pub(crate) async fn ways(&self) -> Vec<Arc<dyn ComputeSystem>> {
        self.ways_within(LONG).await
    }

    /// The same, where a call may be silent: it fails after `timeout`.
    pub(crate) async fn ways_within(&self, timeout: Duration) -> Vec<Arc<dyn ComputeSystem>> {
        let direct: Arc<dyn ComputeSystem> = Arc::new(self.clone());
        #[cfg(windows)]
        let called = [Arc::new(stand_in::open(self, timeout).await) as Arc<dyn ComputeSystem>];
        #[cfg(not(windows))]
        let called: [Arc<dyn ComputeSystem>; 0] = {
            let _ = timeout;
            []
        };
        std::iter::once(direct).chain(called).collect()
    }

    pub(crate) fn next(&self, answer: Answer) {
        self.state().next.push_back(answer);
    }

    pub(crate) fn next_properties(&self, answer: Answer) {
        self.state().next_properties.push_back(answer);
    }

    /// Takes the documents that have come since the last time.
    pub(crate) fn documents(&self) -> Vec<String> {
        std::mem::take(&mut self.state().documents)
    }

    /// How often it was asked for properties.
    pub(crate) fn asked(&self) -> usize {
        self.state().asked
    }

    /// The VM ends, and all in it.
    pub(crate) fn end(&self) {
        self.state().ended = true;
        self.0.devices.vm.kill();
        self.0.devices.taken().clear();
    }

    /// It has ended by the time somebody asks.
    pub(crate) fn end_when_asked(&self) {
        self.state().ends_when_asked = true;
    }

    pub(crate) fn left(&self) -> Vec<String> {
        let taken = self.0.devices.taken().clone();
        let devices = taken
            .into_iter()
            .map(|(path, (disk, _))| format!("{path} {disk}"));
        let mounts = self.state().windows_mounts.clone().into_iter();
        let mounts = mounts.map(|(path, lun)| format!("{path} mounts LUN {lun}"));
        devices
            .chain(mounts)
            .chain(self.0.devices.vm.left())
            .collect()
    }

    pub(crate) fn snapshot(&self) -> impl Snapshot + use<> {
        let model = self.clone();
        move || model.left()
    }

    /// Until one more call waits.
    pub(crate) async fn entered(&self) {
        self.0.entered.acquire().await.unwrap().forget();
    }

    /// Lets one call go on that waits.
    pub(crate) fn proceed(&self) {
        self.0.proceed.add_permits(1);
    }

    /// The guest, to make its calls fail.
    pub(crate) fn fake_vm(&self) -> FakeVm {
        self.0.devices.vm.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// What the service does with a document.
    pub(crate) async fn receive(&self, document: &str) -> Reply {
        let request = match ModifySettingRequest::from_json(document) {
            Ok(request) => request,
            Err(error) => return Reply::Fails(failed(Hresult::INVALID_JSON, &error.to_string())),
        };
        let answer = {
            let mut state = self.state();
            state.documents.push(document.to_owned());
            state.next.pop_front()
        };
        match answer {
            Some(Answer::Fail(result)) => return Reply::Fails(failed(result, "as told")),
            Some(Answer::Silent { happens: false }) => return Reply::Never,
            Some(Answer::Wait) => {
                self.0.entered.add_permits(1);
                self.0.proceed.acquire().await.unwrap().forget();
            }
            _ => {}
        }
        let ended = self.state().ended;
        let done = match ended {
            true => Err(failed(Hresult::SYSTEM_ALREADY_STOPPED, "the VM has ended")),
            false => self.act(request).await,
        };
        match (answer, done) {
            (Some(Answer::DoneButFails(result)), Ok(())) => {
                Reply::Fails(failed(result, "done, but told to fail"))
            }
            (Some(Answer::Silent { .. }), Ok(())) => Reply::Never,
            (_, Ok(())) => Reply::Done,
            (_, Err(error)) => Reply::Fails(error),
        }
    }

    /// What the service says about the VM.
    pub(crate) fn describe(&self, query: &PropertyQuery) -> Result<Properties, Reply> {
        let ends = std::mem::take(&mut self.state().ends_when_asked);
        if ends {
            self.end();
        }
        let (answer, stopped) = {
            let mut state = self.state();
            state.asked += 1;
            (state.next_properties.pop_front(), state.ended)
        };
        match answer {
            Some(Answer::Fail(result)) => return Err(Reply::Fails(failed(result, "as told"))),
            Some(_) => return Err(Reply::Never),
            None => {}
        }
        let wants_guest = *query == PropertyQuery::guest_connection();
        let agent = self.0.agent.as_ref().filter(|_| wants_guest && !stopped);
        let info = agent.map(|agent| GuestConnectionInfo {
            supported_schema_versions: agent.capabilities().supported_schema_versions.clone(),
            protocol_version: 4,
            guest_defined_capabilities: match self.0.guest_os {
                GuestOs::Windows => Default::default(),
                _ => agent.capabilities().guest_defined_capabilities,
            },
        });
        Ok(Properties {
            id: "model".to_owned(),
            runtime_os_type: self.0.guest_os.name().to_owned(),
            state: if stopped { "Stopped" } else { "Running" }.to_owned(),
            stopped,
            guest_connection_info: info,
        })
    }

    async fn act(&self, request: ModifySettingRequest) -> Result<(), HcsError> {
        if let Some(request) = request.guest_request {
            return self.guest(request).await;
        }
        let path = request.resource_path.unwrap().to_string();
        match (request.request_type, request.settings) {
            (Some(RequestType::Add), Some(settings)) => self.0.devices.put(path, settings).await,
            (Some(RequestType::Remove), None) => self.0.devices.take(&path).await,
            _ => Err(failed(Hresult::INVALID_ARGUMENT, "neither add nor remove")),
        }
    }

    async fn guest(&self, request: ModificationRequest) -> Result<(), HcsError> {
        let windows = |lun: &i32, path: &String| (path.clone(), *lun);
        match (&request.resource, request.request_type) {
            (Resource::WindowsDisk(disk) | Resource::WindowsScratch(disk), what) => {
                let (path, lun) = windows(&disk.lun, &disk.container_path);
                let mounts = &mut self.state().windows_mounts;
                match what {
                    RequestType::Add => drop(mounts.insert(path, lun)),
                    _ => assert_eq!(mounts.remove(&path), Some(lun), "{path}"),
                }
                Ok(())
            }
            _ => {
                let agent = self.0.agent.as_ref().expect("a guest that is asked");
                let outcome = agent.modify(request).await;
                outcome.map_err(|error| failed(error.kind().into(), error.message()))
            }
        }
    }
}

/// The faults of the service. It can end only where there is one [way](Model::ways) to it.
#[async_trait]
impl Faults for Model {
    async fn inject(&self, _: VmStep, fault: Fault) -> bool {
        match fault {
            Fault::Uncertain { happens } => self.next(Answer::Silent { happens }),
            Fault::Busy => self.next(Answer::Fail(Hresult::BUSY)),
            Fault::Gone if WAYS == 1 => self.end(),
            _ => return false,
        }
        true
    }

    async fn clear(&self) {
        self.state().next.clear();
    }
}

/// An error with its document, as the service writes it.
pub(crate) fn failed(result: Hresult, message: &str) -> HcsError {
    HcsError::failed(result, Some(&error_document(result, message)))
}

pub(crate) fn error_document(result: Hresult, message: &str) -> String {
    serde_json::json!({"Error": result, "ErrorMessage": message, "Attribution": []}).to_string()
}

/// The model as a VM, without the calls in between.
#[async_trait]
impl ComputeSystem for Model {
    async fn modify(&self, request: &ModifySettingRequest) -> Result<(), HcsError> {
        let document = request.to_json();
        assert_eq!(
            &ModifySettingRequest::from_json(&document).unwrap(),
            request,
            "{document}"
        );
        match self.receive(&document).await {
            Reply::Done => Ok(()),
            Reply::Fails(error) => Err(error),
            Reply::Never => Err(HcsError::TimedOut(SHORT)),
        }
    }

    async fn properties(&self, query: &PropertyQuery) -> Result<Properties, HcsError> {
        self.describe(query).map_err(|reply| match reply {
            Reply::Fails(error) => error,
            _ => HcsError::TimedOut(SHORT),
        })
    }
}

impl Devices {
    fn taken(&self) -> MutexGuard<'_, BTreeMap<String, (Disk, DeviceLocator)>> {
        self.taken.lock().unwrap()
    }

    async fn put(&self, path: String, settings: Settings) -> Result<(), HcsError> {
        let (host_path, is_file) = match settings {
            Settings::Attachment(disk) => (disk.path, disk.kind == "VirtualDisk"),
            Settings::VpmemDevice(device) => (device.host_path, true),
            Settings::VpmemMapping(mapping) => (mapping.host_path, true),
        };
        if is_file && !Path::new(&host_path).is_file() {
            return Err(failed(Hresult::FILE_NOT_FOUND, &host_path));
        }
        if self.taken().contains_key(&path) {
            return Err(failed(Hresult::ALREADY_EXISTS, &path));
        }
        let disk = Disk::virtual_disk(host_path);
        let locator = self
            .vm
            .attach_identified(&disk)
            .await
            .map_err(|error| failed(Hresult::SHARING_VIOLATION, error.message()))?;
        self.taken().insert(path, (disk, locator));
        Ok(())
    }

    async fn take(&self, path: &str) -> Result<(), HcsError> {
        let Some((disk, _)) = self.taken().get(path).cloned() else {
            return Err(failed(Hresult::NOT_FOUND, path));
        };
        self.vm.detach(&disk).await.unwrap();
        self.taken().remove(path);
        Ok(())
    }

    /// The device of the fake VM that is at an address.
    fn device(&self, locator: &DeviceLocator) -> Result<DeviceLocator, BackendError> {
        let address = match locator.transport() {
            blockmount_vpmem::SCHEME => {
                let VpmemAddress { device, range } = locator.try_into()?;
                match range {
                    None => DiskAddress::VpmemDevice(device),
                    Some(range) => DiskAddress::VpmemMapping {
                        device,
                        offset: range.offset(),
                    },
                }
            }
            _ => DiskAddress::Scsi(ScsiAddress::try_from(locator)?),
        };
        let path = ResourcePath::try_from(address)?.to_string();
        let absent = || DeviceLocator::new("fake", 4_000_000).unwrap();
        let device = self.taken().get(&path).map(|(_, device)| device.clone());
        Ok(device.unwrap_or_else(absent))
    }
}

/// The agent in the guest.
struct Agent(Devices);

#[async_trait]
impl Unplugger for Agent {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.0.vm.unplug(&self.0.device(device)?).await
    }
}

#[async_trait]
impl Mounter for Agent {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        self.0
            .vm
            .mount(&self.0.device(device)?, target, options)
            .await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.0.vm.unmount(target).await
    }

    async fn usage(&self, _: &Path) -> Result<Usage, BackendError> {
        Err(BackendError::unsuitable("GCS has no message for it"))
    }

    async fn trim(&self, _: &Path) -> Result<u64, BackendError> {
        Err(BackendError::unsuitable("GCS has no message for it"))
    }

    async fn grow(&self, _: &Path, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable("GCS has no message for it"))
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}

#[async_trait]
impl LayerCombiner for Agent {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.0.vm.combine(overlay).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.0.vm.separate(target).await
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        LayerCombiner::adopt(&self.0.vm, overlay).await
    }
}

#[async_trait]
impl Binder for Agent {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        self.0.vm.bind(bind).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        self.0.vm.unbind(target).await
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        Binder::adopt(&self.0.vm, bind).await
    }
}

/// A directory with images of disks.
pub(crate) struct Images(TempDir);

impl Images {
    pub(crate) fn new() -> Self {
        Images(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A disk with a file. A backslash in the name separates directories on Windows, and is part of the file's name elsewhere.
    pub(crate) fn disk(&self, name: &str) -> Disk {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, name).unwrap();
        Disk::virtual_disk(path)
    }

    /// A document with the path of the directory, and what joins a name to it, for `IMAGES\\`.
    pub(crate) fn insert(&self, document: &str) -> String {
        let directory = self.path("").to_str().unwrap().replace('\\', r"\\");
        document.replace(r"IMAGES\\", &directory)
    }

    pub(crate) fn disks(&self, count: usize) -> Vec<Disk> {
        (0..count)
            .map(|number| self.disk(&format!("{number}.vhdx")))
            .collect()
    }
}

pub(crate) fn address(text: &str) -> ScsiAddress {
    text.parse().unwrap()
}
