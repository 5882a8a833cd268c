//! Sealing an image, and what a seal leaves that is refused, stopped or killed.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use blockmount::HashAlgorithm;
use blockmount_verity::{Parameters, Sealed, VerityError, find, seal};
use tempfile::TempDir;

const LENGTH: usize = 3_000_000;

fn image() -> (TempDir, PathBuf, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let content: Vec<u8> = (0..LENGTH).map(|at| (at / 7) as u8 | 1).collect();
    fs::write(&path, &content).unwrap();
    (directory, path, content)
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn sealed(path: &Path) -> Result<Sealed, VerityError> {
    seal(&open(path), &Parameters::default(), &|_| true)
}

#[test]
fn a_sealed_image_is_refused_and_stays_as_it_is() {
    let (_directory, path, _) = image();
    let first = sealed(&path).unwrap();
    let before = fs::read(&path).unwrap();
    let again = sealed(&path).unwrap_err();
    assert!(
        matches!(again, VerityError::Sealed { offset } if offset == first.hash_offset),
        "{again}"
    );
    // Whatever it is asked for next.
    let other = Parameters {
        algorithm: HashAlgorithm::Sha512,
        data_block_size: 512,
        ..Parameters::default()
    };
    assert!(matches!(
        seal(&open(&path), &other, &|_| true),
        Err(VerityError::Sealed { .. })
    ));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn a_seal_of_any_kind_is_found_at_the_end_and_before_a_footer() {
    let sizes = [512, 1024, 4096, 65_536];
    for (data_block_size, hash_block_size) in sizes
        .iter()
        .flat_map(|data| sizes.map(|hash| (*data, hash)))
    {
        for algorithm in HashAlgorithm::ALL {
            let (_directory, path, _) = image();
            let parameters = Parameters {
                algorithm,
                data_block_size,
                hash_block_size,
                salt: vec![1],
            };
            let sealed = seal(&open(&path), &parameters, &|_| true).unwrap();
            let expected = Some((sealed.hash_offset, sealed.superblock));
            let file = open(&path);
            let length = file.metadata().unwrap().len();
            assert_eq!(find(&file, length).unwrap(), expected);
            file.set_len(length + 512).unwrap();
            assert_eq!(find(&file, length + 512).unwrap(), expected);
            assert_eq!(find(&file, length - 512).unwrap(), None);
        }
    }
}

#[test]
fn a_seal_that_is_stopped_leaves_the_image_as_it_was() {
    let (_directory, path, content) = image();
    let told = AtomicU64::new(0);
    let stop_late = |bytes| told.fetch_add(bytes, Ordering::Relaxed) < 1 << 20;
    let stopped = seal(&open(&path), &Parameters::default(), &stop_late).unwrap_err();
    assert!(matches!(stopped, VerityError::Stopped), "{stopped}");
    assert_eq!(fs::read(&path).unwrap(), content);
    sealed(&path).unwrap();
}

#[test]
fn a_seal_that_was_killed_is_taken_back_by_the_next_one() {
    let (directory, path, content) = image();
    let (killed, done) = (
        directory.path().join("killed"),
        directory.path().join("done"),
    );
    let told = AtomicU64::new(0);
    // What is there while the tree is built is what a kill leaves.
    let copy = |_| {
        if told.fetch_add(1, Ordering::Relaxed) == 1 {
            fs::copy(&path, &killed).unwrap();
        }
        true
    };
    let first = seal(&open(&path), &Parameters::default(), &copy).unwrap();
    let whole = fs::read(&path).unwrap();
    assert!(told.into_inner() > 2);
    let at_full_length = fs::read(&killed).unwrap();
    assert_eq!(at_full_length.len(), whole.len());
    assert!(find(&open(&killed), whole.len() as u64).unwrap().is_none());
    let with_mark_only = at_full_length[..first.hash_offset as usize + 512].to_owned();
    for left in [at_full_length, with_mark_only] {
        assert_ne!(left, whole);
        fs::write(&done, left).unwrap();
        assert_eq!(sealed(&done).unwrap(), first);
        assert_eq!(fs::read(&done).unwrap(), whole);
    }
    // With other parameters, too: the mark tells the length of the image.
    fs::copy(&killed, &done).unwrap();
    let other = Parameters {
        hash_block_size: 65_536,
        ..Parameters::default()
    };
    seal(&open(&done), &other, &|_| true).unwrap();
    assert!(fs::read(&done).unwrap().starts_with(&content));
}

#[test]
fn an_image_that_is_being_sealed_is_locked() {
    let (_directory, path, content) = image();
    let other = open(&path);
    other.lock().unwrap();
    assert!(matches!(sealed(&path), Err(VerityError::Locked)));
    assert_eq!(fs::read(&path).unwrap(), content);
    drop(other);
    sealed(&path).unwrap();
}
