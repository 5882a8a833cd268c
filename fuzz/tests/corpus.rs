//! Runs each target over its corpus, without a fuzzer: what was found once stays found.

use std::fs;
use std::path::Path;

/// Runs a target over the files of its corpus, and over each of them cut off and with bytes flipped.
fn run(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut count = 0;
    for entry in fs::read_dir(&corpus).expect("each target has a corpus") {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        target(&bytes);
        for at in (0..bytes.len()).step_by(bytes.len().div_ceil(64).max(1)) {
            target(&bytes[..at]);
            let mut flipped = bytes.clone();
            flipped[at] ^= 0xff;
            target(&flipped);
        }
        count += 1;
    }
    assert!(count > 0, "{} is empty", corpus.display());
}

macro_rules! corpora {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            run(stringify!($name), blockmount_fuzz::$name);
        }
    )*};
}

corpora! {
    bridge_host bridge_server gcs_host gcs_server hcs_documents mount_options mountinfo names probe qmp uevent
    verity_superblock
}
#[cfg(fuzzing)]
corpora! { journal_record luks_header qcow2 }
