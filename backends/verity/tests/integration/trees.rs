//! Trees beside those of hcsshim and of `veritysetup`, in both directions.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use blockmount::HashAlgorithm;
use blockmount_verity::{
    Corrupt, Parameters, Place, ReadAt, SUPERBLOCK_SIZE, Superblock, Tree, VerityError, find, seal,
    verify,
};
use proptest::prelude::*;

/// Different blocks, so that none can be taken for another.
fn data(bytes: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    (0..bytes).map(|_| next()).collect()
}

fn veritysetup(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("/usr/sbin/veritysetup")
        .args(arguments)
        .output();
    let output = output.expect("tests/setup.sh installs veritysetup");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

fn root_in(said: &str) -> String {
    let line = said
        .lines()
        .find_map(|line| line.strip_prefix("Root hash:"));
    line.unwrap().trim().to_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_vectors_of_hcsshim() {
    let three: Vec<u8> = (0..3).flat_map(|block| [block; 4096]).collect();
    let of_three = "9145e2aed99138b7fc555890e7c7226afdf24a21eba770444dfc32a21d29c46f";
    let of_zeros = "cab9b6912c1cda51e6035e9ab33445e62617cc13db1e6b439d60d8246cbcac35";
    for (content, added, root) in [
        (three, 8192, of_three),
        (vec![0; 200 * 4096], 16384, of_zeros),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        fs::write(&path, &content).unwrap();
        let image = File::options().read(true).write(true).open(&path).unwrap();
        let sealed = seal(&image, &Parameters::default(), &|_| true).unwrap();
        assert_eq!(sealed.root_digest, root);
        assert_eq!(sealed.hash_offset, content.len() as u64);
        let after = fs::read(&path).unwrap();
        assert_eq!(after.len(), content.len() + added);
        assert_eq!(after[..content.len()], content);
        let head = &after[content.len()..];
        assert_eq!(head[..16], *b"verity\0\0\x01\0\0\0\x01\0\0\0");
        assert_eq!(head[32..40], *b"sha256\0\0");
        assert_eq!(head[64..72], [0, 0x10, 0, 0, 0, 0x10, 0, 0]);
        assert_eq!(head[72..80], (content.len() as u64 / 4096).to_le_bytes());
        assert_eq!(head[80..82], [32, 0]);
    }
}

/// One combination: their tree is ours byte for byte, they accept ours, we accept theirs, and both refuse a change.
fn compare(directory: &Path, content: &[u8], parameters: &Parameters) {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let [plain, theirs, ours] = ["plain", "theirs", "ours"].map(|name| directory.join(name));
    fs::write(&plain, content).unwrap();
    fs::write(&ours, content).unwrap();
    let image = File::options().read(true).write(true).open(&ours).unwrap();
    let sealed = seal(&image, parameters, &|_| true).unwrap();
    let salt = match parameters.salt.is_empty() {
        true => "-".to_owned(),
        false => hex(&parameters.salt),
    };
    let uuid = hex(&sealed.superblock.uuid);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| uuid[part].to_owned());
    let options = [
        format!("--hash={}", parameters.algorithm),
        format!("--data-block-size={}", parameters.data_block_size),
        format!("--hash-block-size={}", parameters.hash_block_size),
        format!("--salt={salt}"),
        format!("--uuid={}", parts.join("-")),
    ];
    let (plain, theirs, ours) = (text(&plain), text(&theirs), text(&ours));
    let mut words: Vec<&str> = options.iter().map(String::as_str).collect();
    words.extend(["format", &plain, &theirs]);
    let _ = fs::remove_file(&theirs);
    let (done, said) = veritysetup(&words);
    assert!(done, "{parameters:?}: {said}");
    assert_eq!(root_in(&said), sealed.root_digest, "{parameters:?}");

    // Only the place of the tree depends on where the superblock is: at 0 it starts in the next hash block.
    let (tree_of_theirs, tree_of_ours) = (fs::read(&theirs).unwrap(), fs::read(&ours).unwrap());
    let at = usize::try_from(sealed.hash_offset).unwrap();
    let head = SUPERBLOCK_SIZE as usize;
    assert_eq!(
        tree_of_theirs[..head],
        tree_of_ours[at..][..head],
        "{parameters:?}"
    );
    let start = sealed.superblock.tree(sealed.hash_offset).unwrap().start();
    let starts_at = head.next_multiple_of(parameters.hash_block_size as usize);
    assert_eq!(
        tree_of_theirs[starts_at..],
        tree_of_ours[start as usize..],
        "{parameters:?}"
    );

    let offset = format!("--hash-offset={at}");
    let verify_ours = ["verify", &ours, &ours, &sealed.root_digest, &offset];
    let (accepted, said) = veritysetup(&verify_ours);
    assert!(accepted, "{parameters:?}: {said}");
    let (mut file, data_bytes) = (tree_of_theirs, content.len() as u64);
    let place = Place::Apart {
        offset: 0,
        data_bytes,
    };
    let read = Superblock::read(&file, file.len() as u64, place).unwrap();
    assert_eq!(read, sealed.superblock);
    let tree = read.tree(0).unwrap();
    verify(content, &file, &tree, &sealed.root_digest, &|_| true).unwrap();
    if let Some(last) = file.last_mut() {
        *last ^= 1;
        let refused = verify(content, &file, &tree, &sealed.root_digest, &|_| true);
        let is_single = tree.end() == tree.start();
        assert_eq!(refused.is_err(), !is_single, "{parameters:?}");
    }
}

#[test]
fn trees_are_those_of_veritysetup_for_all_algorithms_and_block_sizes() {
    let directory = tempfile::tempdir().unwrap();
    let sizes = [512, 1024, 2048, 4096];
    for algorithm in HashAlgorithm::ALL {
        for (data_block_size, hash_block_size) in sizes
            .iter()
            .flat_map(|data| sizes.map(|hash| (*data, hash)))
        {
            let parameters = Parameters {
                algorithm,
                data_block_size,
                hash_block_size,
                salt: vec![0xa5; (data_block_size / 64) as usize],
            };
            // Some levels, with a last block that is not full.
            compare(directory.path(), &data(77 * 4096), &parameters);
        }
    }
}

#[test]
fn trees_of_every_shape_are_those_of_veritysetup() {
    let directory = tempfile::tempdir().unwrap();
    let parameters = Parameters {
        data_block_size: 512,
        hash_block_size: 512,
        salt: Vec::new(),
        ..Parameters::default()
    };
    // 16 digests fit in a block: one block, a level that is just full, and one more block than that.
    for blocks in [1, 2, 15, 16, 17, 256, 257, 4096, 4097] {
        compare(directory.path(), &data(blocks * 512), &parameters);
    }
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let parameters = Parameters {
        data_block_size: 1024,
        hash_block_size: 512,
        ..Parameters::default()
    };
    fs::write(&path, data(40 * 1024)).unwrap();
    let image = File::options().read(true).write(true).open(&path).unwrap();
    let sealed = seal(&image, &parameters, &|_| true).unwrap();
    let tree = sealed.superblock.tree(sealed.hash_offset).unwrap();
    let good = fs::read(&path).unwrap();
    let check = |bytes: &Vec<u8>, root: &str| verify(bytes, bytes, &tree, root, &|_| true);
    check(&good, &sealed.root_digest).unwrap();
    let covered = (0..40 * 1024).chain(tree.start() as usize..tree.end() as usize);
    for at in covered.step_by(97) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        let found = check(&bad, &sealed.root_digest).unwrap_err();
        let VerityError::Corrupt(found) = found else {
            panic!("{at}: {found}")
        };
        let expected = match at as u64 {
            data if data < 40 * 1024 => Corrupt::DataBlock {
                number: data / 1024,
            },
            root if root < tree.start() + 512 => Corrupt::Root,
            hash => Corrupt::HashBlock {
                offset: hash / 512 * 512,
            },
        };
        assert_eq!(found, expected, "{at}");
    }
    let other = "00".repeat(32);
    assert!(matches!(
        check(&good, &other),
        Err(VerityError::Corrupt(Corrupt::Root))
    ));
}

