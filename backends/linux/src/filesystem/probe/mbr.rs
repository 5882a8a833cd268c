//! Master boot records, with the chain of logical partitions in an extended one.

use std::io::{self, Read, Seek};

use super::source::{Bytes, Source};
use super::{Partition, PartitionTable, TableKind};

const SECTOR: u64 = 512;
/// Bounds the chain, which a hostile image may make long.
const MOST_LOGICAL: u32 = 128;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Marks a disk with a GUID partition table; if that table is damaged, the content is unknown.
const PROTECTIVE: u8 = 0xee;

struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

impl Entry {
    fn of(bytes: &[u8]) -> Option<Self> {
        let entry = Bytes(bytes.to_vec());
        let [status] = entry.array(0);
        let [kind] = entry.array(4);
        matches!(status, 0 | 0x80).then_some(Entry {
            kind,
            start: entry.le32(8).into(),
            sectors: entry.le32(12).into(),
        })
    }

    fn is_used(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn partition(&self, number: u32, base: u64) -> Partition {
        Partition {
            number,
            start: base.saturating_add(self.start).saturating_mul(SECTOR),
            size: self.sectors.saturating_mul(SECTOR),
            type_id: format!("0x{:02x}", self.kind),
            name: None,
        }
    }
}

pub(super) fn probe<R: Read + Seek>(
    source: &mut Source<'_, R>,
) -> io::Result<Option<PartitionTable>> {
    let Some(entries) = record(source, 0)? else {
        return Ok(None);
    };
    let on_disk = source.size() / SECTOR;
    let consistent = entries
        .iter()
        .filter(|entry| entry.is_used())
        .all(|entry| entry.start != 0 && entry.start < on_disk && entry.kind != PROTECTIVE);
    if !consistent || !entries.iter().any(Entry::is_used) {
        return Ok(None);
    }
    let mut partitions = Vec::new();
    for (entry, number) in entries.iter().zip(1..).filter(|(entry, _)| entry.is_used()) {
        partitions.push(entry.partition(number, 0));
    }
    if let Some(extended) = entries
        .iter()
        .find(|entry| entry.is_used() && EXTENDED.contains(&entry.kind))
    {
        partitions.extend(logical(source, extended)?);
    }
    Ok(Some(PartitionTable {
        kind: TableKind::Mbr,
        partitions,
    }))
}

/// The four entries of a record; nothing if it is none.
fn record<R: Read + Seek>(
    source: &mut Source<'_, R>,
    sector: u64,
) -> io::Result<Option<Vec<Entry>>> {
    let record = source
        .bytes(sector.saturating_mul(SECTOR), SECTOR as usize)?
        .filter(|record| record.has(510, b"\x55\xaa"));
    Ok(record.and_then(|record| record.0[446..510].chunks_exact(16).map(Entry::of).collect()))
}

/// Each record of the chain has a partition, relative to itself, and the next record, relative
/// to the first.
fn logical<R: Read + Seek>(
    source: &mut Source<'_, R>,
    extended: &Entry,
) -> io::Result<Vec<Partition>> {
    let mut found = Vec::new();
    let mut at = extended.start;
    for number in 5..5 + MOST_LOGICAL {
        let Some(entries) = record(source, at)? else {
            break;
        };
        let is_link = |entry: &&Entry| EXTENDED.contains(&entry.kind);
        if let Some(entry) = entries
            .iter()
            .find(|entry| entry.is_used() && !is_link(entry))
        {
            found.push(entry.partition(number, at));
        }
        let next = entries
            .iter()
            .find(|entry| entry.is_used() && is_link(entry))
            .map(|next| extended.start.saturating_add(next.start));
        match next {
            // A chain that does not go forward may be a ring.
            Some(next) if next > at => at = next,
            _ => break,
        }
    }
    Ok(found)
}
