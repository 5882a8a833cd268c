//! Addresses from outside: nothing is cut to fit, and each place has one spelling.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use blockmount::{BackendError, DeviceLocator, ErrorKind};
use blockmount_vpmem::{ByteRange, DeviceNumber, InvalidAddress, PAGE, VpmemAddress};
use proptest::prelude::*;

fn read(text: &str) -> Result<VpmemAddress, InvalidAddress> {
    VpmemAddress::try_from(&text.parse::<DeviceLocator>().unwrap())
}

#[test]
fn numbers_are_never_cut() {
    // What is device 3 if it is cut to 7, 8, 16 or 32 bits.
    for number in [128 + 3, 256 + 3, 65_536 + 3, (1 << 32) + 3] {
        let error = read(&format!("vpmem:{number}")).unwrap_err();
        assert_eq!(error, InvalidAddress::NoSuchDevice(number));
        assert_eq!(BackendError::from(error).kind(), ErrorKind::Invalid);
    }
    let error = read("vpmem:18446744073709551619").unwrap_err();
    assert!(matches!(error, InvalidAddress::Malformed(_)), "{error}");
    assert_eq!(read("vpmem:127").unwrap().device.get(), 127);
}

#[test]
fn ranges_are_whole_pages_and_end_somewhere() {
    let last = u64::MAX - u64::MAX % PAGE;
    for (offset, size, is_one) in [
        (0, PAGE, true),
        (last - PAGE, PAGE, true),
        (PAGE, last - PAGE, true),
        (0, 0, false),
        (0, 1, false),
        (1, PAGE, false),
        (0, PAGE + 512, false),
        (last, PAGE, false),
        (PAGE, last, false),
    ] {
        let range = ByteRange::new(offset, size);
        assert_eq!(range.is_ok(), is_one, "{offset}+{size}");
        let read = read(&format!("vpmem:1@{offset}+{size}"));
        assert_eq!(read.map(|address| address.range.unwrap()), range);
    }
    let error = ByteRange::new(0, 512).unwrap_err().to_string();
    assert_eq!(error, "0+512 is not a range of whole pages of 4096 bytes");
}

#[test]
fn hostile_locators_are_refused() {
    for text in [
        "@",
        "1@",
        "@0+4096",
        "1@0",
        "1@0+",
        "1@+4096",
        "1@0-4096",
        "1@0+4096+1",
        "1@0+4096@1",
        "-1",
        "+1",
        "01",
        "1@00+4096",
        "1@0+04096",
        "1@0x0+4096",
        "1.0",
        "a",
        "1/2",
        "1@0+4k",
        "1;",
    ] {
        let error = read(&format!("vpmem:{text}")).unwrap_err();
        assert_eq!(error, InvalidAddress::Malformed(text.into()));
        assert_eq!(BackendError::from(error).kind(), ErrorKind::Invalid);
    }
    let long = read(&format!("vpmem:{}", "9".repeat(240)));
    let long = long.unwrap_err().to_string();
    assert!(long.len() < 200, "{long}");
}

#[test]
fn locators_of_other_transports_are_refused() {
    for text in ["scsi:0", "loop:0", "vpmem-2:0"] {
        let error = read(text).unwrap_err();
        let said = format!("{text} is not the locator of a VPMEM device");
        assert_eq!(error.to_string(), said);
        assert_eq!(BackendError::from(error).kind(), ErrorKind::Unsuitable);
    }
}

proptest! {
    #[test]
    fn an_address_reads_back_as_itself(
        device in 0_u64..128,
        pages in prop::option::of((0_u64..1 << 40, 1_u64..1 << 40)),
    ) {
        let range = pages.map(|(start, pages)| ByteRange::new(start * PAGE, pages * PAGE).unwrap());
        let address = VpmemAddress { device: DeviceNumber::try_from(device).unwrap(), range };
        prop_assert_eq!(VpmemAddress::try_from(&DeviceLocator::from(address)), Ok(address));
    }

    /// Whatever is read prints as it was: no two spellings of one place.
    #[test]
    fn each_place_has_one_spelling(text in "[0-9]{1,3}(@(0|00|4096|04096|8192|1)\\+(4096|8192|0|04096))?") {
        if let Ok(address) = text.parse::<VpmemAddress>() {
            prop_assert_eq!(address.to_string(), text);
        }
    }
}
