//! Loading modules into the kernel.

use std::ffi::{OsStr, c_int};
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

use rustix::io::Errno;

use super::words::lines;
use crate::log::say;

/// `MODULE_INIT_COMPRESSED_FILE` of `linux/module.h`, for kernels that unpack modules themselves (5.17).
const COMPRESSED: c_int = 4;

/// Loads the modules that a file lists, in its order. One that cannot be loaded is said, and the rest is
/// loaded all the same: what it was for may never be asked for.
pub(super) fn load_all(list: &Path) {
    let start = Instant::now();
    let text = match std::fs::read(list) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            let list = list.display();
            return say(format_args!("blockmount init: cannot read {list}: {error}"));
        }
    };
    let modules = lines(&text);
    for module in &modules {
        if let Err(error) = load(Path::new(module)) {
            let module = Path::new(module).display();
            say(format_args!(
                "blockmount init: cannot load {module}: {error}"
            ));
        }
    }
    tracing::info!(count = modules.len(), took = ?start.elapsed(), "modules loaded");
}

fn load(path: &Path) -> io::Result<()> {
    let is_plain = path.extension() == Some(OsStr::new("ko"));
    let flags = if is_plain { 0 } else { COMPRESSED };
    match rustix::system::finit_module(File::open(path)?, c"", flags) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
