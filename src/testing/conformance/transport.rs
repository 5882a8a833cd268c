//! The laws of a transport.

use std::collections::HashSet;

use super::TransportFixture;
use super::laws::{Laws, Passed, at_once};
use crate::ErrorKind::{Full, NotFound};
use crate::{DeviceLocator, Disk, Transport};

/// Runs a [`Transport`] through its laws:
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
/// At the first law that does not hold, and if the fixture has too few disks.
pub async fn transport(transport: &dyn Transport, fixture: &TransportFixture) -> Passed {
    let capacity = fixture.capacity.unwrap_or(1).max(1);
    let disks = fixture.disks.len();
    assert!(
        disks >= 2 && disks > capacity,
        "{disks} disks are too few for this suite"
    );
    let mut laws = Laws::of("transport", &fixture.snapshot);
    let before = laws.tables();

    identify(&mut laws, transport, fixture).await;
    absent(&mut laws, transport, fixture).await;
    round_trip(&mut laws, transport, fixture).await;
    if fixture.capacity.is_none_or(|capacity| capacity >= 2) {
        two_disks(&mut laws, transport, &fixture.disks[..2]).await;
    }
    if let Some(capacity) = fixture.capacity {
        full(&mut laws, transport, &fixture.disks[..=capacity]).await;
    }
    if let (Some(remove), Some(disk)) = (&fixture.remove_source, fixture.disks.last()) {
        let law = "a disk whose source is gone can be detached";
        laws.succeeds(
            "a disk can be attached",
            on("attach", disk),
            transport.attach(disk),
        )
        .await;
        remove(disk);
        laws.succeeds(law, on("detach", disk), transport.detach(disk))
            .await;
        laws.unchanged(law, on("detach", disk), &before);
    }
    laws.unchanged("a suite leaves nothing behind", "the suite", &before);
    laws.passed()
}

fn on(step: &str, disk: &Disk) -> String {
    format!("{step} of {disk}")
}

async fn identify(laws: &mut Laws<'_>, transport: &dyn Transport, fixture: &TransportFixture) {
    let before = laws.tables();
    let mut ids = HashSet::new();
    for disk in &fixture.disks {
        let law = "a disk that is there has an id";
        let id = laws
            .succeeds(law, on("identify", disk), transport.identify(disk))
            .await;
        let again = laws
            .succeeds(law, on("identify", disk), transport.identify(disk))
            .await;
        let law = "a disk has one id";
        laws.holds(
            law,
            id == again,
            format!("{disk} is {id:?}, then {again:?}"),
        );
        let law = "different disks have different ids";
        laws.holds(
            law,
            ids.insert(id.clone()),
            format!("{disk} and another one are {id:?}"),
        );
    }
    same_under_every_name(laws, transport, fixture).await;
    laws.unchanged("identify changes nothing", "identify", &before);
    let missing = &fixture.missing;
    let law = "a missing disk is not found";
    laws.fails(
        law,
        &[NotFound],
        on("identify", missing),
        transport.identify(missing),
    )
    .await;
}

async fn same_under_every_name(
    laws: &mut Laws<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
) {
    let law = "a disk has one id under all its names";
    let disk = &fixture.disks[0];
    let id = laws
        .succeeds(law, on("identify", disk), transport.identify(disk))
        .await;
    for alias in &fixture.aliases {
        let other = laws
            .succeeds(law, on("identify", alias), transport.identify(alias))
            .await;
        laws.holds(
            law,
            id == other,
            format!("{disk} is {id:?}, but {alias} is {other:?}"),
        );
    }
}

async fn absent(laws: &mut Laws<'_>, transport: &dyn Transport, fixture: &TransportFixture) {
    let before = laws.tables();
    let law = "detaching what was never attached succeeds";
    for disk in [&fixture.disks[0], &fixture.missing] {
        laws.succeeds(law, on("detach", disk), transport.detach(disk))
            .await;
        laws.unchanged(law, on("detach", disk), &before);
    }
    let missing = &fixture.missing;
    let law = "attaching a missing disk is not found and leaves nothing";
    laws.fails(
        law,
        &[NotFound],
        on("attach", missing),
        transport.attach(missing),
    )
    .await;
    let law = "detaching after a failed attach succeeds";
    laws.succeeds(law, on("detach", missing), transport.detach(missing))
        .await;
}

