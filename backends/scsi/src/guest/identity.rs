//! Whether the disk at an address is the one that the host put there.

use std::path::Path;

use blockmount::BackendError;
use blockmount_linux::sysfs;
use blockmount_linux::uevent::{NotReady, Probe};

use crate::ScsiAddress;

/// Refuses the disk with this directory if its serial number is [that](ScsiAddress::serial) of another address; it may
/// be about to be replaced. A serial number of any other form proves nothing: Hyper-V chooses its own.
pub(super) fn check(address: ScsiAddress, device: &Path) -> Probe<()> {
    let page = sysfs::bytes(device, "vpd_pg80")?;
    let serial = page.and_then(|page| serial(&page)).unwrap_or_default();
    match ScsiAddress::from_serial(&serial) {
        Some(other) if other != address => Err(NotReady::NotYet(BackendError::conflict(format!(
            "another disk is there: its serial number is {serial} and not {}",
            address.serial()
        )))),
        _ => Ok(()),
    }
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
