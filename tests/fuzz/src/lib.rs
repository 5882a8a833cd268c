//! What each fuzz target does with its bytes. The targets in `fuzz/` call these, and so do the tests here.
//!
//! | target | whose bytes |
//! |---|---|
//! | `probe` | a filesystem image's, read by whoever mounts it |
//! | `verity_superblock` | an image's, read by whoever seals or verifies it |
//! | `luks_header` | an image's, read by whoever opens a volume of LUKS2, in the words of `cryptsetup` |
//! | `qcow2` | an image's header, read by the host |
//! | `journal_record` | a file's in `/run`, read by an agent that was started again |
//! | `mountinfo`, `uevent` | the kernel's, with names in them that users chose |
//! | `bridge_server`, `gcs_server` | a host's, read by the guest's agent |
//! | `bridge_host`, `gcs_host` | a guest's, read by the host |
//! | `qmp` | a monitor's, read by the host |
//! | `hcs_documents` | the Host Compute Service's |
//! | `mount_options`, `names` | text of requests: options, locators, addresses |
//!
//! No input may panic, overflow, or keep a target busy beyond its own length. Where something is read, it must also be written back and
//! read as the same.

// To panic is how a target says what it has found.
#![allow(clippy::missing_panics_doc)]

use std::io::Cursor;
use std::time::Duration;

use blockmount::testing::FakeVm;
use blockmount::{DeviceLocator, MountOptions, Overlay, PciAddress};
use tokio::io::{AsyncWriteExt as _, DuplexStream};

/// As much as a peer may have under way before it reads.
const LINE: usize = 1 << 20;
/// Far longer than any of these inputs takes, and no input may need it.
const DEADLINE: Duration = Duration::from_secs(20);

/// Runs a peer against bytes, after which the line ends.
fn against<T, F: Future<Output = T>>(bytes: &[u8], peer: impl FnOnce(DuplexStream) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime of one thread can be made");
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(LINE);
        let sent = async {
            // The peer may hang up before it has read everything.
            let _ = theirs.write_all(bytes).await;
            let _ = theirs.shutdown().await;
            let mut discarded = tokio::io::sink();
            let _ = tokio::io::copy(&mut theirs, &mut discarded).await;
        };
        let both = async { tokio::join!(peer(ours), sent) };
        tokio::time::timeout(DEADLINE, both)
            .await
            .expect("no input keeps a peer busy");
    });
}

/// A host that sends these bytes to an agent.
pub fn bridge_server(bytes: &[u8]) {
    let vm = FakeVm::new();
    against(bytes, async |line| {
        blockmount_bridge::GuestServer::new(vm)
            .serve(line)
            .await
            .ok()
    });
}

/// An agent that answers its host with these bytes.
pub fn bridge_host(bytes: &[u8]) {
    use blockmount_bridge::{BridgeGuest, GuestConnection};
    against(bytes, async |line| {
        if let Ok(connection) = GuestConnection::connect(line).await {
            unplug(BridgeGuest::new(connection)).await;
        }
    });
}

/// A Hyper-V host that sends these bytes to an agent.
pub fn gcs_server(bytes: &[u8]) {
    let vm = FakeVm::new();
    against(bytes, async |line| {
        blockmount_bridge::gcs::GuestServer::new(vm)
            .serve(line)
            .await
            .ok()
    });
}

/// A Hyper-V guest that answers its host with these bytes.
pub fn gcs_host(bytes: &[u8]) {
    use blockmount_bridge::BridgeGuest;
    use blockmount_bridge::gcs::GuestConnection;
    against(bytes, async |line| {
        if let Ok(connection) = GuestConnection::connect(line).await {
            unplug(BridgeGuest::new(connection)).await;
        }
    });
}

/// One request, whose answer is among the bytes or never comes.
async fn unplug(guest: impl blockmount::Unplugger) {
    let device: DeviceLocator = "scsi:0/3".parse().expect("it is a locator");
    let _ = guest.unplug(&device).await;
}

/// A monitor that answers with these bytes.
pub fn qmp(bytes: &[u8]) {
    against(bytes, async |line| {
        if let Ok(monitor) = blockmount_qemu::Qmp::connect(line).await {
            monitor.is_closed();
        }
    });
}

