//! What filesystems are asked by requests of their own while they are mounted.
#![allow(
    unsafe_code,
    reason = "requests of filesystems, which have no safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOWR('X', 121, struct fstrim_range)` of `linux/fs.h`.
const FITRIM: u32 = 0xc018_5879;
/// `_IOW('f', 16, __u64)` of `fs/ext4/ext4.h`.
const EXT4_RESIZE: u32 = 0x4008_6610;
/// `_IOR('X', 100, struct xfs_fsop_geom_v1)` of `xfs/libxfs/xfs_fs.h`.
const XFS_GEOMETRY: u32 = 0x8070_5864;
/// `_IOW('X', 110, struct xfs_growfs_data)` of the same.
const XFS_GROW_DATA: u32 = 0x4010_586e;
/// `_IOW(0x94, 3, struct btrfs_ioctl_vol_args)` of `linux/btrfs.h`.
const BTRFS_RESIZE: u32 = 0x5000_9403;

/// `_IOWR(0x94, 30, struct btrfs_ioctl_dev_info_args)` of the same.
const BTRFS_DEVICE: u32 = 0xd000_941e;

#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    shortest: u64,
}

/// `struct xfs_fsop_geom_v1`, of which only what is used has a name.
#[repr(C)]
struct XfsGeometry {
    block_size: u32,
    others: [u32; 6],
    inode_percent: u32,
    data_blocks: u64,
    rest: [u64; 9],
}

#[repr(C)]
struct XfsGrowData {
    new_blocks: u64,
    inode_percent: u32,
}

#[repr(C)]
struct BtrfsArguments {
    device: i64,
    name: [u8; 4088],
}

/// `struct btrfs_ioctl_dev_info_args`, of which only what is used has a name.
#[repr(C)]
struct BtrfsDevice {
    id: u64,
    uuid: [u8; 16],
    used: u64,
    total: u64,
    rest: [u64; 507],
}

const _: () = {
    assert!(size_of::<BtrfsDevice>() == 4096);
    assert!(size_of::<TrimRange>() == 24);
    assert!(size_of::<XfsGeometry>() == 112);
    assert!(size_of::<XfsGrowData>() == 16);
    assert!(size_of::<BtrfsArguments>() == 4096);
};

/// Makes a request with a structure that goes with it.
///
/// # Safety
///
/// `T` has to be the structure of the request.
unsafe fn request<T>(mount: &File, number: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: the kernel reads and writes as many bytes as the number says, which are those of `T`, and keeps no pointer.
    let done = unsafe { libc::ioctl(mount.as_raw_fd(), number as _, std::ptr::from_mut(argument)) };
    match done {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Tells the device which blocks are free, and answers how many bytes those are. Blocks.
pub(crate) fn trim(mount: &File) -> io::Result<u64> {
    let mut range = TrimRange {
        start: 0,
        length: u64::MAX,
        shortest: 0,
    };
    // SAFETY: this is the structure of the request.
    unsafe { request(mount, FITRIM, &mut range) }?;
    Ok(range.length)
}

/// Gives an ext4 so many blocks. Blocks.
pub(crate) fn grow_ext4(mount: &File, mut blocks: u64) -> io::Result<()> {
    // SAFETY: the request takes a number of 64 bits.
    unsafe { request(mount, EXT4_RESIZE, &mut blocks) }
}

/// Gives an xfs all whole blocks of a size in bytes. Blocks.
pub(crate) fn grow_xfs(mount: &File, bytes: u64) -> io::Result<()> {
    let mut geometry = XfsGeometry {
        block_size: 0,
        others: [0; 6],
        inode_percent: 0,
        data_blocks: 0,
        rest: [0; 9],
    };
    // SAFETY: this is the structure of the request.
    unsafe { request(mount, XFS_GEOMETRY, &mut geometry) }?;
    let new_blocks = bytes
        .checked_div(geometry.block_size.into())
        .unwrap_or_default();
    if new_blocks <= geometry.data_blocks {
        return Ok(());
    }
    let mut grow = XfsGrowData {
        new_blocks,
        inode_percent: geometry.inode_percent,
    };
    // SAFETY: this is the structure of the request.
    unsafe { request(mount, XFS_GROW_DATA, &mut grow) }
}

/// The first device of a btrfs, which is the one that a request without another number is about.
const FIRST: u64 = 1;

/// Gives a btrfs all whole blocks of its only device, whose size is in bytes. Blocks.
pub(crate) fn grow_btrfs(mount: &File, bytes: u64, block: u64) -> io::Result<()> {
    let mut device = BtrfsDevice {
        id: FIRST,
        uuid: [0; 16],
        used: 0,
        total: 0,
        rest: [0; 507],
    };
    // SAFETY: this is the structure of the request.
    let known = unsafe { request(mount, BTRFS_DEVICE, &mut device) };
    // Linux refuses a size below 256 MiB also where it is the one that there is.
    if known.is_ok() && bytes.checked_div(block) <= device.total.checked_div(block) {
        return Ok(());
    }
    let mut arguments = BtrfsArguments {
        device: 0,
        name: [0; 4088],
    };
    arguments.name[..3].copy_from_slice(b"max");
    // SAFETY: this is the structure of the request, and the name in it ends with a zero.
    unsafe { request(mount, BTRFS_RESIZE, &mut arguments) }
}
