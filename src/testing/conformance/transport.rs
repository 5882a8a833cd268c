//! The checks of a transport.

use std::collections::HashSet;

use futures_util::FutureExt as _;
use futures_util::future::join_all;

use super::check::contract;
use super::faults::{Pair, PairChecks};
use super::fixture::{Fault, Successor, TransportFixture};
use super::run::{Held, Run};
use super::{Broken, Passed};
use crate::ErrorKind::{Full, Invalid, NotFound, Uncertain, Unsuitable};
use crate::testing::{AttachIdentified as _, VmStep};
use crate::{DeviceLocator, Disk, Presence, Transport};

contract! { "transport" {
    HAS_ID = "a disk that is there has an id";
    ONE_ID = "a disk has one id";
    DIFFERENT_IDS = "different disks have different ids";
    ALIASES = "a disk has one id under all its names";
    IDENTIFY_HARMLESS = "identify changes nothing";
    IDENTIFY_MISSING = "a missing disk is not found";
    DETACH_ABSENT = "detaching what was never attached succeeds";
    ATTACH_MISSING = "attaching a missing disk is not found and leaves nothing";
    DETACH_FAILED = "detaching after a failed attach succeeds";
    ATTACH = "a disk can be attached";
    ATTACH_SHOWS = "attaching shows in the tables";
    DETACH = "detaching leaves nothing";
    DETACH_TWICE = "detaching twice succeeds";
    ONE_SCHEME = "all locators are of one transport";
    TWO_LOCATORS = "two disks have two locators";
    DETACH_OTHER = "detaching touches no other disk";
    ATTACH_AT_ONCE = "disks can be attached at once";
    DETACH_AT_ONCE = "disks can be detached at once";
    FULL = "one disk more than fits is refused as full and leaves nothing";
    SLOT_FREED = "a detach frees a slot";
    EMPTIED = "a full transport can be emptied";
    SOURCE_GONE = "a disk whose source is gone can be detached";
    UNANSWERED = "an attach without an answer is uncertain or leaves nothing";
    DOUBT = "detaching after an attach in doubt succeeds and leaves nothing";
    BUSY = "a disk whose detach is busy stays as it was";
    REPEAT = "a detach that failed can be repeated and leaves nothing";
    LATE = "an attach that was given up has no effect after the detach";
    DOUBT_HOLDS = "the slot of a disk in doubt is not given to another";
    DOUBT_FREED = "detaching a disk in doubt frees its slot and touches no other disk";
    ADOPT = "a disk that an earlier process attached is present where it was";
    ADOPT_FOUND = "a disk that an earlier process attached is found without its locator";
    ADOPT_HARMLESS = "an adoption changes nothing";
    ADOPT_DETACH = "an adopted disk can be detached and leaves nothing";
    ADOPT_ABSENT = "a disk that is not attached is absent";
    ADOPT_OTHER = "a disk is absent where another one is, and a detach of it leaves that one alone";
    SMALLER = "a disk is never made smaller";
    RESIZE_ABSENT = "growing a disk that is not attached is refused and changes nothing";
    GONE = "a detach after the end of the VM is done or gone, and leaves nothing";
}}

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
/// - a disk is never made smaller, and one that is not attached does not grow
/// - with a capacity: one disk more than fits is `Full` and leaves nothing; after a detach it fits
/// - with `remove_source`: an attached disk whose source is gone can be detached
/// - with a successor: a disk that an earlier process attached is present where it was, with and without its locator, and
///   can be detached; one that is not attached, or another one at that locator, is absent and leaves that one alone
/// - with faults: the slot of a disk in doubt is used for no other disk until the disk was detached; a
///   detach that failed can be repeated; an attach that was given up has no effect after the detach
///   that follows it; after the end of the VM a detach is done
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn transport(transport: &dyn Transport, fixture: &TransportFixture) -> Passed {
    match try_transport(transport, fixture).await {
        Ok(passed) => passed,
        Err(broken) => panic!("{broken}"),
    }
}

