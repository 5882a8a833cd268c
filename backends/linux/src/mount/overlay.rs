//! Many read-only trees seen as one, with a writable one on top if there is a scratch.

mod scratch;

use std::ffi::{CString, OsStr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use blockmount::{BackendError, ErrorKind, MountFlags, Overlay};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::mount::{self as sys_mount, MountAttrFlags};

use crate::errno::{errno_error, errno_of};
use crate::kernel::Kernel;
use crate::mount::directory::{self, open_tree, readable};
use crate::mount::fscontext::Context;
use crate::mount::kernel_log::KernelLog;
use crate::mount::mounting::{self, Detached, LONGEST_DATA, path_of};
use crate::mount::target::MountPoint;
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::{Identity, MountStep, Undo};

use scratch::Scratch;

/// The versions of Linux that know an option first, in its documentation's history.
const SINCE: [(&str, &str); 9] = [
    ("index", "4.13"),
    ("metacopy", "4.19"),
    ("nfs_export", "4.16"),
    ("redirect_dir", "4.10"),
    ("userxattr", "5.11"),
    ("uuid", "5.14, and on or auto 6.6"),
    ("verity", "6.6"),
    ("volatile", "5.10"),
    ("xino", "4.17"),
];

/// The kernel's limit (`OVL_MAX_STACK`).
const MOST_LAYERS: usize = 500;

/// Makes an overlay. Blocks. What was made of it until an error is on the undo list.
pub(crate) fn combine(
    list: &UndoList<'_>,
    overlay: &Overlay,
    mark: &str,
    kernel: Kernel,
) -> Result<(), BackendError> {
    if overlay.layers.is_empty() || overlay.layers.len() > MOST_LAYERS {
        let message = format!(
            "an overlay has from one to {MOST_LAYERS} layers, not {}",
            overlay.layers.len()
        );
        return Err(BackendError::invalid(message));
    }
    list.target().check_free()?;
    let layers: Vec<OwnedFd> = overlay
        .layers
        .iter()
        .map(|layer| open_tree(layer, "layer"))
        .collect::<Result<_, _>>()?;
    let directory = overlay.scratch.as_deref().map(scratch::open).transpose()?;
    let held = directory
        .as_ref()
        .map(|open| list.hold(Key::Scratch(open.id)));
    let _held = held.transpose()?;
    let root = fstat(&layers[0])
        .map_err(|errno| errno_error("cannot look at the topmost layer", errno))?;
    let scratch = directory
        .map(|directory| Scratch::prepare(list, directory, &root))
        .transpose()?;
    let stack = Stack {
        layers: &layers,
        scratch: scratch.as_ref(),
        mark,
        options: overlay.options.as_slice(),
        is_mapped: overlay.layers.iter().any(|layer| list.has_id_map(layer)),
    };
    put(list, &stack, kernel)?;
    // What was made in the scratch stays, now that there is the overlay.
    list.keep_made_inside();
    list.save_or_warn();
    Ok(())
}

fn put(list: &UndoList<'_>, stack: &Stack<'_>, kernel: Kernel) -> Result<(), BackendError> {
    let scratch = stack.scratch.map(|scratch| scratch.id);
    let step = |mount| {
        Undo::Unmount(Box::new(MountStep {
            mount,
            device: None,
            scratch,
            view: None,
        }))
    };
    let at = directory::prepare(list)?;
    // An overlay that nobody can write to wants two layers. The target is an empty directory, and
    // stays one: the overlay covers it.
    let empty = match stack.is_lonely() {
        true => Some(
            readable(at.directory(), OsStr::new("."))
                .map_err(|errno| errno_error("cannot open the target", errno))?,
        ),
        false => None,
    };
    let lowers: Vec<&OwnedFd> = stack.layers.iter().chain(&empty).collect();
    let detached = mounting::or_without_call(stack.build(&lowers, kernel))?;
    if let Some(mount) = detached {
        let mount = Detached::new(mount, list, kernel)?;
        if mounting::attach(&mount, at.place()?, None, kernel, list, step)? {
            return Ok(());
        }
    }
    let options = stack.directories(&lowers)?;
    let expected = stack.expected(&options);
    let make = |at: &MountPoint| stack.mount_at(&options, at);
    mounting::in_one_step(at, kernel, list, step, expected, make)
}

/// The layers of an overlay.
struct Stack<'a> {
    layers: &'a [OwnedFd],
    scratch: Option<&'a Scratch>,
    mark: &'a str,
    options: &'a [String],
    /// Whether files of a layer appear with other owners.
    is_mapped: bool,
}

