//! Keys that the owner of a guest places in it, for disks that are encrypted with them.
#![allow(
    unsafe_code,
    reason = "the calls of the kernel's keyring have no safe wrapper"
)]

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The keyring of root.
const USER_KEYRING: libc::c_long = -4;
const SEARCH: libc::c_long = 10;
const INVALIDATE: libc::c_long = 21;

/// Has the kernel keep a key of a type.
pub(crate) fn add(kind: &str, description: &str, bytes: &[u8]) -> io::Result<()> {
    let (kind, description) = (CString::new(kind)?, CString::new(description)?);
    let (kind, description) = (kind.as_ptr(), description.as_ptr());
    // SAFETY: the strings end with a NUL, the key has as many bytes as are given, and all outlive the call.
    let id = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            kind,
            description,
            bytes.as_ptr(),
            bytes.len(),
            USER_KEYRING,
        )
    };
    answered(id).map(drop)
}

/// Has the kernel forget it.
pub(crate) fn remove(kind: &str, description: &str) -> io::Result<()> {
    let (kind, description) = (CString::new(kind)?, CString::new(description)?);
    let (kind, description) = (kind.as_ptr(), description.as_ptr());
    // SAFETY: the strings end with a NUL and outlive the call.
    let id = unsafe { libc::syscall(libc::SYS_keyctl, SEARCH, USER_KEYRING, kind, description, 0) };
    let id = answered(id)?;
    // SAFETY: the call takes numbers only.
    answered(unsafe { libc::syscall(libc::SYS_keyctl, INVALIDATE, id) }).map(drop)
}

fn answered(answer: libc::c_long) -> io::Result<libc::c_long> {
    match answer {
        -1 => Err(io::Error::last_os_error()),
        id => Ok(id),
    }
}

/// The files below a directory that have these bytes in them.
pub(crate) fn files_with(bytes: &[u8], below: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(below)? {
        let (entry, path) = entry.map(|entry| (entry.file_type(), entry.path()))?;
        if entry?.is_dir() {
            found.extend(files_with(bytes, &path)?);
        } else if fs::read(&path)?
            .windows(bytes.len())
            .any(|part| part == bytes)
        {
            found.push(path);
        }
    }
    Ok(found)
}
