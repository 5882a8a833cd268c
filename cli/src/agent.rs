//! The agent: serves this guest to its host over the bridge, as an ordinary process or for pid 1.
//!
//! | file | concern |
//! |---|---|
//! | `agent/args.rs` | the command line |
//! | `agent/guest.rs` | what is served: the Linux engine and its transports |
//! | `agent/endpoints.rs` | where it is served, and the files for each kind of place |
//! | `agent/ports.rs`, `agent/port.rs`, `agent/edges.rs` | virtio ports, which come and go with each connection |
//! | `agent/init.rs` and `agent/init/*.rs` | the same program as pid 1 of a virtual machine |

pub(crate) mod args;
mod connections;
mod edges;
pub(crate) mod endpoints;
mod guest;
pub(crate) mod init;
mod port;
mod ports;
mod serial;
mod unix;
mod vsock;

use blockmount_bridge::gcs::GuestServer;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::machine::require_root;
use args::AgentArgs;
use endpoints::{Broken, Service};
use guest::Guest;

/// The virtio port over which a host reaches the agent, unless told otherwise.
pub(crate) const PORT: &str = "blockmount.agent";

/// Serves until a signal comes. `Ok` is the exit status.
pub(crate) async fn run(args: AgentArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    require_root("agent")?;
    if args.witness && std::process::id() != 1 {
        let failure = Failure::usage("--witness is for an agent that is pid 1");
        return Err(failure.advise("run \"blockmount witness\" beside this agent"));
    }
    interrupt.now("ending the requests under way");
    let server = GuestServer::new(Guest::new(&args).await?);
    args.endpoints
        .or_port(PORT)
        .serve(server, &interrupt)
        .await?;
    Ok(0)
}

impl Service for GuestServer<Guest> {
    async fn serve<S>(&self, stream: S) -> Result<(), Broken>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        Ok(GuestServer::serve(self, stream).await?)
    }
}
