//! The debug agent tells the host of a guest how the guest is, apart from the agent that is under test.
//!
//! It reads, writes, mounts, runs programs, kills the agent and turns the machine off as it is told, anywhere. Tests put it into
//! a guest as a program that init starts beside the agent, or run it as an ordinary process. It answers what a
//! [checker](blockmount_checker) answers, and more.
//!
//! | file | concern |
//! |---|---|
//! | `protocol.rs` | what is asked and answered besides a checker's requests |
//! | `server.rs` | the guest's end |
//! | `exercise.rs` | mounts of which each step fails or is killed once |
//! | `trial.rs` | one mount with some options, and what it leaves |
//! | `run.rs` | a program in a root, and what it says |
//! | `agent_process.rs` | which process the agent is |
//! | `keys.rs` | keys that the owner of a guest places in it |
//! | `kit.rs`, `kit/` | what tests of several crates share: processes, images, agents on sockets |

mod agent_process;
pub mod exercise;
mod keys;
pub mod kit;
mod protocol;
pub mod run;
mod server;
pub mod trial;

pub use protocol::{DebugRequest, DebugResponse};
pub use server::DebugServer;

/// The virtio port over which a host reaches the debug agent, unless told otherwise.
pub const PORT: &str = "blockmount.debug";
