//! What a file that was cut off or damaged is taken for.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use blockmount::ErrorKind;
use blockmount::journal::{Journal, Record, RecordKey};
use blockmount::testing::Seed;
use blockmount_journal::FileJournal;
use proptest::prelude::*;
use serde_json::{Value, json};

/// A record of a kind, under one of a few keys.
fn record(seed: &mut Seed) -> Record {
    let number = seed.below(6);
    let progress = *seed.pick(&["Begun", "Up", "Ending"]);
    let padding = "x".repeat(seed.below(200) as usize);
    let value = match seed.below(3) {
        0 => json!({ "Holder": {
            "name": format!("holder {number}"),
            "of": { "Stack": format!("/tree/{padding}") },
        } }),
        1 => json!({ "Attachment": {
            "id": { "Inode": { "device": 1, "inode": number } },
            "disk": { "source": format!("/images/{padding}"), "kind": "VirtualDisk", "read_only": true },
            "progress": progress,
            "locator": format!("scsi:0/{number}"),
        } }),
        _ => json!({ "Stack": {
            "overlay": { "layers": [format!("/{padding}")], "target": format!("/tree/{number}") },
            "layers": [],
            "progress": progress,
        } }),
    };
    serde_json::from_value(value).unwrap()
}

fn state(journal: &FileJournal) -> BTreeMap<String, Value> {
    let records = journal.load().unwrap();
    let records = records.iter().map(|record| {
        let key = serde_json::to_string(&record.key()).unwrap();
        (key, serde_json::to_value(record).unwrap())
    });
    records.collect()
}

fn change(journal: &FileJournal, seed: &mut Seed) {
    let record = record(seed);
    match seed.percent(30) {
        true => journal.remove(&record.key()).unwrap(),
        false => journal.put(&record).unwrap(),
    }
}

/// A journal with these bytes.
fn with(directory: &Path, bytes: &[u8]) -> Result<FileJournal, blockmount::BackendError> {
    fs::write(directory.join("journal"), bytes).unwrap();
    FileJournal::open(directory)
}

/// An empty directory in which a journal was open once.
fn directory() -> tempfile::TempDir {
    let private = fs::Permissions::from_mode(0o700);
    let directory = tempfile::Builder::new().permissions(private).tempdir();
    let directory = directory.unwrap();
    FileJournal::open(directory.path()).unwrap();
    directory
}

fn content(directory: &Path) -> Vec<u8> {
    fs::read(directory.join("journal")).unwrap()
}

#[test]
fn a_file_that_is_cut_off_anywhere_has_the_state_of_the_last_whole_change() {
    let directory = directory();
    let mut seed = Seed::new(1);
    let journal = FileJournal::open(directory.path()).unwrap();
    let mut states = vec![(content(directory.path()).len(), state(&journal))];
    for _ in 0..15 {
        change(&journal, &mut seed);
        states.push((content(directory.path()).len(), state(&journal)));
    }
    drop(journal);
    let whole = content(directory.path());
    let empty = (0, BTreeMap::new());
    for length in 0..=whole.len() {
        let mut before = states.iter().rev();
        let (_, expected) = before.find(|(end, _)| *end <= length).unwrap_or(&empty);
        for zeros in [0, 1, 40] {
            let mut bytes = whole[..length].to_vec();
            // A power failure may leave zeros behind the last change that was whole.
            let at_end = states.iter().any(|(end, _)| *end == length);
            if zeros > 0 && !at_end {
                continue;
            }
            bytes.resize(length + zeros, 0);
            let journal = with(directory.path(), &bytes).unwrap();
            assert_eq!(
                state(&journal),
                *expected,
                "{length} bytes and {zeros} zeros"
            );
        }
        // The next change is not written behind the rest of one that was cut off.
        let journal = with(directory.path(), &whole[..length]).unwrap();
        change(&journal, &mut seed);
        let after = state(&journal);
        drop(journal);
        assert_eq!(state(&FileJournal::open(directory.path()).unwrap()), after);
    }
}

#[test]
fn a_damaged_byte_anywhere_is_an_error_and_stays_as_it_is() {
    let directory = directory();
    let mut seed = Seed::new(2);
    let journal = FileJournal::open(directory.path()).unwrap();
    for _ in 0..5 {
        change(&journal, &mut seed);
    }
    drop(journal);
    let whole = content(directory.path());
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            let error = with(directory.path(), &bytes).expect_err("it is damaged");
            assert_eq!(
                error.kind(),
                ErrorKind::Invalid,
                "byte {at}, bit {bit}: {error}"
            );
            assert_eq!(content(directory.path()), bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn any_bytes_are_read_or_refused(
        cut in any::<prop::sample::Index>(),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        seed in any::<u64>(),
    ) {
        let directory = directory();
        let journal = FileJournal::open(directory.path()).unwrap();
        let mut seed = Seed::new(seed);
        for _ in 0..3 {
            change(&journal, &mut seed);
        }
        drop(journal);
        let mut whole = content(directory.path());
        whole.truncate(cut.index(whole.len() + 1));
        whole.extend(bytes);
        if let Err(error) = with(directory.path(), &whole) {
            prop_assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}

#[test]
fn a_file_does_not_grow_for_ever() {
    let directory = directory();
    let mut seed = Seed::new(3);
    let journal = FileJournal::open(directory.path()).unwrap();
    let mut longest = 0;
    for _ in 0..20_000 {
        change(&journal, &mut seed);
        longest = longest.max(fs::metadata(journal.path()).unwrap().len());
    }
    assert!(longest < 300 << 10, "{longest}");
    let before = state(&journal);
    drop(journal);
    assert_eq!(state(&FileJournal::open(directory.path()).unwrap()), before);
}

#[test]
fn one_process_has_a_journal_and_nobody_else_can_read_it() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("a/b");
    let journal = FileJournal::builder(&path).sync(true).open().unwrap();
    let kind = |path: &Path| FileJournal::open(path).unwrap_err().kind();
    assert_eq!(kind(&path), ErrorKind::Busy);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&path), mode(&journal.path())), (0o700, 0o600));
    drop(journal);

    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    for (file, open, private) in [
        (path.clone(), 0o750, 0o700),
        (path.join("journal"), 0o640, 0o600),
    ] {
        set(&file, open).unwrap();
        assert_eq!(kind(&path), ErrorKind::Invalid);
        set(&file, private).unwrap();
        FileJournal::open(&path).unwrap();
    }
    symlink(&path, parent.path().join("link")).unwrap();
    assert_ne!(kind(&parent.path().join("link")), ErrorKind::Busy);
    fs::hard_link(path.join("journal"), parent.path().join("other")).unwrap();
    assert_eq!(kind(&path), ErrorKind::Invalid);
    fs::remove_file(path.join("journal")).unwrap();
    symlink(parent.path().join("other"), path.join("journal")).unwrap();
    assert_eq!(kind(&path), ErrorKind::Other);
}

#[test]
fn removing_what_is_not_there_succeeds_and_writes_nothing() {
    let directory = directory();
    let journal = FileJournal::open(directory.path()).unwrap();
    let before = content(directory.path());
    journal.remove(&RecordKey::Stack("/tree".into())).unwrap();
    assert_eq!(content(directory.path()), before);
}
