//! Each target without a fuzzer: over its corpus, so that what was found once stays found, and over what becomes of the corpus by
//! chance.
//!
//! What reads images gets `BLOCKMOUNT_FUZZ_SECONDS` of that, 1 if it does not say; everything else gets 1. `BLOCKMOUNT_FUZZ_SEED`
//! begins with other bytes.

// A test that cannot set up has failed.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use blockmount_fuzz_targets as targets;
use fastrand::Rng;

/// The longest input that is made.
const LONGEST: usize = 1 << 16;
/// Numbers at which sums and products overflow, and lengths end.
const EDGES: [u64; 10] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    i32::MAX as u64,
    u32::MAX as u64,
    i64::MAX as u64,
    u64::MAX,
];

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let files = fs::read_dir(directory.join(name)).expect("each target has a corpus");
    let files: Vec<_> = files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(!files.is_empty(), "the corpus of {name} is empty");
    files
}

/// Bytes of a corpus, changed in one to four places.
fn mutated(random: &mut Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.choice(corpus).cloned().unwrap_or_default();
    for _ in 0..random.usize(1..=4) {
        let at = random.usize(..=bytes.len());
        let rest = bytes.len() - at;
        match random.u8(..8) {
            0 if rest > 0 => bytes[at] ^= 1 << random.u8(..8),
            1 if rest > 0 => bytes[at] = random.u8(..),
            2 | 3 => {
                let edge = random.choice(EDGES).unwrap_or_default();
                let edge = edge.wrapping_add(random.u64(..3)).wrapping_sub(1);
                let edge = match random.bool() {
                    true => edge.to_le_bytes(),
                    false => edge.to_be_bytes(),
                };
                let width = 1 << random.u8(..4);
                let start = if random.bool() { 0 } else { 8 - width };
                let width = width.min(rest);
                bytes[at..at + width].copy_from_slice(&edge[start..start + width]);
            }
            4 => bytes.truncate(at),
            5 => {
                let from = random.usize(..=bytes.len());
                let part = bytes[from.min(at)..from.max(at)].to_vec();
                bytes.splice(at..at, part);
            }
            6 => {
                let other = random.choice(corpus).cloned().unwrap_or_default();
                bytes.truncate(at);
                bytes.extend(other.into_iter().skip(at));
            }
            _ => {
                let upto = at + random.usize(..=rest.min(64));
                bytes.drain(at..upto);
            }
        }
        bytes.truncate(LONGEST);
    }
    bytes
}

/// Runs a target over its corpus, then for a time over what is made of it.
fn run(name: &str, target: fn(&[u8]), time: Duration) {
    let run_once = |bytes: &[u8]| {
        let ran = catch_unwind(AssertUnwindSafe(|| target(bytes)));
        if let Err(panic) = ran {
            eprintln!("{name} panics at {} bytes: {bytes:02x?}", bytes.len());
            resume_unwind(panic);
        }
    };
    let corpus = corpus(name);
    for bytes in &corpus {
        run_once(bytes);
        for at in (0..bytes.len()).step_by(bytes.len().div_ceil(64).max(1)) {
            run_once(&bytes[..at]);
        }
    }
    let seed = number("BLOCKMOUNT_FUZZ_SEED").unwrap_or(1);
    let (mut random, began) = (Rng::with_seed(seed), Instant::now());
    let mut count = 0_u64;
    while began.elapsed() < time {
        run_once(&mutated(&mut random, &corpus));
        count += 1;
    }
    println!("{name}: {count} inputs in {:?}", began.elapsed());
    assert!(count > 0);
}

macro_rules! run {
    ($time:expr; $($name:ident)*) => {$(
        #[test]
        fn $name() {
            super::run(stringify!($name), super::targets::$name, $time);
        }
    )*};
}

/// What reads images, which anybody may have made.
mod fuzz {
    fn time() -> super::Duration {
        super::Duration::from_secs(super::number("BLOCKMOUNT_FUZZ_SECONDS").unwrap_or(1))
    }

    run! { time(); probe luks_header qcow2 verity_superblock }
}

mod peers {
    run! { super::Duration::from_secs(1); bridge_host bridge_server gcs_host gcs_server hcs_documents journal_record mount_options mountinfo names qmp uevent }
}