async fn attach(laws: &mut Laws<'_>, transport: &dyn Transport, disk: &Disk) -> DeviceLocator {
    let before = laws.tables();
    let law = "a disk can be attached";
    let locator = laws
        .succeeds(law, on("attach", disk), transport.attach(disk))
        .await;
    laws.changed("attaching shows in the tables", on("attach", disk), &before);
    locator
}

async fn round_trip(laws: &mut Laws<'_>, transport: &dyn Transport, fixture: &TransportFixture) {
    let disk = &fixture.disks[0];
    let before = laws.tables();
    let mut schemes = HashSet::new();
    // The second round is the law that a disk can be attached again.
    for _ in 0..2 {
        let locator = attach(laws, transport, disk).await;
        schemes.insert(locator.transport().to_owned());
        same_under_every_name(laws, transport, fixture).await;
        let law = "detaching leaves nothing";
        laws.succeeds(law, on("detach", disk), transport.detach(disk))
            .await;
        laws.unchanged(law, on("detach", disk), &before);
        let law = "detaching twice succeeds";
        laws.succeeds(law, on("second detach", disk), transport.detach(disk))
            .await;
        laws.unchanged(law, on("second detach", disk), &before);
    }
    let law = "all locators are of one transport";
    laws.holds(
        law,
        schemes.len() == 1,
        format!("its devices are on {schemes:?}"),
    );
}

async fn two_disks(laws: &mut Laws<'_>, transport: &dyn Transport, disks: &[Disk]) {
    let before = laws.tables();
    let one = attach(laws, transport, &disks[0]).await;
    let with_one = laws.tables();
    let other = attach(laws, transport, &disks[1]).await;
    let law = "two disks have two locators";
    laws.holds(law, one != other, format!("both disks are {one}"));
    let law = "detaching touches no other disk";
    laws.succeeds(law, on("detach", &disks[1]), transport.detach(&disks[1]))
        .await;
    laws.unchanged(law, on("detach", &disks[1]), &with_one);
    laws.succeeds(law, on("detach", &disks[0]), transport.detach(&disks[0]))
        .await;
    laws.unchanged(law, on("detach", &disks[0]), &before);

    let law = "disks can be attached at once";
    let answers = {
        let judge = &*laws;
        at_once(
            disks
                .iter()
                .map(|disk| judge.call(on("attach", disk), transport.attach(disk))),
        )
        .await
    };
    let mut locators = HashSet::new();
    for (disk, answer) in disks.iter().zip(answers) {
        let locator = laws
            .succeeds(law, on("attach", disk), std::future::ready(answer))
            .await;
        laws.holds(
            law,
            locators.insert(locator.clone()),
            format!("two disks are {locator}"),
        );
    }
    let law = "disks can be detached at once";
    let answers = {
        let judge = &*laws;
        at_once(
            disks
                .iter()
                .map(|disk| judge.call(on("detach", disk), transport.detach(disk))),
        )
        .await
    };
    for (disk, answer) in disks.iter().zip(answers) {
        laws.succeeds(law, on("detach", disk), std::future::ready(answer))
            .await;
    }
    laws.unchanged(law, "detaching both", &before);
}

async fn full(laws: &mut Laws<'_>, transport: &dyn Transport, disks: &[Disk]) {
    let [first, middle @ .., one_more] = disks else {
        return;
    };
    let before = laws.tables();
    let mut locators = HashSet::new();
    for disk in std::iter::once(first).chain(middle) {
        let locator = attach(laws, transport, disk).await;
        let law = "two disks have two locators";
        laws.holds(
            law,
            locators.insert(locator.clone()),
            format!("two disks are {locator}"),
        );
    }
    let law = "one disk more than fits is refused as full and leaves nothing";
    laws.fails(
        law,
        &[Full],
        on("attach", one_more),
        transport.attach(one_more),
    )
    .await;
    let law = "a detach makes room";
    laws.succeeds(law, on("detach", first), transport.detach(first))
        .await;
    laws.succeeds(law, on("attach", one_more), transport.attach(one_more))
        .await;
    for disk in middle.iter().chain([one_more]) {
        laws.succeeds(
            "a full transport can be emptied",
            on("detach", disk),
            transport.detach(disk),
        )
        .await;
    }
    laws.unchanged("a full transport can be emptied", "detaching all", &before);
}
