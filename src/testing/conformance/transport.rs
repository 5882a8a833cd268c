//! The checks of a transport.

use crate::testing::AttachIdentified as _;
use std::collections::HashSet;

use super::TransportFixture;
use super::checks::{Checks, Passed, at_once};
use crate::ErrorKind::{Full, NotFound};
use crate::{DeviceLocator, Disk, Transport};

/// Runs a [`Transport`] through its checks:
///
/// - identify: the same disk has the same id, under its other names too, attached or not; different
///   disks have different ids; a missing one is `NotFound`; nothing changes by asking
/// - detach of a disk that was never attached, or is missing, succeeds and changes nothing
/// - attach of a missing disk is `NotFound` and leaves nothing
/// - attach shows in the snapshot; all locators are of one transport; two disks have two locators, also
///   when attached at once
/// - detach leaves nothing of the disk, succeeds a second time, and touches no other disk
/// - a disk can be attached again after it was detached
/// - with a capacity: one disk more than fits is `Full` and leaves nothing; after a detach it fits
/// - with `remove_source`: an attached disk whose source is gone can be detached
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn transport(transport: &dyn Transport, fixture: &TransportFixture) -> Passed {
    let capacity = fixture.capacity.unwrap_or(1).max(1);
    let disks = fixture.disks.len();
    assert!(
        disks >= 2 && disks > capacity,
        "{disks} disks are too few for this suite"
    );
    let mut checks = Checks::of("transport", &*fixture.snapshot);
    let before = checks.tables().await;

    identify(&mut checks, transport, fixture).await;
    absent(&mut checks, transport, fixture).await;
    round_trip(&mut checks, transport, fixture).await;
    if fixture.capacity.is_none_or(|capacity| capacity >= 2) {
        two_disks(&mut checks, transport, &fixture.disks[..2]).await;
    }
    if let Some(capacity) = fixture.capacity {
        full(&mut checks, transport, &fixture.disks[..=capacity]).await;
    }
    if let (Some(remove), Some(disk)) = (&fixture.remove_source, fixture.disks.last()) {
        let check = "a disk whose source is gone can be detached";
        checks
            .succeeds(
                "a disk can be attached",
                on("attach", disk),
                transport.attach_identified(disk),
            )
            .await;
        remove(disk);
        checks
            .succeeds(check, on("detach", disk), transport.detach(disk))
            .await;
        checks.unchanged(check, on("detach", disk), &before).await;
    }
    checks
        .unchanged("a suite leaves nothing behind", "the suite", &before)
        .await;
    checks.passed()
}

fn on(step: &str, disk: &Disk) -> String {
    format!("{step} of {disk}")
}

async fn identify(checks: &mut Checks<'_>, transport: &dyn Transport, fixture: &TransportFixture) {
    let before = checks.tables().await;
    let mut ids = HashSet::new();
    for disk in &fixture.disks {
        let check = "a disk that is there has an id";
        let id = checks
            .succeeds(check, on("identify", disk), transport.identify(disk))
            .await;
        let again = checks
            .succeeds(check, on("identify", disk), transport.identify(disk))
            .await;
        let check = "a disk has one id";
        checks.holds(
            check,
            id == again,
            format!("{disk} is {id:?}, then {again:?}"),
        );
        let check = "different disks have different ids";
        checks.holds(
            check,
            ids.insert(id.clone()),
            format!("{disk} and another one are {id:?}"),
        );
    }
    same_under_every_name(checks, transport, fixture).await;
    checks
        .unchanged("identify changes nothing", "identify", &before)
        .await;
    let missing = &fixture.missing;
    let check = "a missing disk is not found";
    checks
        .fails(
            check,
            &[NotFound],
            on("identify", missing),
            transport.identify(missing),
        )
        .await;
}

async fn same_under_every_name(
    checks: &mut Checks<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
) {
    let check = "a disk has one id under all its names";
    let disk = &fixture.disks[0];
    let id = checks
        .succeeds(check, on("identify", disk), transport.identify(disk))
        .await;
    for alias in &fixture.aliases {
        let other = checks
            .succeeds(check, on("identify", alias), transport.identify(alias))
            .await;
        checks.holds(
            check,
            id == other,
            format!("{disk} is {id:?}, but {alias} is {other:?}"),
        );
    }
}

async fn absent(checks: &mut Checks<'_>, transport: &dyn Transport, fixture: &TransportFixture) {
    let before = checks.tables().await;
    let check = "detaching what was never attached succeeds";
    for disk in [&fixture.disks[0], &fixture.missing] {
        checks
            .succeeds(check, on("detach", disk), transport.detach(disk))
            .await;
        checks.unchanged(check, on("detach", disk), &before).await;
    }
    let missing = &fixture.missing;
    let check = "attaching a missing disk is not found and leaves nothing";
    checks
        .fails(
            check,
            &[NotFound],
            on("attach", missing),
            transport.attach_identified(missing),
        )
        .await;
    let check = "detaching after a failed attach succeeds";
    checks
        .succeeds(check, on("detach", missing), transport.detach(missing))
        .await;
}

