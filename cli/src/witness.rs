//! The witness: tells the host of a guest how the guest is, apart from the agent that is judged by it.
//!
//! It reads, writes, mounts, kills and turns the machine off as it is told, anywhere: it is a diagnostic for a
//! host that owns its guest, and trusts whoever can connect to it.
//!
//! | file | concern |
//! |---|---|
//! | `witness/protocol.rs` | what is asked and answered, and its frames |
//! | `witness/client.rs` | the host's end |
//! | `witness/server.rs` | the guest's end: one request at a time on each connection |
//! | `witness/tables.rs`, `witness/bare_mount.rs`, `witness/agent_process.rs` | how each answer is found |

mod agent_process;
mod bare_mount;
pub(crate) mod client;
pub(crate) mod protocol;
mod server;
mod tables;

use std::path::PathBuf;

use blockmount_agent::{Endpoints, ROOTS};
use clap::Args;

use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::machine::require_root;

/// The virtio port over which a host reaches the witness, unless told otherwise.
pub(crate) const PORT: &str = "blockmount.witness";

#[derive(Debug, Args)]
#[command(after_help = "\
The witness reads and writes files, mounts, kills the agent and turns the machine off for whoever \
connects, without any restriction: it is a diagnostic for a host that owns this guest. It is a \
process of its own, so that it can tell what an agent did that was killed. Without any of \
--unix it serves every virtio port named blockmount.witness.

Examples:
  blockmount witness
  blockmount witness --unix /run/blockmount-witness.sock

SIGTERM or Ctrl-C ends it.")]
pub(crate) struct WitnessArgs {
    /// Wait for connections on a Unix socket, which only this user may open; repeatable
    #[arg(long = "unix", value_name = "PATH")]
    unix: Vec<PathBuf>,

    /// A directory below which the agent mounts, whose directories are told; repeatable
    #[arg(long = "root", value_name = "DIR", default_values = ROOTS)]
    roots: Vec<PathBuf>,
}

/// Serves until a signal comes. `Ok` is the exit status.
pub(crate) async fn run(args: WitnessArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    require_root("witness")?;
    interrupt.now("ending the requests under way");
    let server = server::Server::new(args.roots, interrupt.clone());
    let endpoints = args
        .unix
        .into_iter()
        .fold(Endpoints::default(), Endpoints::unix);
    let ended = async {
        interrupt.requested().await;
    };
    endpoints.or_port(PORT).serve(server, ended).await?;
    interrupt.settled().await;
    Ok(0)
}
