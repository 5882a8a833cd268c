//! Images that anybody could have made, changed at random, are probed without a panic.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::io::Cursor;
use std::path::Path;

use blockmount_linux::probe::{Content, probe};

/// How many changed images are probed: some seconds, in a debug build, which checks all arithmetic.
const ROUNDS: u32 = 20_000;

/// The same numbers in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Numbers at which arithmetic goes wrong.
const EXTREMES: [u64; 6] = [0, 1, u64::MAX, u64::MAX / 2, 1 << 31, 1 << 63];

/// Changes a few fields of an image, mostly where something is.
fn change(image: &mut Vec<u8>, used: &[usize], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = match random.below(8) {
            0 => random.below(image.len()),
            _ => used[random.below(used.len())],
        };
        let value = match random.below(2) {
            0 => random.next(),
            _ => EXTREMES[random.below(EXTREMES.len())],
        };
        let length = [1, 2, 4, 8][random.below(4)].min(image.len() - at);
        let bytes = match random.below(2) {
            0 => value.to_le_bytes(),
            _ => value.to_be_bytes(),
        };
        image[at..at + length].copy_from_slice(&bytes[..length]);
    }
    if random.below(16) == 0 {
        image.truncate(random.below(image.len()));
    }
}

#[test]
fn no_image_makes_the_probe_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/probe");
    let images: Vec<Vec<u8>> = fs::read_dir(corpus)
        .unwrap()
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect();
    let used: Vec<Vec<usize>> = images
        .iter()
        .map(|image| (0..image.len()).filter(|at| image[*at] != 0).collect())
        .collect();
    let known = |image: &[u8]| {
        let found = probe(&mut Cursor::new(image)).unwrap();
        let _ = format!("{found:?} {}", found.content);
        !matches!(found.content, Content::Blank | Content::Unknown)
    };
    let whole = images.iter().filter(|image| known(image)).count();
    assert!(whole > 10, "only {whole} images are known as they are");
    let (mut random, mut still_known) = (Random(0x9e37_79b9_7f4a_7c15), 0);
    for _ in 0..ROUNDS {
        let number = random.below(images.len());
        let Some(used) = used.get(number).filter(|used| !used.is_empty()) else {
            continue;
        };
        let mut image = images[number].clone();
        change(&mut image, used, &mut random);
        still_known += u32::from(known(&image));
    }
    // Whatever is refused at once is read no further: most must be read.
    assert!(still_known > ROUNDS / 10, "{still_known} of {ROUNDS}");
}
