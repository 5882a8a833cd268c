//! The limits of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::failure::Failure;

/// What the program needs without layers, and the way out even where something has failed.
const FILES: u64 = 64;
/// What a layer needs at most while it is attached and mounted; a loop device of its own for as long as it is there.
const FILES_OF_A_LAYER: u64 = 8;

/// Allows as many open files as the system lets this process have: the usual limit of 1,024 is for programs that use `select`.
/// Too few are refused here, where nothing has to be taken back yet.
pub(crate) fn ensure_files(layers: usize) -> Result<(), Failure> {
    let needed = FILES + FILES_OF_A_LAYER * layers as u64;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: maximum,
        maximum,
    };
    let allowed = match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => maximum,
        Err(_) => current,
    };
    match allowed {
        Some(allowed) if allowed < needed => {
            let what = format!(
                "this process may have {allowed} files open, and needs up to {needed} for {layers} layers"
            );
            Err(Failure::new(what).advise(format!("allow more: ulimit -n {needed}")))
        }
        _ => Ok(()),
    }
}