/// As [`transport()`], without the panic.
///
/// # Errors
///
/// The first check that does not hold.
///
/// # Panics
///
/// If the fixture has too few disks.
pub async fn try_transport(
    transport: &dyn Transport,
    fixture: &TransportFixture,
) -> Result<Passed, Broken> {
    let capacity = fixture.capacity.unwrap_or(1).max(1);
    let disks = fixture.disks.len();
    assert!(
        disks >= 2 && disks > capacity,
        "{disks} disks are too few for this suite"
    );
    let mut run = Run::of(&CONTRACT, &*fixture.snapshot, fixture.faults.as_deref());
    let before = run.tables().await;

    identify(&mut run, transport, fixture).await?;
    refused(&mut run, transport, fixture).await?;
    round_trip(&mut run, transport, fixture).await?;
    if fixture.capacity.is_none_or(|capacity| capacity >= 2) {
        two_disks(&mut run, transport, &fixture.disks[..2]).await?;
        at_once(&mut run, transport, &fixture.disks[..2]).await?;
    }
    if let Some(capacity) = fixture.capacity {
        full(&mut run, transport, &fixture.disks[..=capacity]).await?;
    }
    after_faults(&mut run, transport, &fixture.disks[0]).await?;
    for happens in [false, true] {
        slot_in_doubt(&mut run, transport, fixture, happens).await?;
    }
    if let (Some(remove), Some(disk)) = (&fixture.remove_source, fixture.disks.last()) {
        attach(&mut run, transport, disk).await?;
        remove(disk);
        detach(&mut run, SOURCE_GONE, transport, disk).await?;
        run.unchanged(SOURCE_GONE, on("detach", disk), &before)
            .await?;
    }
    let successor = match &fixture.successor {
        Some(next) => Some(adopt(&mut run, transport, fixture, next).await?),
        None => None,
    };
    let transport = successor.as_deref().unwrap_or(transport);
    gone(&mut run, transport, &fixture.disks[0]).await?;
    run.end(&before).await
}

/// One process after the other: each adopts what the one before has attached. Answers with the last one.
async fn adopt(
    run: &mut Run<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
    next: &Successor<dyn Transport>,
) -> Held<Box<dyn Transport>> {
    let (disk, other) = (&fixture.disks[0], &fixture.disks[1]);
    let before = run.tables().await;
    let mut process: Option<Box<dyn Transport>> = None;
    for (check, with_locator) in [(ADOPT, true), (ADOPT_FOUND, false)] {
        let first = process.as_deref().unwrap_or(transport);
        let locator = attach(run, first, disk).await?;
        let with_disk = run.tables().await;
        let second = next();
        let at = with_locator.then_some(&locator);
        let there = Presence::Present(locator.clone());
        adoption(run, check, &*second, disk, at, &there).await?;
        run.unchanged(ADOPT_HARMLESS, on("adopt", disk), &with_disk)
            .await?;
        detach(run, ADOPT_DETACH, &*second, disk).await?;
        run.unchanged(ADOPT_DETACH, on("detach", disk), &before)
            .await?;
        let third = next();
        adoption(run, ADOPT_ABSENT, &*third, disk, at, &Presence::Absent).await?;
        let fourth = next();
        let locator = attach(run, &*fourth, disk).await?;
        let with_disk = run.tables().await;
        let fifth = next();
        let absent = &Presence::Absent;
        adoption(run, ADOPT_OTHER, &*fifth, other, Some(&locator), absent).await?;
        detach(run, ADOPT_OTHER, &*fifth, other).await?;
        run.unchanged(ADOPT_OTHER, on("detach", other), &with_disk)
            .await?;
        let last = next();
        adoption(
            run,
            ADOPT,
            &*last,
            disk,
            Some(&locator),
            &Presence::Present(locator.clone()),
        )
        .await?;
        detach(run, ADOPT_DETACH, &*last, disk).await?;
        process = Some(last);
    }
    Ok(process.expect("there were two rounds"))
}