/// An image.
pub fn probe(bytes: &[u8]) {
    let found = blockmount_linux::probe::probe(&mut Cursor::new(bytes));
    let found = found.expect("memory can be read");
    let _ = format!("{found:?}");
}

/// An image with a superblock of a hash tree: at its start with the data elsewhere, or behind the first half of it.
pub fn verity_superblock(bytes: &[u8]) {
    use blockmount_verity::{Place, Superblock};
    let size = bytes.len() as u64;
    let half = size / 1024 * 512;
    let apart = Place::Apart {
        offset: 0,
        data_bytes: u64::MAX,
    };
    for (place, offset) in [
        (Place::Behind(half), half),
        (Place::Behind(512), 512),
        (apart, 0),
    ] {
        if let Ok(found) = Superblock::read(bytes, size, place) {
            let tree = found.tree(offset).expect("it was checked");
            assert!(tree.end() <= size);
            let _ = found.options(&"ab".repeat(32), offset);
        }
    }
}

/// The header of an image.
pub fn qcow2(bytes: &[u8]) {
    blockmount_qemu::fuzzing::qcow2(bytes);
}

/// What `cryptsetup` says of a header of LUKS2, and of a key.
pub fn luks_header(bytes: &[u8]) {
    blockmount_linux::fuzzing::luks_header(bytes);
}

/// A record of the journal.
pub fn journal_record(bytes: &[u8]) {
    blockmount_linux::fuzzing::journal_record(bytes);
}

/// The kernel's table of mounts.
pub fn mountinfo(bytes: &[u8]) {
    let lines = bytes.split(|byte| *byte == b'\n').count();
    assert!(blockmount_linux::mountinfo::parse(bytes).len() <= lines);
}

/// A message of the kernel about a device.
pub fn uevent(bytes: &[u8]) {
    if let Some(event) = blockmount_linux::uevent::Uevent::parse(bytes) {
        let _ = event.field("SUBSYSTEM");
        let _ = format!("{event:?}");
    }
}

/// Documents of the Host Compute Service.
pub fn hcs_documents(bytes: &[u8]) {
    use blockmount_hcs::documents::{ModifySettingRequest, Properties};
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(properties) = Properties::from_json(text) {
        let again = Properties::from_json(&properties.to_json());
        assert_eq!(again.expect("it reads what it writes"), properties);
    }
    if let Ok(request) = ModifySettingRequest::from_json(text) {
        let again = ModifySettingRequest::from_json(&request.to_json());
        assert_eq!(again.expect("it reads what it writes"), request);
    }
}

/// Options of a mount: as words of a command line, and as they cross the line.
pub fn mount_options(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let words = MountOptions::builder().options(text.split(',')).build();
    let crossed = serde_json::from_str::<MountOptions>(text);
    for options in words.into_iter().chain(crossed) {
        let sent = serde_json::to_string(&options).expect("options can be written");
        let came: MountOptions = serde_json::from_str(&sent).expect("it reads what it writes");
        assert_eq!(came, options);
    }
    let _ = serde_json::from_str::<Overlay>(text);
}

/// Locators and addresses: each that is read is written the same.
pub fn names(bytes: &[u8]) {
    use blockmount_hcs::documents::ResourcePath;
    use blockmount_linux::sysfs::VmbusId;
    use blockmount_scsi::ScsiAddress;
    use blockmount_vpmem::VpmemAddress;
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(locator) = text.parse::<DeviceLocator>() {
        assert_eq!(locator.as_str(), text);
        if let Ok(address) = ScsiAddress::try_from(&locator) {
            assert_eq!(DeviceLocator::from(address), locator);
        }
        if let Ok(address) = VpmemAddress::try_from(&locator) {
            assert_eq!(DeviceLocator::from(address), locator);
        }
    }
    if let Ok(address) = text.parse::<PciAddress>() {
        assert_eq!(
            address.to_string().parse::<PciAddress>().ok(),
            Some(address)
        );
    }
    if let Ok(id) = text.parse::<VmbusId>() {
        assert_eq!(id.to_string().parse::<VmbusId>().ok(), Some(id));
    }
    let _ = text.parse::<ResourcePath>();
}
