//! The loop driver's system calls, made safe: each takes open files and plain values.
//!
//! Numbers and structures are those of the kernel's `linux/loop.h`, as bound by `linux-raw-sys`.
#![allow(unsafe_code)] // ioctl has no safe form; nothing else in this crate needs any

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;

use linux_raw_sys::loop_device::{
    LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO, LO_FLAGS_PARTSCAN, LO_FLAGS_READ_ONLY, LOOP_CLR_FD,
    LOOP_CONFIGURE, LOOP_CTL_ADD, LOOP_CTL_GET_FREE, LOOP_GET_STATUS64, LOOP_SET_CAPACITY,
};
pub(crate) use linux_raw_sys::loop_device::{loop_config, loop_info64};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

pub(crate) const READ_ONLY: u32 = LO_FLAGS_READ_ONLY as u32;
pub(crate) const AUTOCLEAR: u32 = LO_FLAGS_AUTOCLEAR as u32;
pub(crate) const PARTSCAN: u32 = LO_FLAGS_PARTSCAN as u32;
pub(crate) const DIRECT_IO: u32 = LO_FLAGS_DIRECT_IO as u32;

/// A call that takes a number or nothing, and answers with a number.
struct Plain<const OPCODE: u32>(isize);

// SAFETY: these calls read their argument as a number and write no memory of ours.
unsafe impl<const OPCODE: u32> Ioctl for Plain<OPCODE> {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0 as usize)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        Ok(out.cast_unsigned())
    }
}

/// A call that reads or fills a structure.
struct Structured<'a, const OPCODE: u32, T>(&'a mut T);

// SAFETY: `T` is the structure that goes with `OPCODE` at each use below, and `&mut` covers both a
// kernel that reads it and one that writes it.
unsafe impl<const OPCODE: u32, T> Ioctl for Structured<'_, OPCODE, T> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        OPCODE as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Makes a new loop device with a number of the kernel's choice.
pub(crate) fn add(control: impl AsFd) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_ADD takes a number, where -1 means any.
    Ok(unsafe { ioctl(control, Plain::<LOOP_CTL_ADD>(-1)) }?)
}

/// The number of a device that is free now, which is made if there is none.
pub(crate) fn get_free(control: impl AsFd) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument.
    Ok(unsafe { ioctl(control, Plain::<LOOP_CTL_GET_FREE>(0)) }?)
}

/// Binds the device in one step; `EBUSY` if it is bound or claimed.
pub(crate) fn configure(device: impl AsFd, config: &mut loop_config) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads a `loop_config`.
    Ok(unsafe { ioctl(device, Structured::<LOOP_CONFIGURE, _>(config)) }?)
}

/// What the device is bound to; `ENXIO` if to nothing.
pub(crate) fn get_status(device: impl AsFd) -> io::Result<loop_info64> {
    let mut info = empty_info();
    // SAFETY: LOOP_GET_STATUS64 fills a `loop_info64`.
    unsafe { ioctl(device, Structured::<LOOP_GET_STATUS64, _>(&mut info)) }?;
    Ok(info)
}

/// Asks the kernel to unbind the device as soon as it is not open any more; `ENXIO` if it is not bound.
pub(crate) fn clear(device: impl AsFd) -> io::Result<()> {
    // SAFETY: LOOP_CLR_FD takes no argument.
    unsafe { ioctl(device, Plain::<LOOP_CLR_FD>(0)) }?;
    Ok(())
}

/// Has the device take the size of its file.
pub(crate) fn set_capacity(device: impl AsFd) -> io::Result<()> {
    // SAFETY: LOOP_SET_CAPACITY takes no argument.
    unsafe { ioctl(device, Plain::<LOOP_SET_CAPACITY>(0)) }?;
    Ok(())
}

/// A structure with nothing in it, which the kernel accepts as "all defaults".
pub(crate) fn empty_info() -> loop_info64 {
    loop_info64 {
        lo_device: 0,
        lo_inode: 0,
        lo_rdevice: 0,
        lo_offset: 0,
        lo_sizelimit: 0,
        lo_number: 0,
        lo_encrypt_type: 0,
        lo_encrypt_key_size: 0,
        lo_flags: 0,
        lo_file_name: [0; 64],
        lo_crypt_name: [0; 64],
        lo_encrypt_key: [0; 32],
        lo_init: [0; 2],
    }
}
