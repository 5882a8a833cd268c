//! The guest of a VM, asked through the service.

use std::fmt;

use async_trait::async_trait;
use blockmount::BackendError;
use blockmount_bridge::gcs::messages::Capabilities;
use blockmount_bridge::gcs::{Translated, Translator};
use blockmount_bridge::{BridgeGuest, GuestChannel, Reply, Request};
use blockmount_scsi::Geometry;

use crate::ComputeSystem;
use crate::documents::{GuestConnectionInfo, PropertyQuery};
use crate::vm::{Vm, cannot_ask};

/// What a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestOs {
    /// Linux: all SCSI controllers, and VPMEM.
    Linux,
    /// Windows: SCSI controller 0 only.
    Windows,
}

/// Controller 0 with all its LUNs.
const FIRST_CONTROLLER: Geometry = match Geometry::new(1, Geometry::HYPER_V.luns()) {
    Ok(geometry) => geometry,
    Err(_) => panic!("a part of Hyper-V's geometry is a geometry"),
};

impl GuestOs {
    /// The SCSI addresses that its agent can mount from. (Source: the request to a Windows agent has no field for a controller.)
    pub fn scsi_geometry(self) -> Geometry {
        match self {
            GuestOs::Linux => Geometry::HYPER_V,
            GuestOs::Windows => FIRST_CONTROLLER,
        }
    }

    /// Its name, as the service has it.
    pub fn name(self) -> &'static str {
        match self {
            GuestOs::Linux => "Linux",
            GuestOs::Windows => "Windows",
        }
    }
}

/// The guest of a VM whose agent is connected to the service: a [`Mounter`](blockmount::Mounter), an
/// [`Unplugger`](blockmount::Unplugger) and a [`LayerCombiner`](blockmount::LayerCombiner).
///
/// It asks for the same as a guest at the other end of the bridge, and refuses the same. For an agent that is connected to
/// this process use [`BridgeGuest`] with its connection.
pub type HcsGuest<S> = BridgeGuest<HcsChannel<S>>;

/// The way to a guest through the service.
pub struct HcsChannel<S> {
    vm: Vm<S>,
    capabilities: Capabilities,
    translator: Translator,
}

impl<S> fmt::Debug for HcsChannel<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HcsChannel")
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

impl<S: ComputeSystem> HcsChannel<S> {
    /// Asks the service what the guest can do. The agent must be connected by then.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if the service has no connection to the guest, `Conflict` if it runs another system than `guest`, `Gone` if
    /// the VM has ended, `Other` if the service does not answer.
    pub async fn open(system: S, guest: GuestOs) -> Result<Self, BackendError> {
        let vm = Vm::new(system);
        let query = PropertyQuery::guest_connection();
        let properties = vm.system().properties(&query).await;
        let properties = properties.map_err(|error| cannot_ask("ask for the guest", error))?;
        if properties.has_ended() {
            let message = "cannot ask for the guest: the VM has ended";
            return Err(BackendError::gone(message));
        }
        let found = properties.runtime_os_type;
        if !found.is_empty() && !found.eq_ignore_ascii_case(guest.name()) {
            let found: String = found.chars().take(64).collect();
            let message = format!("the VM runs {found:?}, not {}", guest.name());
            return Err(BackendError::conflict(message));
        }
        let Some(info) = properties.guest_connection_info else {
            return Err(BackendError::unsuitable(
                "the host compute service has no connection to the guest; \
                 ask the guest over a bridge of your own",
            ));
        };
        let GuestConnectionInfo {
            supported_schema_versions,
            guest_defined_capabilities,
            ..
        } = info;
        let capabilities = Capabilities {
            supported_schema_versions,
            runtime_os_type: guest.name().to_owned(),
            guest_defined_capabilities,
            ..Capabilities::default()
        };
        Ok(HcsChannel {
            vm,
            capabilities,
            translator: Translator::default(),
        })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ComputeSystem> GuestChannel for HcsChannel<S> {
    async fn call(&self, request: Request) -> Result<Reply, BackendError> {
        let translated = self.translator.translate(&request, &self.capabilities)?;
        let translated = match translated {
            Ok(translated) => translated,
            Err(reply) => return Ok(reply),
        };
        let outcome = self.ask(&translated).await;
        self.translator.settle(&translated, &outcome);
        outcome
    }
}

impl<S: ComputeSystem> HcsChannel<S> {
    async fn ask(&self, translated: &Translated) -> Result<Reply, BackendError> {
        self.translator.begin(translated);
        for request in translated.requests() {
            match self.vm.ask_guest(request.clone()).await {
                Err(error) if !translated.is_done_anyway(request, &error) => return Err(error),
                _ => {}
            }
        }
        Ok(Reply::Done)
    }
}
