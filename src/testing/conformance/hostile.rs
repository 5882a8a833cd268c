//! Locators and targets that no backend can do anything with.

use std::path::PathBuf;

use crate::DeviceLocator;

/// Locators of a transport with addresses that no device has: some make no sense, some are just
/// too big, some mean something to a shell, a path or a format string.
pub(super) fn hostile(scheme: &str) -> Vec<DeviceLocator> {
    let long = "9".repeat(DeviceLocator::MAX_LEN - scheme.len() - 1);
    [
        "-1",
        "4294967296",
        "18446744073709551616",
        "1/-1",
        "0/0/0/0",
        "1@2",
        "1@0+0",
        "0x10",
        "+1",
        "../../etc/passwd",
        "/dev/null",
        "%s%n",
        "$(reboot)",
        ";",
        "\"",
        &long,
    ]
    .into_iter()
    .map(|address| DeviceLocator::new(scheme, address).expect("visible ASCII is an address"))
    .collect()
}

/// A locator of a transport that does not exist.
pub(super) fn foreign() -> DeviceLocator {
    DeviceLocator::new("no-such-transport", 0).expect("a lower-case word is a transport")
}

/// Targets that cannot be.
pub(super) fn impossible_targets() -> Vec<PathBuf> {
    let long = format!("/{}", "a".repeat(5_000));
    ["", "relative", "./relative", "/", "/nul\0byte", &long]
        .into_iter()
        .map(PathBuf::from)
        .collect()
}
