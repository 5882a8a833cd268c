//! The checks of a resolver.

use super::GuestFixture;
use super::checks::{Checks, Passed, attached, foreign, hostile};
use crate::ErrorKind::{Invalid, NotFound, Unsuitable};
use crate::Resolver;

/// Runs a [`Resolver`] through its checks:
///
/// - an attached device resolves to an absolute path, and to the same each time; a range is not empty
/// - two devices resolve to two different places
/// - resolving changes nothing
/// - a locator of another transport is `Unsuitable`
/// - an address that makes no sense is `Invalid` or `NotFound`
/// - a device that was taken out is `NotFound`
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn resolver(resolver: &dyn Resolver, fixture: &GuestFixture) -> Passed {
    let mut checks = Checks::of("resolver", &*fixture.snapshot);
    let before = checks.tables().await;
    let disks = fixture.two_disks();
    let locators = attached(&mut checks, &*fixture.transport, disks).await;
    let with_devices = checks.tables().await;

    let mut devices = Vec::new();
    for locator in &locators {
        let what = format!("resolve of {locator}");
        let check = "an attached device can be resolved";
        let device = checks
            .succeeds(check, &what, resolver.resolve(locator))
            .await;
        let again = checks
            .succeeds(check, &what, resolver.resolve(locator))
            .await;
        let said = format!("{what} answered {device:?}");
        checks.holds(
            "a device is at an absolute path",
            device.path.has_root(),
            &said,
        );
        let sensible = device
            .range
            .as_ref()
            .is_none_or(|range| range.start < range.end);
        checks.holds("a range is not empty", sensible, &said);
        checks.holds(
            "a device resolves to one place",
            device == again,
            format!("{said}, then {again:?}"),
        );
        devices.push(device);
    }
    let check = "two devices resolve to two places";
    checks.holds(
        check,
        devices[0] != devices[1],
        format!("both are {:?}", devices[0]),
    );
    checks
        .unchanged("resolving changes nothing", "resolve", &with_devices)
        .await;

    let check = "a locator of another transport is unsuitable";
    let other = foreign();
    let what = format!("resolve of {other}");
    checks
        .fails(check, &[Unsuitable], what, resolver.resolve(&other))
        .await;
    for locator in hostile(locators[0].transport()) {
        let check = "an address that makes no sense is invalid or not found";
        let what = format!("resolve of {locator}");
        checks
            .fails(
                check,
                &[Invalid, NotFound],
                what,
                resolver.resolve(&locator),
            )
            .await;
    }

    fixture
        .take_out(&mut checks, disks, &locators, &before)
        .await;
    let check = "a device that was taken out is not found";
    let what = format!("resolve of {}", locators[0]);
    checks
        .fails(check, &[NotFound], what, resolver.resolve(&locators[0]))
        .await;
    checks.passed()
}