impl Stack<'_> {
    fn is_lonely(&self) -> bool {
        self.layers.len() == 1 && self.scratch.is_none()
    }

    /// Builds the overlay detached, in the best of the ways that this kernel has; `None` if it has
    /// none.
    fn build(&self, lowers: &[&OwnedFd], kernel: Kernel) -> Result<Option<OwnedFd>, BackendError> {
        if kernel.lower_by_fd {
            match self.build_by_fd(lowers, kernel)? {
                Ok(mount) => return Ok(Some(mount)),
                // Before Linux 6.5 overlay has no context of its own; the one for such filesystems
                // takes no descriptors, and to try strings would only fill the kernel's log.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(None),
                Err(_unknown_option) => {}
            }
        }
        if !kernel.lower_by_string {
            return Ok(None);
        }
        match self.build_by_string(lowers, kernel) {
            // What the kernel knows or not, an older one tells only in the end.
            Err(error) if error.kind() == ErrorKind::Invalid => Ok(None),
            built => built,
        }
    }

    /// The inner error is that of a kernel that cannot.
    fn build_by_fd(
        &self,
        lowers: &[&OwnedFd],
        kernel: Kernel,
    ) -> Result<Result<OwnedFd, Errno>, BackendError> {
        let Some(context) = self.open(kernel)? else {
            return Ok(Err(Errno::NOSYS));
        };
        for (index, lower) in lowers.iter().enumerate() {
            match context.file("lowerdir+", lower) {
                Ok(()) => {}
                Err(errno @ (Errno::OPNOTSUPP | Errno::INVAL)) if index == 0 => {
                    return Ok(Err(errno));
                }
                Err(errno) => {
                    return Err(context.refused(&format!("lowerdir+ (layer {index})"), errno));
                }
            }
        }
        if let Some(scratch) = self.scratch {
            for (name, directory) in [("upperdir", &scratch.upper), ("workdir", &scratch.work)] {
                context
                    .file(name, directory)
                    .map_err(|errno| context.refused(name, errno))?;
            }
        }
        self.finish(&context).map(Ok)
    }

    fn build_by_string(
        &self,
        lowers: &[&OwnedFd],
        kernel: Kernel,
    ) -> Result<Option<OwnedFd>, BackendError> {
        let Some(context) = self.open(kernel)? else {
            return Ok(None);
        };
        for lower in lowers {
            context.string("lowerdir+", &path_of(lower))?;
        }
        if let Some(scratch) = self.scratch {
            context.string("upperdir", &path_of(&scratch.upper))?;
            context.string("workdir", &path_of(&scratch.work))?;
        }
        self.finish(&context).map(Some)
    }

    fn open(&self, kernel: Kernel) -> Result<Option<Context>, BackendError> {
        let Some(context) = Context::open("overlay", Path::new(self.mark), kernel)? else {
            return Ok(None);
        };
        context.flags(self.scratch.is_none(), MountFlags::default())?;
        for option in self.options {
            let refused = |error| self.explained(error);
            context.option(option).map_err(refused)?;
        }
        Ok(Some(context))
    }

    fn finish(&self, context: &Context) -> Result<OwnedFd, BackendError> {
        let refused = |error| self.explained(error);
        context.create().map_err(refused)?;
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, self.scratch.is_none());
        context.mount(attributes)
    }

    /// What `mount(2)` is given.
    ///
    /// All layers go into one string of at most a page. So that five hundred fit, and none needs an
    /// escape, each is the number of its descriptor, relative to the directory of descriptors.
    fn directories(&self, lowers: &[&OwnedFd]) -> Result<String, BackendError> {
        let lowers: Vec<String> = lowers
            .iter()
            .map(|lower| lower.as_raw_fd().to_string())
            .collect();
        let mut data = format!("lowerdir={}", lowers.join(":"));
        if let Some(scratch) = self.scratch {
            let (upper, work) = (scratch.upper.as_raw_fd(), scratch.work.as_raw_fd());
            data.push_str(&format!(",upperdir={upper},workdir={work}"));
        }
        let length = data.len() + self.more().len();
        if length > LONGEST_DATA {
            let layers = self.layers.len();
            return Err(BackendError::unsuitable(format!(
                "this kernel takes the layers of an overlay in one string of {LONGEST_DATA} bytes, and these {layers} need \
                 {length}: Linux 6.8 takes each by itself"
            )));
        }
        Ok(data)
    }

    /// What follows the directories.
    fn more(&self) -> String {
        match self.options {
            [] => String::new(),
            options => format!(",{}", mounting::options_string(options)),
        }
    }

    /// An error with what this kernel may not have, if it has refused something.
    fn explained(&self, error: BackendError) -> BackendError {
        let known = |option: &String| {
            let (_, since) = SINCE.iter().find(|(name, _)| option.starts_with(name))?;
            Some(format!("{option} (Linux {since})"))
        };
        let mut newer: Vec<String> = self.options.iter().filter_map(known).collect();
        if self.is_mapped {
            newer.push("layers with id maps (Linux 5.19)".to_owned());
        }
        let is_refused = matches!(errno_of(&error), Some(Errno::INVAL | Errno::OPNOTSUPP));
        if newer.is_empty() || !is_refused {
            return error;
        }
        let message = format!(
            "{}: not every kernel and scratch can have {}",
            error.message(),
            newer.join(", ")
        );
        BackendError::unsuitable(message).with_source(error)
    }

    /// What the kernel's table will say of it.
    fn expected(&self, options: &str) -> Identity {
        Identity::Expected {
            filesystem: "overlay".to_owned(),
            source: Path::new(self.mark).into(),
            further_sources: Vec::new(),
            options: options.split(',').map(str::to_owned).collect(),
        }
    }

    /// The same in one step. (`mount(2)`)
    fn mount_at(&self, options: &str, at: &MountPoint) -> Result<(), BackendError> {
        let data = CString::new(options.to_owned() + &self.more())
            .expect("numbers and valid options have no NUL");
        let at = path_of(at.directory());
        let mut flags = sys_mount::MountFlags::empty();
        flags.set(sys_mount::MountFlags::RDONLY, self.scratch.is_none());
        let (mark, log) = (self.mark, KernelLog::from_now());
        among_descriptors(|| sys_mount::mount(mark, &at, "overlay", flags, data.as_c_str()))?
            .map_err(|errno| {
                let said = log.said("overlay", Path::new(mark));
                let layers = self.layers.len();
                let what = format!("cannot mount an overlay of {layers} layers{said}");
                self.explained(errno_error(what, errno))
            })
    }
}

/// Runs something with the directory of open descriptors as its working directory, which a thread
/// has for itself alone only if it ends with it.
fn among_descriptors<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, BackendError> {
    let in_thread = || {
        unshare(CloneFlags::CLONE_FS).map_err(std::io::Error::from)?;
        std::env::set_current_dir("/proc/self/fd")?;
        Ok::<_, std::io::Error>(work())
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, in_thread);
        let joined = thread.map(|thread| thread.join());
        match joined {
            Ok(Ok(done)) => done
                .map_err(|error| errno_error("cannot enter the directory of descriptors", error)),
            Ok(Err(_panic)) => Err(BackendError::uncertain(
                "the thread that mounts an overlay panicked",
            )),
            Err(error) => Err(errno_error(
                "cannot start a thread to mount an overlay",
                error,
            )),
        }
    })
}
