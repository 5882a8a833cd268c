//! The service `containerd.services.mounts.v1.Mounts`: lists of mounts are activated under names, and outlive both the client's
//! connection and the server.
//!
//! [`Activations`] is what the service does, and [`serve`] offers it over gRPC on a Unix socket:
//!
//! ```no_run
//! use blockmount_containerd::service::{Activations, Options, Peers, listen, serve};
//!
//! # async fn example(builder: blockmount::ManagerBuilder, journal: impl blockmount::journal::Journal) -> Result<(), Box<dyn std::error::Error>> {
//! let recovery = builder.recover(journal).await?;
//! let options = Options::new("/run/blockmount/mounts", "/run/blockmount/activations");
//! let activations = Activations::recover(recovery, options).await?;
//! let listener = listen("/run/blockmount.sock".as_ref())?;
//! let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
//! # let _ = stop;
//! serve(listener, activations.clone(), Peers::default(), async { drop(stopped.await) }).await;
//! activations.leave().await; // for the next process
//! # Ok(())
//! # }
//! ```
//!
//! | call | what it does | errors |
//! |---|---|---|
//! | Activate | plans and performs a list | `ALREADY_EXISTS`; `UNIMPLEMENTED` if nothing of the list is ours; `INVALID_ARGUMENT` with the number of the mount and the reason; `FAILED_PRECONDITION` for what is not there, in use or taken |
//! | Deactivate | takes it back | `NOT_FOUND`; `FAILED_PRECONDITION` while somebody uses it: it is there still, and can be deactivated later; `DATA_LOSS` if it is gone, and writes were lost, or may be with their virtual machine |
//! | Info | tells of one | `NOT_FOUND` |
//! | Update | replaces labels: `labels`, or `labels.KEY` | `NOT_FOUND`, `INVALID_ARGUMENT` for other fields |
//! | List | tells of all in the namespace that pass one of the filters | `INVALID_ARGUMENT` |
//!
//! One service can be for several virtual machines ([`Activations::recover_in_vms`]), each with a name. The label [`VM_LABEL`] of a list
//! to activate names one of them (`INVALID_ARGUMENT` if it does not, and there is more than one); names of activations are unique among
//! all, and the label tells with each where it is.
//!
//! `blockmount serve` is a program that does this. A client that goes before it has its answer has activated nothing, and
//! neither has one whose deadline (`grpc-timeout`) is over by then; only where the answer is on its way already does the activation stay, to
//! be found by its name: Activate says `ALREADY_EXISTS`, and Info what it is. Mount points are those in the guest.

mod activations;
mod entry;
mod filter;
mod grpc;
mod identifiers;
mod record;
mod server;
mod status;
mod store;
mod vm;

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::missing_errors_doc,
    clippy::all,
    reason = "made by a generator"
)]
#[rustfmt::skip]
mod protocol;

pub use activations::{Activate, ActivationState, ActivationStatus, Activations, Options};
pub use filter::{Filter, InvalidFilter};
pub use record::{ActiveMount, Info};
pub use server::{Peers, listen, serve};
pub use store::recorded;
pub use vm::{InvalidVmName, VM_LABEL, VmName};
