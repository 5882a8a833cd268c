//! The bridge between a host and the agent in its guest: what the guest has to do for a disk (mount, unmount, unplug,
//! combine layers), asked for over a stream of bytes.
//!
//! Two protocols are here, both ends of each. Our own carries the calls of the guest's contracts as they are, and knows
//! no transport: a locator is opaque to it. [`gcs`] is the protocol of Hyper-V's guests, for agents and hosts that
//! speak nothing else.
//!
//! ```
//! use std::path::Path;
//!
//! use blockmount::testing::FakeVm;
//! use blockmount::{Disk, MountOptions, Mounter};
//! use blockmount::testing::AttachIdentified as _;
//! use blockmount_bridge::{BridgeGuest, GuestConnection, GuestServer};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The guest: here a fake one, with a disk attached.
//! let vm = FakeVm::new();
//! let device = vm.attach_identified(&Disk::virtual_disk("/images/base.erofs")).await?;
//!
//! // The stream: in real life vsock, virtio-serial or a Unix socket.
//! let (host_end, guest_end) = tokio::io::duplex(64 << 10);
//! let server = GuestServer::new(vm.clone());
//! tokio::spawn(async move { server.serve(guest_end).await });
//!
//! // The host: the guest's contracts, as if it were here.
//! let guest = BridgeGuest::new(GuestConnection::connect(host_end).await?);
//! let target = Path::new("/run/layer");
//! guest.mount(&device, target, &MountOptions::read_only()).await?;
//! assert_eq!(vm.device_at("/run/layer"), Some(device));
//! guest.unmount(target).await?;
//! # Ok(())
//! # }
//! ```
//!
//! A [`blockmount::Manager`] takes the guest as its mounter, unplugger and combiner.
//!
//! # Architecture
//!
//! ```text
//! BridgeGuest ── GuestChannel: Connection | RedialingChannel ~~~ frames ~~~ Server ── any Guest
//!                              HostCodec (native, gcs)                      AgentCodec (native, gcs)
//!                              Multiplexer (calls, deadlines)               order by target and device
//! ```
//!
//! - **No request waits for another.** Requests are under way at once and answered as they end. A
//!   request that is never answered, or with garbage, fails alone, by its deadline. A peer that stops
//!   reading fills a queue of fixed length, and the callers behind it return by their own deadlines.
//! - **One key at a time.** The agent does requests for one target or device in the order in which they came,
//!   also over a reconnection, so that an unmount never overtakes the mount that its host has given up on.
//! - **Nothing is silently dropped.** An agent refuses a request, or a field of one, that it does not know, and
//!   names it.
//! - **What a restart left is asked for.** A host that was restarted asks an agent what is still mounted. Agents of version 1
//!   and guests over GCS cannot be asked: the answer is `Unknown`, and the manager tears down before it uses anything.
//! - **The host tells the time** when it connects, because a guest from a saved state has the clock of that state.
//! - **Versions are agreed on.** The first message of a connection says which versions the host speaks. Where there is
//!   no common one, both ends say which of them is older and has to be updated.
//!
//! # Errors
//!
//! `Uncertain` if the guest may have done it: no answer in time, one that cannot be read, or the connection lost. A lost
//! connection is not a lost guest: `Gone` is answered only by a [`RedialingChannel`] whose [`Dialer`] says that the VM has
//! ended. `Busy` if the guest does not read; nothing was sent then. Everything else is as the guest answers.
//!
//! | file | concern |
//! |---|---|
//! | `frames.rs` | finding frames in a stream |
//! | `multiplexer.rs` | many requests over one stream; also for QMP |
//! | `codec.rs` | what a protocol has to say for itself, at each end |
//! | `link.rs`, `connection.rs` | the host's end |
//! | `redial.rs` | making the connection anew |
//! | `bridge_guest.rs` | the contracts on it |
//! | `server.rs` | the agent's end |
//! | `protocol.rs`, `native.rs` | our own protocol: the messages and their bytes, and its codecs |
//! | `gcs.rs`, `gcs/*.rs` | the protocol of Hyper-V's guests |

mod bridge_guest;
mod codec;
mod connection;
mod frames;
pub mod gcs;
mod link;
pub mod multiplexer;
mod native;
mod protocol;
mod redial;
mod server;

pub use bridge_guest::{BridgeGuest, GuestChannel};
pub use connection::Connection;
pub use frames::FrameError;
pub use link::Deadlines;
pub use native::{GuestConnection, GuestServer};
pub use protocol::{Greeting, MAX_FRAME, Reply, Request};
pub use redial::{Dialer, RedialingChannel};
pub use server::{Guest, ServeError, Server};