async fn adoption(
    run: &mut Run<'_>,
    check: super::Check,
    transport: &dyn Transport,
    disk: &Disk,
    at: Option<&DeviceLocator>,
    expected: &Presence<DeviceLocator>,
) -> Held {
    let id = transport.identify(disk);
    let id = run.succeeds(HAS_ID, on("identify", disk), id).await?;
    let adopt = transport.adopt(disk, &id, at);
    let found = run.succeeds(check, on("adopt", disk), adopt).await?;
    let said = format!("adopt of {disk} answered {found:?}, not {expected:?}");
    run.holds(check, found == *expected, said)
}

fn on(step: &str, disk: &Disk) -> String {
    format!("{step} of {disk}")
}

async fn attach(run: &mut Run<'_>, transport: &dyn Transport, disk: &Disk) -> Held<DeviceLocator> {
    let before = run.tables().await;
    let attach = transport.attach_identified(disk);
    let locator = run.succeeds(ATTACH, on("attach", disk), attach).await?;
    run.changed(ATTACH_SHOWS, on("attach", disk), &before)
        .await?;
    Ok(locator)
}

async fn detach(
    run: &mut Run<'_>,
    check: super::Check,
    transport: &dyn Transport,
    disk: &Disk,
) -> Held {
    run.succeeds(check, on("detach", disk), transport.detach(disk))
        .await
}

async fn identify(
    run: &mut Run<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
) -> Held {
    let before = run.tables().await;
    let mut ids = HashSet::new();
    for disk in &fixture.disks {
        let what = on("identify", disk);
        let id = run
            .succeeds(HAS_ID, &what, transport.identify(disk))
            .await?;
        let again = run
            .succeeds(HAS_ID, &what, transport.identify(disk))
            .await?;
        run.holds(
            ONE_ID,
            id == again,
            format!("{disk} is {id:?}, then {again:?}"),
        )?;
        let said = format!("{disk} and another one are {id:?}");
        run.holds(DIFFERENT_IDS, ids.insert(id), said)?;
    }
    same_under_every_name(run, transport, fixture).await?;
    run.unchanged(IDENTIFY_HARMLESS, "identify", &before)
        .await?;
    let missing = &fixture.missing;
    let call = transport.identify(missing);
    run.fails(IDENTIFY_MISSING, &[NotFound], on("identify", missing), call)
        .await
}

async fn same_under_every_name(
    run: &mut Run<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
) -> Held {
    let disk = &fixture.disks[0];
    let call = transport.identify(disk);
    let id = run.succeeds(HAS_ID, on("identify", disk), call).await?;
    for alias in &fixture.aliases {
        let call = transport.identify(alias);
        let other = run.succeeds(ALIASES, on("identify", alias), call).await?;
        let said = format!("{disk} is {id:?}, but {alias} is {other:?}");
        run.holds(ALIASES, id == other, said)?;
    }
    Ok(())
}

async fn refused(run: &mut Run<'_>, transport: &dyn Transport, fixture: &TransportFixture) -> Held {
    let before = run.tables().await;
    let (disk, missing) = (&fixture.disks[0], &fixture.missing);
    for disk in [disk, missing] {
        detach(run, DETACH_ABSENT, transport, disk).await?;
        run.unchanged(DETACH_ABSENT, on("detach", disk), &before)
            .await?;
    }
    // Its source was removed after it was identified, for all that the transport can tell.
    let id = transport.identify(disk);
    let id = &run.succeeds(HAS_ID, on("identify", disk), id).await?;
    let attach = transport.attach(missing, id);
    run.fails(ATTACH_MISSING, &[NotFound], on("attach", missing), attach)
        .await?;
    detach(run, DETACH_FAILED, transport, missing).await?;
    run.unchanged(DETACH_FAILED, on("detach", missing), &before)
        .await
}