/// Gives at most one byte for each read, as a pipe may.
struct Slow(Vec<u8>);

impl ReadAt for Slow {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let length = buffer.len().min(1);
        self.0.read_at(&mut buffer[..length], offset)
    }
}

/// A good superblock for 16 blocks of 4,096 bytes, at 65,536.
fn superblock() -> (Vec<u8>, usize) {
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(path.path(), data(65_536)).unwrap();
    let image = File::options()
        .read(true)
        .write(true)
        .open(path.path())
        .unwrap();
    seal(&image, &Parameters::default(), &|_| true).unwrap();
    (fs::read(path.path()).unwrap(), 65_536)
}

fn read(bytes: &Vec<u8>) -> Result<Superblock, VerityError> {
    Superblock::read(bytes, bytes.len() as u64, Place::Behind(65_536))
}

#[test]
fn y1_a_salt_that_is_too_long_is_refused() {
    let (mut bytes, at) = superblock();
    for size in [257u16, u16::MAX] {
        bytes[at + 80..][..2].copy_from_slice(&size.to_le_bytes());
        let refused = read(&bytes).unwrap_err().to_string();
        assert_eq!(
            refused,
            format!("a salt of {size} bytes: it has at most 256")
        );
    }
    bytes[at + 80..][..2].copy_from_slice(&256u16.to_le_bytes());
    assert_eq!(read(&bytes).unwrap().parameters.salt.len(), 256);
}

