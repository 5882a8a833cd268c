//! The guest's side: serves this machine to its host, which says what to mount, combine and unplug.
//!
//! The library serves any stream, and brings the endpoints that hosts use: virtio ports, vsock, Unix sockets and serial
//! lines. It knows no transport by itself: each is [registered](AgentBuilder::transport) by the scheme of its locators, and
//! brings what finds its devices, what unplugs them, its own arguments and the kernel modules it needs.
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use blockmount_agent::{Argument, GuestDevices, GuestTransport, Program, Timeouts, standard};
//!
//! /// Devices that this guest has never.
//! #[derive(Debug, Default)]
//! struct Mine;
//!
//! impl GuestTransport for Mine {
//!     fn scheme(&self) -> &str { "mine" }
//!     fn arguments(&self) -> &[Argument] { &[] }
//!     fn set(&mut self, argument: &str, _: &str) -> Result<(), String> { Err(argument.to_owned()) }
//!     fn modules(&self) -> &[&str] { &[] }
//!     fn devices(&self, _: Timeouts) -> Option<GuestDevices> { None }
//! }
//!
//! /// A whole agent of one's own, also as `/init`: the standard one and one line.
//! fn main() -> ExitCode {
//!     Program::new("my-agent", standard::agent().transport(Mine)).main()
//! }
//! ```
//!
//! | file | concern |
//! |---|---|
//! | `agent.rs`, `transport.rs` | what is served, and what is registered for each transport |
//! | `guest.rs` | the engine, bound to the directories that hosts may use |
//! | `clock.rs` | the clock and random numbers of a restored machine |
//! | `standard/` | the transports of the standard program (feature `standard`) |
//! | `program.rs`, `args.rs` | the agent as a program, and its command line |
//! | `endpoints.rs` | where a service is offered, and the files for each kind of endpoint |
//! | `log.rs` | what is logged, with control characters escaped |
//! | `token.rs` | the secret of a host that connects over vsock |
//! | `ports.rs`, `port.rs`, `edges.rs` | virtio ports, which come and go with each connection |
//! | `init.rs`, `init/` | the same program as pid 1 of a virtual machine |
#![cfg(target_os = "linux")]

mod agent;
mod args;
mod clock;
mod connections;
mod edges;
mod endpoints;
mod error;
mod guest;
mod init;
mod log;
mod port;
mod ports;
mod program;
mod serial;
mod service;
#[cfg(feature = "standard")]
pub mod standard;
mod token;
mod transport;
mod unix;
mod vsock;

pub use agent::{Agent, AgentBuilder, ROOTS};
pub use args::PORT;
pub use endpoints::Endpoints;
pub use error::{AgentError, causes, one_line};
pub use init::{ARGUMENTS, PROGRAMS};
#[cfg(feature = "json")]
pub use log::start_json_log;
pub use log::{LogFilter, start_log};
pub use program::{Program, termination};
pub use service::{Service, ServiceError};
pub use transport::{Argument, GuestDevices, GuestTransport, Timeouts};
