//! The bridge between a host and its guest, in the protocol that Hyper-V's guests speak: what the guest has
//! to do for a disk (mount, unmount, unplug, lay layers over each other), asked for over a stream of
//! bytes.
//!
//! Both ends are here. Each works with the other, and each with a foreign peer that knows only the
//! documented protocol (GCS, version 4): a Linux or Windows agent of Hyper-V, or such an agent's host.
//!
//! ```
//! use std::path::Path;
//!
//! use blockmount::testing::FakeVm;
//! use blockmount::{Disk, LayerCombiner, MountOptions, Mounter, Overlay, Transport};
//! use blockmount_bridge::gcs::{BridgeGuest, GuestConnection, GuestServer};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The guest: here a fake one, with a layer mounted already.
//! let vm = FakeVm::new();
//! let device = vm.attach(&Disk::virtual_disk("/images/base.erofs")).await?;
//! vm.mount(&device, Path::new("/run/layer"), &MountOptions::read_only()).await?;
//!
//! // The stream: in real life vsock, virtio-serial or a Unix socket.
//! let (host_end, guest_end) = tokio::io::duplex(64 << 10);
//! let server = GuestServer::new(vm.clone());
//! tokio::spawn(async move { server.serve(guest_end).await });
//!
//! // The host: the guest's contracts, as if it were here.
//! let guest = BridgeGuest::new(GuestConnection::connect(host_end).await?);
//! let overlay = Overlay::new(["/run/layer"], "/run/rootfs");
//! guest.combine(&overlay).await?;
//! assert!(vm.left().contains(&"/run/rootfs overlays 1 layers".to_owned()));
//! guest.separate(&overlay.target).await?;
//! # Ok(())
//! # }
//! ```
//!
//! A [`blockmount::Manager`] takes the guest as its mounter, unplugger and combiner.
//!
//! # Architecture
//!
//! ```text
//! BridgeGuest ── GuestConnection ── Link ~~~ frames ~~~ GuestServer ── Order ── any Mounter + Unplugger
//!  ledger         reconnects, ids   calls               negotiation    by key        + LayerCombiner
//! ```
//!
//! [`BridgeGuest`] works over any [`GuestChannel`], of which [`GuestConnection`] is one: a hypervisor that keeps the connection to
//! the guest to itself is asked for the same, and refused the same.
//!
//! - **Nobody waits for somebody else.** Requests are under way at once and answered as they end. A
//!   request that is never answered, or with garbage, fails alone, by its deadline. A peer that stops
//!   reading fills a queue of fixed length, and whoever waits behind it is freed by its own deadline.
//! - **One key at a time.** The guest does requests for one target in the order in which they came,
//!   also over a reconnection, so that an unmount never overtakes the mount that its host has given up on.
//! - **Nothing is silently dropped.** What the guest at the other end would ignore (a mount flag, an
//!   integrity check) is refused by the host before it is sent. What the protocol has no word for is
//!   in optional fields, which are sent only to a guest that has announced that it keeps them.
//!
//! # Errors
//!
//! `Uncertain` if the guest may have done it: no answer in time, one that cannot be read, the connection
//! lost with the request sent. `Gone` from then on, until [`GuestConnection::reconnect`]. `Busy` if
//! the guest does not read; nothing was sent then. `Unsuitable` for what this guest cannot do. Everything else is as the
//! guest says: by name between our ends, else by the number of the error ([`Hresult::kind`]). A
//! foreign guest that fails to set something up and says no more than that is `Uncertain`: it may
//! have left half of it behind.
//!
//! | file | concern |
//! |---|---|
//! | `wire.rs` | frames, and finding them in a stream |
//! | `messages.rs`, `messages/*.rs` | the bodies of the messages |
//! | `json.rs` | JSON as the peers write and read it |
//! | `hresult.rs` | the numbers of errors |
//! | `link.rs`, `connection.rs` | the host's end: calls, deadlines, reconnection |
//! | `bridge_guest.rs`, `host_requests.rs` | the contracts on it, and what they ask for |
//! | `server.rs`, `guest_work.rs` | the guest's end, and what it does |
//! | `device.rs` | locators on the wire |

mod bridge_guest;
mod connection;
mod device;
pub(crate) mod guest_work;
mod host_requests;
mod hresult;
mod json;
mod link;
pub mod messages;
mod server;
pub mod wire;

pub use bridge_guest::{BridgeGuest, GuestChannel};
pub use connection::{Deadlines, GuestConnection};
pub use hresult::Hresult;
pub use server::{GuestServer, NotificationsFull, serve};