async fn round_trip(
    run: &mut Run<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
) -> Held {
    let disk = &fixture.disks[0];
    let before = run.tables().await;
    let mut schemes = HashSet::new();
    // The second round is the check that a disk can be attached again.
    for _ in 0..2 {
        let locator = attach(run, transport, disk).await?;
        schemes.insert(locator.transport().to_owned());
        same_under_every_name(run, transport, fixture).await?;
        let smaller = transport.resize(disk, 0);
        run.fails(SMALLER, &[], on("resize to nothing", disk), smaller)
            .await?;
        detach(run, DETACH, transport, disk).await?;
        run.unchanged(DETACH, on("detach", disk), &before).await?;
        detach(run, DETACH_TWICE, transport, disk).await?;
        run.unchanged(DETACH_TWICE, on("second detach", disk), &before)
            .await?;
    }
    let kinds = [NotFound, Unsuitable, Invalid];
    let absent = transport.resize(disk, 1 << 30);
    run.fails(RESIZE_ABSENT, &kinds, on("resize", disk), absent)
        .await?;
    let said = format!("its devices are on {schemes:?}");
    run.holds(ONE_SCHEME, schemes.len() == 1, said)
}

async fn two_disks(run: &mut Run<'_>, transport: &dyn Transport, disks: &[Disk]) -> Held {
    let before = run.tables().await;
    let one = attach(run, transport, &disks[0]).await?;
    let with_one = run.tables().await;
    let other = attach(run, transport, &disks[1]).await?;
    run.holds(TWO_LOCATORS, one != other, format!("both disks are {one}"))?;
    detach(run, DETACH_OTHER, transport, &disks[1]).await?;
    run.unchanged(DETACH_OTHER, on("detach", &disks[1]), &with_one)
        .await?;
    detach(run, DETACH_OTHER, transport, &disks[0]).await?;
    run.unchanged(DETACH_OTHER, on("detach", &disks[0]), &before)
        .await
}

async fn at_once(run: &mut Run<'_>, transport: &dyn Transport, disks: &[Disk]) -> Held {
    let before = run.tables().await;
    let calls = disks
        .iter()
        .map(|disk| run.call(on("attach", disk), transport.attach_identified(disk)));
    let answers = join_all(calls).await;
    let mut locators = HashSet::new();
    for (disk, answer) in disks.iter().zip(answers) {
        let locator = run.answered(ATTACH_AT_ONCE, on("attach", disk), answer?)?;
        let said = format!("two disks are {locator}");
        run.holds(ATTACH_AT_ONCE, locators.insert(locator), said)?;
    }
    let calls = disks
        .iter()
        .map(|disk| run.call(on("detach", disk), transport.detach(disk)));
    let answers = join_all(calls).await;
    for (disk, answer) in disks.iter().zip(answers) {
        run.answered(DETACH_AT_ONCE, on("detach", disk), answer?)?;
    }
    run.unchanged(DETACH_AT_ONCE, "detaching both", &before)
        .await
}

async fn full(run: &mut Run<'_>, transport: &dyn Transport, disks: &[Disk]) -> Held {
    let [first, middle @ .., one_more] = disks else {
        return Ok(());
    };
    let before = run.tables().await;
    let mut locators = HashSet::new();
    for disk in std::iter::once(first).chain(middle) {
        let locator = attach(run, transport, disk).await?;
        let said = format!("two disks are {locator}");
        run.holds(TWO_LOCATORS, locators.insert(locator), said)?;
    }
    let call = transport.attach_identified(one_more);
    run.fails(FULL, &[Full], on("attach", one_more), call)
        .await?;
    detach(run, SLOT_FREED, transport, first).await?;
    let call = transport.attach_identified(one_more);
    run.succeeds(SLOT_FREED, on("attach", one_more), call)
        .await?;
    for disk in middle.iter().chain([one_more]) {
        detach(run, EMPTIED, transport, disk).await?;
    }
    run.unchanged(EMPTIED, "detaching all", &before).await
}

