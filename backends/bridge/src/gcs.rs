//! GCS, the protocol of Hyper-V's guests: both ends.
//!
//! Each end works with the other, and with a foreign peer that knows only the documented protocol (version 4): a
//! Linux or Windows agent of Hyper-V, or such an agent's host. Its deadlines, limits and order are those of our own
//! protocol; what it has no message for is `Unsuitable` before anything is sent.
//!
//! A [`BridgeGuest`](crate::BridgeGuest) over a [`GuestConnection`] of this module can ask for less than one of our own
//! protocol:
//!
//! | | Linux guest | Windows guest |
//! |---|---|---|
//! | SCSI disks | controllers 0 to 3, LUNs 0 to 255 | controller 0 |
//! | VPMEM devices | read-only, ext4, no options | no |
//! | access, filesystem, partition, encryption, block device | yes | access only, and that is the disk's |
//! | propagation | yes | no |
//! | mount flags, options of the filesystem, verity | no | no |
//! | read-only | ext4 only | as the disk is |
//! | format | over everything, or xfs encrypted | ReFS over everything |
//! | overlays | yes; the scratch has to be below the parent of the target, such as `P/scratch` for `P/rootfs` | no |
//! | what an earlier process has left | `Unknown` | `Unknown` |
//!
//! What a guest cannot do, or would silently not do, is `Unsuitable` before anything is sent.
//!
//! The agent of a Linux guest waits without end for a device that is not there, also to unmount it. So what is in doubt is
//! unmounted by its path alone, as an overlay: a mount whose answer is missing, one that an earlier process may have left
//! ([`adopt`](blockmount::Mounter::adopt) answers `Unknown`, and the unmount asks), and an unmount that was not answered. A mount
//! that was never answered may still happen: before its disk is removed its path is unmounted again, and no other
//! disk gets that path.
//!
//! # Errors
//!
//! As for our own protocol, but a guest says of its errors only a text and a number ([`Hresult::kind`]). A guest that
//! fails to set something up and says no more than that is `Uncertain`: it may have left half of it behind.
//!
//! | file | concern |
//! |---|---|
//! | `wire.rs` | frames |
//! | `messages.rs`, `messages/*.rs` | the bodies of the messages |
//! | `json.rs` | JSON as the peers write and read it |
//! | `hresult.rs` | the numbers of errors |
//! | `host.rs` | the host's end |
//! | `translator.rs`, `host_requests.rs` | what a guest is asked for |
//! | `agent.rs`, `guest_work.rs` | the guest's end, and what it is asked for |
//! | `device.rs` | locators on the wire |

mod agent;
mod device;
mod guest_work;
mod host;
mod host_requests;
mod hresult;
mod json;
pub mod messages;
mod translator;
pub mod wire;

pub use agent::{GcsAgent, GuestServer, NotificationsFull};
pub use host::{GcsHost, GuestConnection};
pub use hresult::Hresult;
pub use translator::{Translated, Translator};

/// A guest that is asked over GCS.
pub type BridgeGuest<C = GuestConnection> = crate::BridgeGuest<C>;

/// Whether a host that begins a stream with these four bytes speaks GCS: they have the bits of a request. In our own
/// protocol they are the length of a frame, and none is that long.
pub fn is_begun_by(first: [u8; 4]) -> bool {
    let message = wire::MessageType::from_bits(u32::from_le_bytes(first));
    message.role() == wire::Role::Request
}
