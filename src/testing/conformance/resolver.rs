//! The laws of a resolver.

use super::GuestFixture;
use super::laws::{Laws, Passed, attached, foreign, hostile};
use crate::ErrorKind::{Invalid, NotFound, Unsuitable};
use crate::Resolver;

/// Runs a [`Resolver`] through its laws:
///
/// - an attached device resolves to an absolute path, and to the same each time; a window is not empty
/// - two devices resolve to two different places
/// - resolving changes nothing
/// - a locator of another transport is `Unsuitable`
/// - an address that makes no sense is `Invalid` or `NotFound`
/// - a device that was taken out is `NotFound`
///
/// # Panics
///
/// At the first law that does not hold, and if the fixture has too few disks.
pub async fn resolver(resolver: &dyn Resolver, fixture: &GuestFixture) -> Passed {
    let mut laws = Laws::of("resolver", &fixture.snapshot);
    let before = laws.tables();
    let disks = fixture.two_disks();
    let locators = attached(&mut laws, &*fixture.transport, disks).await;
    let with_devices = laws.tables();

    let mut devices = Vec::new();
    for locator in &locators {
        let what = format!("resolve of {locator}");
        let law = "an attached device can be resolved";
        let device = laws.succeeds(law, &what, resolver.resolve(locator)).await;
        let again = laws.succeeds(law, &what, resolver.resolve(locator)).await;
        let said = format!("{what} answered {device:?}");
        laws.holds(
            "a device is at an absolute path",
            device.path.has_root(),
            &said,
        );
        let sensible = device
            .window
            .as_ref()
            .is_none_or(|window| window.start < window.end);
        laws.holds("a window is not empty", sensible, &said);
        laws.holds(
            "a device resolves to one place",
            device == again,
            format!("{said}, then {again:?}"),
        );
        devices.push(device);
    }
    let law = "two devices resolve to two places";
    laws.holds(
        law,
        devices[0] != devices[1],
        format!("both are {:?}", devices[0]),
    );
    laws.unchanged("resolving changes nothing", "resolve", &with_devices);

    let law = "a locator of another transport is unsuitable";
    let other = foreign();
    let what = format!("resolve of {other}");
    laws.fails(law, &[Unsuitable], what, resolver.resolve(&other))
        .await;
    for locator in hostile(locators[0].transport()) {
        let law = "an address that makes no sense is invalid or not found";
        let what = format!("resolve of {locator}");
        laws.fails(law, &[Invalid, NotFound], what, resolver.resolve(&locator))
            .await;
    }

    fixture.take_out(&mut laws, disks, &locators, &before).await;
    let law = "a device that was taken out is not found";
    let what = format!("resolve of {}", locators[0]);
    laws.fails(law, &[NotFound], what, resolver.resolve(&locators[0]))
        .await;
    laws.passed()
}
