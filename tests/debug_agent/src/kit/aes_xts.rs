//! AES-256 in XTS mode (IEEE 1619) by means that have nothing to do with the kernel's: single blocks by `openssl`, the mode here.

use std::fs;
use std::path::Path;

use super::images;

/// The polynomial by which a tweak is doubled.
const POLYNOMIAL: u128 = 0x87;
const BLOCK: usize = 16;
const SECTOR: usize = 512;

/// Decrypts what is encrypted in units of so many bytes, each by the number of its first sector of 512 bytes.
pub fn decrypted(encrypted: &[u8], key: &[u8], unit: usize) -> Vec<u8> {
    turned("-d", encrypted, key, unit)
}

/// Encrypts in units of so many bytes, each by the number of its first sector of 512 bytes. What is behind the last whole unit
/// is left out.
pub fn encrypted(plain: &[u8], key: &[u8], unit: usize) -> Vec<u8> {
    turned("-e", plain, key, unit)
}

fn turned(direction: &str, bytes: &[u8], key: &[u8], unit: usize) -> Vec<u8> {
    let (data_key, tweak_key) = key.split_at(key.len() / 2);
    let units = bytes.len() / unit;
    let number = |index: usize| ((index * (unit / SECTOR)) as u128).to_le_bytes();
    let numbers: Vec<u8> = (0..units).flat_map(number).collect();
    let first = blocks(&ecb("-e", tweak_key, &numbers));
    let per_unit = unit / BLOCK;
    let mut tweaks = Vec::with_capacity(units * per_unit);
    for mut tweak in first {
        for _ in 0..per_unit {
            tweaks.push(tweak);
            let carry = if tweak >> 127 == 1 { POLYNOMIAL } else { 0 };
            tweak = (tweak << 1) ^ carry;
        }
    }
    let inner = mixed(&bytes[..units * unit], &tweaks);
    mixed(&ecb(direction, data_key, &inner), &tweaks)
}

fn blocks(bytes: &[u8]) -> Vec<u128> {
    let (blocks, _) = bytes.as_chunks::<BLOCK>();
    blocks
        .iter()
        .map(|block| u128::from_le_bytes(*block))
        .collect()
}

fn mixed(bytes: &[u8], tweaks: &[u128]) -> Vec<u8> {
    let both = blocks(bytes).into_iter().zip(tweaks);
    both.flat_map(|(block, tweak)| (block ^ tweak).to_le_bytes())
        .collect()
}

/// Each block by itself.
fn ecb(direction: &str, key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    fs::write(&from, bytes).unwrap();
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let mut openssl = images::tool("openssl");
    openssl
        .args(["enc", "-aes-256-ecb", "-nopad", direction, "-K", &key])
        .args(["-in", &path(&from), "-out", &path(&to)]);
    images::run_tool(openssl);
    fs::read(&to).unwrap()
}

/// The file of a name in an image with an ext4, which has to be sound.
pub fn file_in(image: &[u8], name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, image).unwrap();
    let mut check = images::tool("e2fsck");
    check.arg("-fn").arg(&path);
    images::run_tool(check);
    let command = format!("cat /{name}");
    let read = images::tool("debugfs")
        .args(["-R", &command])
        .arg(&path)
        .output();
    read.unwrap().stdout
}

/// A vector of the standard (IEEE 1619-2007, vector 10), whose unit has 512 bytes and the number 255.
#[test]
fn the_standard_has_the_same_first_block() {
    let digits = "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592";
    let byte = |index: usize| u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).unwrap();
    let key: Vec<u8> = (0..64).map(byte).collect();
    let mut encrypted = vec![0; 256 * SECTOR];
    let first = 0x1c3b_3a10_2f77_0386_e483_6c99_e370_cf9b_u128.to_be_bytes();
    encrypted[255 * SECTOR..255 * SECTOR + BLOCK].copy_from_slice(&first);
    let plain = decrypted(&encrypted, &key, SECTOR);
    let expected: Vec<u8> = (0..16).collect();
    assert_eq!(plain[255 * SECTOR..255 * SECTOR + BLOCK], expected);
    assert!(super::aes_xts::encrypted(&plain, &key, SECTOR) == encrypted);
}
