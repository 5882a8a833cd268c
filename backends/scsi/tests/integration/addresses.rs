//! Addresses from outside: nothing is cut to fit, and each place has one spelling.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use blockmount::{BackendError, DeviceLocator, ErrorKind};
use blockmount_scsi::{Controller, InvalidAddress, Lun, ScsiAddress};
use proptest::prelude::*;

fn read(text: &str) -> Result<ScsiAddress, InvalidAddress> {
    ScsiAddress::try_from(&text.parse::<DeviceLocator>().unwrap())
}

#[test]
fn o25_addresses_never_truncate() {
    // What is 0/3 if it is cut to 8 or 16 or 32 or 64 bits.
    for text in [
        "256/3",
        "0/65539",
        "4294967296/3",
        "0/4294967299",
        "65536/65539",
    ] {
        let error = read(&format!("scsi:{text}")).unwrap_err();
        assert!(matches!(error, InvalidAddress::TooHigh { .. }), "{error}");
        assert_eq!(BackendError::from(error).kind(), ErrorKind::Invalid);
    }
    let error = read("scsi:18446744073709551616/3").unwrap_err();
    assert!(matches!(error, InvalidAddress::Malformed(_)), "{error}");
    for (number, fits) in [
        (0, true),
        (63, true),
        (64, false),
        (256, false),
        (u64::MAX, false),
    ] {
        assert_eq!(Controller::try_from(number).is_ok(), fits);
    }
    for (number, fits) in [
        (16_383, true),
        (16_384, false),
        (65_536, false),
        (u64::MAX, false),
    ] {
        assert_eq!(Lun::try_from(number).is_ok(), fits);
    }
    let error = Lun::try_from(16_384).unwrap_err().to_string();
    assert_eq!(error, "there is no LUN 16384; the highest is 16383");
}

#[test]
fn hostile_locators_are_refused() {
    for text in [
        "1", "1/", "/1", "/", "1/2/3", "1//2", "-1/2", "1/-2", "+1/2", "1/+2", "01/2", "1/02",
        "00/0", "0x1/2", "1.0/2", "a/b", "1/2;", "1\\2", "1/2@0+1", "1:2", "1e0/2",
    ] {
        let error = read(&format!("scsi:{text}")).unwrap_err();
        assert_eq!(error, InvalidAddress::Malformed(text.into()));
        assert_eq!(BackendError::from(error).kind(), ErrorKind::Invalid);
    }
    let long = read(&format!("scsi:{}", "9".repeat(250)))
        .unwrap_err()
        .to_string();
    assert!(long.len() < 200, "{long}");
}

#[test]
fn locators_of_other_transports_are_refused() {
    for text in ["vpmem:0/3", "loop:0/3", "scsi-2:0/3"] {
        let error = read(text).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{text} is not the locator of a SCSI disk")
        );
        assert_eq!(BackendError::from(error).kind(), ErrorKind::Unsuitable);
    }
}

proptest! {
    #[test]
    fn an_address_reads_back_as_itself(controller in 0_u64..64, lun in 0_u64..16_384) {
        let controller = Controller::try_from(controller).unwrap();
        let address = ScsiAddress::new(controller, Lun::try_from(lun).unwrap());
        let locator = DeviceLocator::from(address);
        prop_assert_eq!(locator.as_str(), &format!("scsi:{controller}/{lun}"));
        prop_assert_eq!(ScsiAddress::try_from(&locator), Ok(address));
    }

    /// Whatever is read prints as it was: no two spellings of one place.
    #[test]
    fn each_place_has_one_spelling(text in "[0-9+/ -]{1,12}") {
        if let Ok(address) = text.parse::<ScsiAddress>() {
            prop_assert_eq!(address.to_string(), text);
        }
    }
}

#[test]
fn a_serial_number_names_one_address() {
    for (text, serial) in [("0/3", "bm-scsi-0-3"), ("63/16383", "bm-scsi-63-16383")] {
        let address: ScsiAddress = text.parse().unwrap();
        assert_eq!(address.serial(), serial);
        assert_eq!(ScsiAddress::from_serial(serial), Some(address));
    }
    for other in [
        "",
        "bm-scsi-",
        "bm-scsi-0",
        "bm-scsi-0-",
        "bm-scsi-00-3",
        "bm-scsi-64-0",
        "bm-scsi-0-3 ",
        "0-3",
    ] {
        assert_eq!(ScsiAddress::from_serial(other), None, "{other:?}");
    }
}
