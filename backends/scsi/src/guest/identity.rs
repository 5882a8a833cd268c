//! Whether the disk at an address is the one that is meant.

use std::fmt::Display;
use std::path::Path;

use blockmount::BackendError;
use blockmount_linux::sysfs::{self, Disk};
use blockmount_linux::uevent::{NotReady, Probe};

/// What is known of a disk besides its address. Nothing by default, and then any disk will do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// Its size in bytes.
    pub size: Option<u64>,
    /// Its serial number (page 0x80 of the vital product data), without blanks around it.
    pub serial: Option<String>,
    /// Its world-wide name as Linux shows it (from page 0x83), such as `naa.5000c500a1b2c3d4`.
    pub wwid: Option<String>,
}

impl Identity {
    /// Compares with the disk at an address, whose device has this directory. A disk that differs may be
    /// one that is about to be replaced.
    pub(super) fn check(&self, device: &Path, disk: &Disk) -> Probe<()> {
        differs("size", self.size.as_ref(), Some(disk.size()).as_ref())?;
        if let Some(expected) = &self.serial {
            let page = sysfs::bytes(device, "vpd_pg80")?;
            let serial = page.and_then(|page| serial(&page));
            differs("serial number", Some(expected), serial.as_ref())?;
        }
        if let Some(expected) = &self.wwid {
            let wwid = sysfs::text(device, "wwid")?;
            differs("world-wide name", Some(expected), wwid.as_ref())?;
        }
        Ok(())
    }
}

fn differs<T: PartialEq + Display>(
    what: &str,
    expected: Option<&T>,
    found: Option<&T>,
) -> Probe<()> {
    let Some(expected) = expected.filter(|expected| found != Some(expected)) else {
        return Ok(());
    };
    let found = found.map_or("none".to_owned(), ToString::to_string);
    Err(NotReady::NotYet(BackendError::conflict(format!(
        "another disk is there: its {what} is {found} and not {expected}"
    ))))
}

/// The bytes before the serial number in page 0x80: the kind of device, the number of the page, and two
/// for the length of the rest, most significant first. (Source: SPC-5, 7.7.18)
const HEADER: usize = 4;

fn serial(page: &[u8]) -> Option<String> {
    let &[_, 0x80, high, low] = page.first_chunk::<HEADER>()? else {
        return None;
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let text = page.get(HEADER..HEADER + length)?;
    let text = std::str::from_utf8(text).ok()?;
    Some(text.trim_matches([' ', '\0']).to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(text: &[u8]) -> Vec<u8> {
        let mut page = vec![0, 0x80, 0, text.len() as u8];
        page.extend(text);
        page
    }

    #[test]
    fn reads_the_serial_number_of_page_80() {
        assert_eq!(serial(&page(b"  layer-7 ")).unwrap(), "layer-7");
        assert_eq!(serial(&page(b"")).unwrap(), "");
        let mut cut = page(b"layer-7");
        cut.pop();
        assert_eq!(serial(&cut), None);
        assert_eq!(serial(&[0, 0x83, 0, 0]), None);
        assert_eq!(serial(&page(&[0xff])), None);
    }

    proptest! {
        #[test]
        fn never_panics(page in proptest::collection::vec(any::<u8>(), 0..80), length: u8) {
            let _ = serial(&page);
            let mut near = vec![0, 0x80, 0, length];
            near.extend(page);
            let _ = serial(&near);
        }
    }
}
