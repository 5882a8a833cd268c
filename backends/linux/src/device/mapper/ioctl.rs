//! The one system call of device-mapper.
#![allow(
    unsafe_code,
    reason = "a request of a driver, which has no safe wrapper"
)]

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

use super::wire::HEADER;

/// What is asked of device-mapper, by its number in `linux/dm-ioctl.h`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Command {
    Version = 0,
    List = 2,
    Create = 3,
    Remove = 4,
    /// Suspends with a flag, and resumes without.
    Resume = 6,
    Status = 7,
    Load = 9,
    Clear = 10,
    /// Tells tables with a flag, and their state without.
    Table = 12,
    Versions = 13,
}

impl Command {
    /// `_IOWR(0xfd, number, struct dm_ioctl)`.
    fn request(self) -> u32 {
        const READ_AND_WRITE: u32 = 3 << 30;
        READ_AND_WRITE | (HEADER as u32) << 16 | 0xfd << 8 | self as u32
    }
}

/// Runs a command, whose answer replaces the request in the buffer. Blocks.
///
/// # Panics
///
/// If the buffer does not start with a header that gives its own length.
pub(super) fn run(control: &File, command: Command, buffer: &mut [u8]) -> Result<(), Errno> {
    let length = buffer.get(12..).and_then(|rest| rest.first_chunk());
    let length = length.map(|bytes| u32::from_ne_bytes(*bytes) as usize);
    assert!(buffer.len() >= HEADER && length == Some(buffer.len()));
    // SAFETY: the kernel reads and writes as many bytes from the pointer as the header says at offset 12
    // (`data_size`), which is the length of the buffer, as was just checked; it does not keep the pointer.
    let result = unsafe {
        libc::ioctl(
            control.as_raw_fd(),
            command.request() as _,
            buffer.as_mut_ptr(),
        )
    };
    if result >= 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_the_commands() {
        assert_eq!(Command::Version.request(), 0xc138_fd00);
        assert_eq!(Command::Create.request(), 0xc138_fd03);
        assert_eq!(Command::Remove.request(), 0xc138_fd04);
        assert_eq!(Command::Resume.request(), 0xc138_fd06);
        assert_eq!(Command::Load.request(), 0xc138_fd09);
        assert_eq!(Command::Clear.request(), 0xc138_fd0a);
        assert_eq!(Command::Status.request(), 0xc138_fd07);
        assert_eq!(Command::Table.request(), 0xc138_fd0c);
        assert_eq!(Command::Versions.request(), 0xc138_fd0d);
    }
}
