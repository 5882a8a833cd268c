//! Volumes of LUKS2, made without a device: the header by `cryptsetup`, the content here.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::{aes_xts, images};

/// What opens the volumes.
pub const PASSPHRASE: &str = "correct horse battery staple";
/// Where `cryptsetup` has the content begin, in bytes.
pub const CONTENT: usize = 16 << 20;
/// What is encrypted at once, in bytes.
pub const UNIT: usize = 4096;

/// Makes an image of so many bytes with a volume in it, and answers the key of the volume.
pub fn volume(image: &Path, bytes: u64) -> Vec<u8> {
    File::create(image).unwrap().set_len(bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let [passphrase, key] = ["passphrase", "key"].map(|name| dir.path().join(name));
    fs::write(&passphrase, PASSPHRASE).unwrap();
    let by = format!("--key-file={}", passphrase.display());
    let mut format = images::tool("cryptsetup");
    format
        .args(["luksFormat", "--batch-mode", "--type=luks2"])
        .arg(format!("--sector-size={UNIT}"))
        // The least that it takes.
        .args([
            "--pbkdf=argon2id",
            "--pbkdf-memory=1024",
            "--pbkdf-parallel=1",
        ])
        .args(["--pbkdf-force-iterations=4", &by])
        .arg(image);
    images::run_tool(format);
    let mut dump = images::tool("cryptsetup");
    dump.args(["luksDump", "--batch-mode", "--dump-volume-key", &by])
        .arg(format!("--volume-key-file={}", key.display()))
        .arg(image);
    images::run_tool(dump);
    fs::read(key).unwrap()
}

/// Makes an image with a volume that has this content, and answers its key.
pub fn volume_with(image: &Path, content: &[u8]) -> Vec<u8> {
    let key = volume(image, (CONTENT + content.len()) as u64);
    let encrypted = aes_xts::encrypted(content, &key, UNIT);
    let open = File::options().write(true).open(image).unwrap();
    open.write_all_at(&encrypted, CONTENT as u64).unwrap();
    key
}
