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
//! | format | over everything, or encrypted | ReFS over everything |
//! | overlays | yes | no |
//!
//! What a guest cannot do, or would silently not do, is `Unsuitable` before anything is sent.
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
