//! The checks of a resolver.

use super::check::contract;
use super::fixture::GuestFixture;
use super::hostile::{foreign, hostile};
use super::run::Run;
use super::{Broken, Passed};
use crate::ErrorKind::{Invalid, NotFound, Unsuitable};
use crate::Resolver;

contract! { "resolver" ATTACHABLE REMOVABLE {
    RESOLVE = "an attached device can be resolved";
    ABSOLUTE = "a device is at an absolute path";
    RANGE = "a range is not empty";
    ONE_PLACE = "a device resolves to one place";
    TWO_PLACES = "two devices resolve to two places";
    HARMLESS = "resolving changes nothing";
    FOREIGN = "a locator of another transport is unsuitable";
    NONSENSE = "an address that makes no sense is invalid or not found";
    REMOVED = "a device that was taken out is not found";
    MEASURED = "to measure a device that was taken out finds nothing";
}}

/// Runs a [`Resolver`] through its checks:
///
/// - an attached device resolves to an absolute path, and to the same each time; a range is not empty
/// - two devices resolve to two different places
/// - resolving changes nothing
/// - a locator of another transport is `Unsuitable`
/// - an address that makes no sense is `Invalid` or `NotFound`
/// - a device that was taken out is `NotFound`, and to measure it is no error
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn resolver(resolver: &dyn Resolver, fixture: &GuestFixture) -> Passed {
    match try_resolver(resolver, fixture).await {
        Ok(passed) => passed,
        Err(broken) => panic!("{broken}"),
    }
}

/// As [`resolver()`], without the panic.
///
/// # Errors
///
/// The first check that does not hold.
///
/// # Panics
///
/// If the fixture has too few disks.
pub async fn try_resolver(
    resolver: &dyn Resolver,
    fixture: &GuestFixture,
) -> Result<Passed, Broken> {
    let mut run = Run::of(&CONTRACT, &*fixture.snapshot, fixture.faults.as_deref());
    let before = run.tables().await;
    let disks = fixture.two_disks();
    let locators = run.attached(&*fixture.transport, disks).await?;
    let with_devices = run.tables().await;

    let mut devices = Vec::new();
    for locator in &locators {
        let what = format!("resolve of {locator}");
        let device = run
            .succeeds(RESOLVE, &what, resolver.resolve(locator))
            .await?;
        let again = run
            .succeeds(RESOLVE, &what, resolver.resolve(locator))
            .await?;
        let said = format!("{what} answered {device:?}");
        run.holds(ABSOLUTE, device.path.has_root(), &said)?;
        let range = device.range.as_ref();
        run.holds(RANGE, range.is_none_or(|range| !range.is_empty()), &said)?;
        run.holds(
            ONE_PLACE,
            device == again,
            format!("{said}, then {again:?}"),
        )?;
        devices.push(device);
    }
    let said = format!("both are {:?}", devices[0]);
    run.holds(TWO_PLACES, devices[0] != devices[1], said)?;
    run.unchanged(HARMLESS, "resolve", &with_devices).await?;

    let other = foreign();
    let what = format!("resolve of {other}");
    run.fails(FOREIGN, &[Unsuitable], what, resolver.resolve(&other))
        .await?;
    for locator in hostile(locators[0].transport()) {
        let what = format!("resolve of {locator}");
        let call = resolver.resolve(&locator);
        run.fails(NONSENSE, &[Invalid, NotFound], what, call)
            .await?;
    }

    run.take_out(fixture, disks, &locators).await?;
    let what = format!("resolve of {}", locators[0]);
    let call = resolver.resolve(&locators[0]);
    run.fails(REMOVED, &[NotFound], what, call).await?;
    let what = format!("measure of {}", locators[0]);
    let measured = resolver.measure(&locators[0]);
    let differs = run.succeeds(MEASURED, &what, measured).await?;
    run.holds(MEASURED, !differs, &what)?;
    run.end(&before).await
}
