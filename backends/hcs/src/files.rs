//! Files of Windows: which one a name means.
#![allow(unsafe_code)] // the call is argued for where it stands

use std::fs::{File, OpenOptions};
use std::io;
use std::os::windows::fs::OpenOptionsExt;
use std::os::windows::io::AsRawHandle;
use std::path::{Path, PathBuf};

use blockmount::DiskId;
use blockmount_bridge::gcs::Hresult;
use windows_sys::Win32::Storage::FileSystem::{
    FILE_ID_INFO, FileIdInfo, GetFileInformationByHandleEx,
};

use crate::HcsError;

/// Says which file or device a name means, whichever process has it open.
pub(crate) fn file_id(path: &Path) -> io::Result<DiskId> {
    // No access is asked for, so that a disk which a VM has to itself can be looked at.
    let file = OpenOptions::new().access_mode(0).open(path)?;
    let name = match number(&file) {
        Some(FILE_ID_INFO {
            VolumeSerialNumber,
            FileId,
        }) => format!(
            "file {:032x} of volume {VolumeSerialNumber:016x}",
            u128::from_le_bytes(FileId.Identifier)
        ),
        // Devices, and filesystems that number no files. Case makes no difference in a name.
        None => {
            let name = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            name.to_string_lossy().to_uppercase()
        }
    };
    Ok(DiskId::name(&name))
}

fn number(file: &File) -> Option<FILE_ID_INFO> {
    let mut info = FILE_ID_INFO::default();
    let size = u32::try_from(size_of::<FILE_ID_INFO>()).ok()?;
    // SAFETY: the handle is open, and the call writes at most `size` bytes to memory of that size, for which any bytes are a value.
    let done = unsafe {
        let info = (&raw mut info).cast();
        GetFileInformationByHandleEx(file.as_raw_handle(), FileIdInfo, info, size)
    };
    (done != 0).then_some(info)
}

/// The file behind a name, without links, in the form that users write.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf, HcsError> {
    let resolved = path.canonicalize().map_err(|error| {
        let message = error.to_string();
        match error.raw_os_error() {
            // A result as the system's own functions give it for its error.
            Some(code) => HcsError::Failed {
                result: Hresult::from_bits(0x8007_0000 | (code.cast_unsigned() & 0xffff)),
                message,
            },
            // The name was not even passed on to the system.
            None => HcsError::Unsendable(message),
        }
    })?;
    Ok(plain(resolved))
}

/// `C:\disk.vhdx` for `\\?\C:\disk.vhdx`, which not all functions take. What is too long for the short form stays.
fn plain(path: PathBuf) -> PathBuf {
    const LONGEST: usize = 259;
    let short = path
        .to_str()
        .and_then(|text| text.strip_prefix(r"\\?\"))
        .filter(|rest| rest.as_bytes().get(1..3) == Some(br":\") && rest.len() <= LONGEST);
    short.map(PathBuf::from).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_short_names_of_drives_become_plain() {
        let long = format!(r"\\?\C:\{}", "a".repeat(300));
        for (verbatim, expected) in [
            (r"\\?\C:\a b\c.vhdx", r"C:\a b\c.vhdx"),
            (r"C:\a", r"C:\a"),
            (r"\\?\UNC\server\share\a", r"\\?\UNC\server\share\a"),
            (r"\\?\Volume{0}\a", r"\\?\Volume{0}\a"),
            (&long, &long),
        ] {
            assert_eq!(plain(PathBuf::from(verbatim)), Path::new(expected));
        }
    }
}