async fn attach(checks: &mut Checks<'_>, transport: &dyn Transport, disk: &Disk) -> DeviceLocator {
    let before = checks.tables().await;
    let check = "a disk can be attached";
    let locator = checks
        .succeeds(check, on("attach", disk), transport.attach_identified(disk))
        .await;
    checks
        .changed("attaching shows in the tables", on("attach", disk), &before)
        .await;
    locator
}

async fn round_trip(
    checks: &mut Checks<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
) {
    let disk = &fixture.disks[0];
    let before = checks.tables().await;
    let mut schemes = HashSet::new();
    // The second round is the check that a disk can be attached again.
    for _ in 0..2 {
        let locator = attach(checks, transport, disk).await;
        schemes.insert(locator.transport().to_owned());
        same_under_every_name(checks, transport, fixture).await;
        let check = "detaching leaves nothing";
        checks
            .succeeds(check, on("detach", disk), transport.detach(disk))
            .await;
        checks.unchanged(check, on("detach", disk), &before).await;
        let check = "detaching twice succeeds";
        checks
            .succeeds(check, on("second detach", disk), transport.detach(disk))
            .await;
        checks
            .unchanged(check, on("second detach", disk), &before)
            .await;
    }
    let check = "all locators are of one transport";
    checks.holds(
        check,
        schemes.len() == 1,
        format!("its devices are on {schemes:?}"),
    );
}

async fn two_disks(checks: &mut Checks<'_>, transport: &dyn Transport, disks: &[Disk]) {
    let before = checks.tables().await;
    let one = attach(checks, transport, &disks[0]).await;
    let with_one = checks.tables().await;
    let other = attach(checks, transport, &disks[1]).await;
    let check = "two disks have two locators";
    checks.holds(check, one != other, format!("both disks are {one}"));
    let check = "detaching touches no other disk";
    checks
        .succeeds(check, on("detach", &disks[1]), transport.detach(&disks[1]))
        .await;
    checks
        .unchanged(check, on("detach", &disks[1]), &with_one)
        .await;
    checks
        .succeeds(check, on("detach", &disks[0]), transport.detach(&disks[0]))
        .await;
    checks
        .unchanged(check, on("detach", &disks[0]), &before)
        .await;

    let check = "disks can be attached at once";
    let answers = {
        let judge = &*checks;
        at_once(
            disks
                .iter()
                .map(|disk| judge.call(on("attach", disk), transport.attach_identified(disk))),
        )
        .await
    };
    let mut locators = HashSet::new();
    for (disk, answer) in disks.iter().zip(answers) {
        let locator = checks
            .succeeds(check, on("attach", disk), std::future::ready(answer))
            .await;
        checks.holds(
            check,
            locators.insert(locator.clone()),
            format!("two disks are {locator}"),
        );
    }
    let check = "disks can be detached at once";
    let answers = {
        let judge = &*checks;
        at_once(
            disks
                .iter()
                .map(|disk| judge.call(on("detach", disk), transport.detach(disk))),
        )
        .await
    };
    for (disk, answer) in disks.iter().zip(answers) {
        checks
            .succeeds(check, on("detach", disk), std::future::ready(answer))
            .await;
    }
    checks.unchanged(check, "detaching both", &before).await;
}

async fn full(checks: &mut Checks<'_>, transport: &dyn Transport, disks: &[Disk]) {
    let [first, middle @ .., one_more] = disks else {
        return;
    };
    let before = checks.tables().await;
    let mut locators = HashSet::new();
    for disk in std::iter::once(first).chain(middle) {
        let locator = attach(checks, transport, disk).await;
        let check = "two disks have two locators";
        checks.holds(
            check,
            locators.insert(locator.clone()),
            format!("two disks are {locator}"),
        );
    }
    let check = "one disk more than fits is refused as full and leaves nothing";
    checks
        .fails(
            check,
            &[Full],
            on("attach", one_more),
            transport.attach_identified(one_more),
        )
        .await;
    let check = "a detach makes room";
    checks
        .succeeds(check, on("detach", first), transport.detach(first))
        .await;
    checks
        .succeeds(
            check,
            on("attach", one_more),
            transport.attach_identified(one_more),
        )
        .await;
    for disk in middle.iter().chain([one_more]) {
        checks
            .succeeds(
                "a full transport can be emptied",
                on("detach", disk),
                transport.detach(disk),
            )
            .await;
    }
    checks
        .unchanged("a full transport can be emptied", "detaching all", &before)
        .await;
}
