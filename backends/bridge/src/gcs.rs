//! GCS, the protocol of Hyper-V's guests: both ends.
//!
//! Each end works with the other, and with a foreign peer that knows only the documented protocol (version 4): a
//! Linux or Windows agent of Hyper-V, or such an agent's host. Its deadlines, limits and order are those of our own
//! protocol; what it has no message for is `Unsuitable` before anything is sent.
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
//! | `connection.rs` | the host's end |
//! | `bridge_guest.rs`, `host_requests.rs` | the contracts on it, and what they ask for |
//! | `server.rs`, `guest_work.rs` | the guest's end, and what it is asked for |
//! | `device.rs` | locators on the wire |

mod bridge_guest;
mod connection;
mod device;
mod guest_work;
mod host_requests;
mod hresult;
mod json;
pub mod messages;
mod server;
pub mod wire;

pub use crate::line::Deadlines;
pub use bridge_guest::{BridgeGuest, GuestChannel};
pub use connection::GuestConnection;
pub use hresult::Hresult;
pub use server::{GuestServer, NotificationsFull, serve};

/// Whether a host that begins a stream with these four bytes speaks GCS: they have the bits of a request. In our own
/// protocol they are the length of a frame, and none is that long.
pub fn is_begun_by(first: [u8; 4]) -> bool {
    let message = wire::MessageType::from_bits(u32::from_le_bytes(first));
    message.role() == wire::Role::Request
}