#[test]
fn y2_a_superblock_that_no_kernel_could_be_given_is_refused() {
    let (good, at) = superblock();
    read(&good).unwrap();
    let cases: [(usize, Vec<u8>, &str); 12] = [
        (0, b"xerity\0\0".to_vec(), "no superblock"),
        (8, 77u32.to_le_bytes().to_vec(), "version 77"),
        (12, 0u32.to_le_bytes().to_vec(), "hash type 0"),
        (32, b"sha256 x\0".to_vec(), "algorithm \"sha256 x\""),
        (32, b"sha256\0x".to_vec(), "algorithm \"sha256\""),
        (32, [b'a'; 32].to_vec(), "name of an algorithm"),
        (64, 0u32.to_le_bytes().to_vec(), "block size of 0"),
        (64, 4095u32.to_le_bytes().to_vec(), "block size of 4095"),
        (
            68,
            (1u32 << 20).to_le_bytes().to_vec(),
            "block size of 1048576",
        ),
        (72, 0u64.to_le_bytes().to_vec(), "0 data blocks"),
        (
            72,
            (1u64 << 60).to_le_bytes().to_vec(),
            "data blocks of 4096",
        ),
        (72, 17u64.to_le_bytes().to_vec(), "17 data blocks"),
    ];
    for (field, value, why) in cases {
        let mut bad = good.clone();
        bad[at + field..][..value.len()].copy_from_slice(&value);
        let refused = read(&bad).unwrap_err().to_string();
        assert!(refused.contains(why), "{why}: {refused}");
    }
    // The tree must end before the disk does, and the superblock too.
    for cut in [1, 4096, 8191, 8192] {
        let refused = read(&good[..good.len() - cut].to_vec());
        assert!(refused.is_err(), "{cut}");
    }
    let end = good.len() as u64;
    for place in [end, end - 511, u64::MAX - 511, 1] {
        assert!(
            Superblock::read(&good, end, Place::Behind(place)).is_err(),
            "{place}"
        );
    }
}

#[test]
fn y3_what_a_guest_is_told_is_what_the_superblock_says() {
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(path.path(), data(10 * 1024)).unwrap();
    let image = File::options()
        .read(true)
        .write(true)
        .open(path.path())
        .unwrap();
    let parameters = Parameters {
        algorithm: HashAlgorithm::Sha512,
        data_block_size: 1024,
        hash_block_size: 2048,
        salt: vec![7, 8],
    };
    let sealed = seal(&image, &parameters, &|_| true).unwrap();
    let options = sealed
        .superblock
        .options(&sealed.root_digest, sealed.hash_offset);
    let options = options.unwrap();
    assert_eq!(options.algorithm, HashAlgorithm::Sha512);
    assert_eq!(
        (options.data_block_size, options.hash_block_size),
        (1024, 2048)
    );
    assert_eq!((options.data_blocks, options.hash_start_block), (10, 6));
    assert_eq!(
        (options.salt.as_str(), options.root_digest.len()),
        ("0708", 128)
    );
    assert_eq!(
        options.end(),
        sealed
            .superblock
            .tree(sealed.hash_offset)
            .map(|tree| tree.end())
    );
    assert!(
        sealed
            .superblock
            .options(&"ab".repeat(32), sealed.hash_offset)
            .is_err()
    );
}

#[test]
fn y4_nothing_and_an_incomplete_block_have_an_end() {
    let parameters = Parameters::default();
    assert_eq!(Tree::new(&parameters, 0, 0), None);
    let path = tempfile::NamedTempFile::new().unwrap();
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .open(path.path())
            .unwrap()
    };
    let refused = seal(&open(), &parameters, &|_| true).unwrap_err();
    assert!(refused.to_string().contains("empty image"), "{refused}");
    let content = data(5000);
    fs::write(path.path(), &content).unwrap();
    let sealed = seal(&open(), &parameters, &|_| true).unwrap();
    assert_eq!(
        (sealed.hash_offset, sealed.superblock.data_blocks),
        (8192, 2)
    );
    let after = fs::read(path.path()).unwrap();
    assert!(after.starts_with(&content) && after[5000..8192].iter().all(|byte| *byte == 0));
}

#[test]
fn y5_short_reads_are_read_on() {
    let (bytes, _) = superblock();
    let size = bytes.len() as u64;
    let slow = Slow(bytes);
    let (offset, found) = find(&slow, size).unwrap().unwrap();
    let tree = found.tree(offset).unwrap();
    let root = blockmount_verity::root_digest(&slow, &slow, &tree).unwrap();
    verify(&slow, &slow, &tree, &root, &|_| true).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Whatever is changed in a superblock, it is refused, or its data and its tree are inside of the disk.
    #[test]
    fn y2_what_a_superblock_says_is_inside_of_its_disk(
        changes in prop::collection::vec((0usize..512, any::<u64>(), 1usize..=8), 0..4),
        size in prop_oneof![Just(8192u64), any::<u64>()],
    ) {
        let mut image = HALF.clone();
        for (at, value, length) in changes {
            let length = length.min(512 - at);
            image[4096 + at..][..length].copy_from_slice(&value.to_le_bytes()[..length]);
        }
        if let Ok(found) = Superblock::read(&image, size, Place::Behind(4096)) {
            let tree = found.tree(4096).unwrap();
            prop_assert!(tree.end() <= size && tree.start() >= 4096 + SUPERBLOCK_SIZE);
            prop_assert!(found.data_blocks * u64::from(found.parameters.data_block_size) <= 4096);
            let _ = found.options(&"ab".repeat(32), 4096);
        }
    }
}

/// Eight blocks of data, and a superblock of theirs.
static HALF: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/verity_superblock");
    fs::read(corpus.join("half")).unwrap()
});
