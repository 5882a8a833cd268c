//! A loop device by the bare system calls: the floor that the transport is measured against.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::device::{MARK_MAX, node, usual_node};
use crate::ioctl;

/// How often a device that is free is asked for.
const TRIES: u32 = 64;

/// An image that is bound to a loop device, read-only, by five system calls: the least that it takes.
///
/// It looks at nothing and remembers nothing: not whether the image is one, nor whether another device has it. So this is
/// for measurements alone.
///
/// The kernel unbinds the device when this is dropped, or when it is unmounted after that.
#[derive(Debug)]
pub struct BareLoop {
    node: PathBuf,
    // Open, the device stays bound.
    _device: File,
}

impl BareLoop {
    /// Binds a free device. The mark is what [`bound_loops`](crate::bound_loops) shows, cut off after 63 bytes.
    ///
    /// # Errors
    ///
    /// Those of the kernel; `EBUSY` if other processes take the free device first, again and again.
    pub fn bind(image: &Path, mark: &str) -> io::Result<Self> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")?;
        let mut tries = 1;
        loop {
            match Self::bind_free(&control, image, mark) {
                // Somebody else was quicker to take the device that was free.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < TRIES => {
                    tries += 1;
                }
                bound => return bound,
            }
        }
    }

    fn bind_free(control: &File, image: &Path, mark: &str) -> io::Result<Self> {
        let number = ioctl::get_free(control)?;
        let node = match usual_node(number) {
            usual if usual.exists() => usual,
            _ => node(number)?,
        };
        let (file, device) = (File::open(image)?, File::open(&node)?);
        let mut config = ioctl::loop_config {
            fd: file.as_raw_fd().cast_unsigned(),
            block_size: 512,
            info: ioctl::empty_info(),
            __reserved: [0; 8],
        };
        config.info.lo_flags = ioctl::AUTOCLEAR | ioctl::READ_ONLY;
        let mark = &mark.as_bytes()[..mark.len().min(MARK_MAX)];
        config.info.lo_file_name[..mark.len()].copy_from_slice(mark);
        ioctl::configure(&device, &mut config)?;
        Ok(BareLoop {
            node,
            _device: device,
        })
    }

    /// Its node in `/dev`.
    pub fn node(&self) -> &Path {
        &self.node
    }
}