async fn after_faults(run: &mut Run<'_>, transport: &dyn Transport, disk: &Disk) -> Held {
    let call = transport.identify(disk);
    let id = &run.succeeds(HAS_ID, on("identify", disk), call).await?;
    let pair = Pair {
        up: (VmStep::Attach, &|| {
            async move { transport.attach(disk, id).await.map(drop) }.boxed()
        }),
        down: (VmStep::Detach, &|| transport.detach(disk)),
        checks: PairChecks {
            up: ATTACH,
            unanswered: UNANSWERED,
            doubt: DOUBT,
            busy: BUSY,
            repeat: REPEAT,
            late: LATE,
        },
    };
    pair.check(run).await
}

/// While the first disk is in doubt, the others have one slot less; then it is free again.
async fn slot_in_doubt(
    run: &mut Run<'_>,
    transport: &dyn Transport,
    fixture: &TransportFixture,
    happens: bool,
) -> Held {
    let before = run.tables().await;
    let disk = &fixture.disks[0];
    if !run
        .inject(VmStep::Attach, Fault::Uncertain { happens })
        .await
    {
        return Ok(());
    }
    let call = transport.attach_identified(disk);
    let answer = run.call(on("attach", disk), call).await?;
    run.clear().await;
    let in_doubt = matches!(&answer, Err(error) if error.kind() == Uncertain);
    if in_doubt {
        let others = match fixture.capacity {
            Some(capacity) => &fixture.disks[1..=capacity],
            None => &fixture.disks[1..2],
        };
        others_beside(run, transport, disk, others, fixture.capacity.is_some()).await?;
    } else {
        detach(run, DOUBT_FREED, transport, disk).await?;
    }
    run.unchanged(DOUBT_FREED, "detaching all", &before).await
}

/// Attaches the other disks beside one that is in doubt; the last of them needs its slot, if that is
/// said.
async fn others_beside(
    run: &mut Run<'_>,
    transport: &dyn Transport,
    disk: &Disk,
    others: &[Disk],
    last_needs_slot: bool,
) -> Held {
    let fit = others.len() - usize::from(last_needs_slot);
    let mut locators = HashSet::new();
    for other in &others[..fit] {
        let call = transport.attach_identified(other);
        let locator = run.succeeds(DOUBT_HOLDS, on("attach", other), call).await?;
        let said = format!("two disks are {locator}");
        run.holds(DOUBT_HOLDS, locators.insert(locator), said)?;
    }
    for last in &others[fit..] {
        let call = transport.attach_identified(last);
        run.fails(DOUBT_HOLDS, &[Full], on("attach", last), call)
            .await?;
    }
    detach(run, DOUBT_FREED, transport, disk).await?;
    for last in &others[fit..] {
        let call = transport.attach_identified(last);
        run.succeeds(DOUBT_FREED, on("attach", last), call).await?;
    }
    for other in others {
        let before = run.tables().await;
        detach(run, DOUBT_FREED, transport, other).await?;
        run.changed(DOUBT_FREED, on("detach", other), &before)
            .await?;
    }
    Ok(())
}

async fn gone(run: &mut Run<'_>, transport: &dyn Transport, disk: &Disk) -> Held {
    let before = run.tables().await;
    attach(run, transport, disk).await?;
    if !run.inject(VmStep::Detach, Fault::Gone).await {
        return detach(run, DETACH, transport, disk).await;
    }
    for _ in 0..2 {
        let call = transport.detach(disk);
        run.done_or_gone(GONE, on("detach", disk), call).await?;
    }
    run.clear().await;
    run.unchanged(GONE, on("detach", disk), &before).await
}
