//! Scratch disks that are encrypted with a key that only the guest's kernel has.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount::{
    Aead, Disk, Encryption, ErrorKind, Format, KeySource, Mount, MountOptions, MountRequest,
};
use blockmount_debug_agent::kit::{aes_xts, images};
use serde_json::json;

use crate::rig::{KEYS, Rig};

pub(crate) const MARKER: &str = "a marker that no cipher text has by chance";

fn request(format: Format, encrypted: bool) -> MountRequest {
    let mut options = MountOptions::builder().format(format);
    if encrypted {
        options = options.encryption(Encryption::Ephemeral);
    }
    MountRequest::new(options.build().unwrap())
}

fn encrypted(filesystem: &str) -> MountRequest {
    request(Format::new(filesystem), true)
}

pub(crate) fn blank(rig: &Rig, name: &str, mebibytes: u64) -> PathBuf {
    let path = rig.path(name);
    let image = File::create(&path).unwrap();
    image.set_len(mebibytes << 20).unwrap();
    path
}

pub(crate) fn holds_marker(image: &Path) -> bool {
    let bytes = fs::read(image).unwrap();
    assert!(
        bytes.iter().any(|byte| *byte != 0),
        "nothing was written to {image:?}"
    );
    let mut windows = bytes.windows(MARKER.len());
    windows.any(|window| window == MARKER.as_bytes())
}

/// The key that the owner places, and where.
const KEY: [u8; 64] = *b"0123456789abcdefghijklmnopqrstuvwxyz-+.,:;<>ABCDEFGHIJKLMNOPQRST";
const DESCRIPTION: &str = "volumes:data";

fn in_keyring() -> Encryption {
    Encryption::Keyed(KeySource::Keyring(DESCRIPTION.to_owned()))
}

fn in_file() -> Encryption {
    Encryption::Keyed(KeySource::File("data".to_owned()))
}

/// Puts a key where an encryption looks for it, in place of the one that is there.
async fn place(rig: &Rig, encryption: &Encryption, bytes: &[u8]) {
    let request = match encryption {
        Encryption::Keyed(KeySource::File(name)) => {
            let path = Path::new(KEYS).join(name);
            json!({ "write_key": { "path": path, "bytes": bytes } })
        }
        _ => json!({ "add_key": { "kind": "logon", "description": DESCRIPTION, "bytes": bytes } }),
    };
    rig.ask(request).await;
}

async fn remove(rig: &Rig, encryption: &Encryption) {
    let request = match encryption {
        Encryption::Keyed(KeySource::File(name)) => {
            json!({ "remove": { "path": Path::new(KEYS).join(name) } })
        }
        _ => json!({ "remove_key": { "kind": "logon", "description": DESCRIPTION } }),
    };
    rig.ask(request).await;
}

fn keyed(encryption: &Encryption, format: Option<Format>) -> MountRequest {
    let options = MountOptions::builder().encryption(encryption.clone());
    let options = format.into_iter().fold(options, |all, it| all.format(it));
    MountRequest::new(options.build().unwrap())
}

/// Mounts a disk, writes a file, and asserts that it is there and the key is nowhere that anybody sees.
async fn write_with_key(rig: &Rig, disk: &Disk, encryption: &Encryption) -> Mount {
    let request = keyed(encryption, Some(Format::new("ext4")));
    let mount = rig.manager.add(disk, &request).await;
    let mount = mount.unwrap_or_else(|error| panic!("{encryption:?}: {}", error.cause()));
    let file = mount.path().join("file");
    let content = MARKER.repeat(200);
    rig.ask(json!({ "write": { "path": file, "content": content } }))
        .await;
    rig.assert_content(&file, &content).await;
    let answer = rig.ask(json!("mapped_tables")).await;
    let table = answer["mapped_tables"][0].as_str().unwrap();
    assert!(table.contains(" :64:logon:") && !has_key(table), "{table}");
    for bytes in [&KEY[..], hexadecimal(&KEY).as_bytes()] {
        let search = json!({ "files_with": { "bytes": bytes, "below": "/run/blockmount-agent" } });
        assert_eq!(rig.ask(search).await, json!({ "files": [] }));
    }
    mount
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_g12_a_disk_is_encrypted_with_the_key_of_the_guests_owner_and_kept() {
    let rig = Rig::start_logging().await;
    for (name, encryption) in [("keyring", in_keyring()), ("file", in_file())] {
        let image = blank(&rig, name, 32);
        let disk = Disk::virtual_disk(&image);
        let plain = keyed(&encryption, None);
        let add = async |request: &MountRequest| rig.manager.add(&disk, request).await;
        // No key, and one that is too short.
        let error = add(&plain).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{}", error.cause());
        assert!(
            error.cause().message().contains("there is no"),
            "{}",
            error.cause()
        );
        place(&rig, &encryption, &KEY[..32]).await;
        let error = add(&plain).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{}", error.cause());
        assert!(
            error.cause().message().contains("32 bytes"),
            "{}",
            error.cause()
        );
        place(&rig, &encryption, &KEY).await;
        // Nothing on it, and nobody who wants it made: what was opened to see that is closed, and not in the way.
        let error = add(&plain).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{}", error.cause());
        assert_eq!(mapped(&rig).await, Vec::<String>::new());
        let mount = write_with_key(&rig, &disk, &encryption).await;
        mount.release().await.unwrap();
        assert_eq!(mapped(&rig).await, Vec::<String>::new());
        assert!(!holds_marker(&image), "{name}");
        // It is kept, for readers too, and whoever wants the filesystem made finds it made.
        let content = MARKER.repeat(200);
        let read_only = MountOptions::builder().read_only();
        let read_only = read_only.encryption(encryption.clone()).build().unwrap();
        let ensured = keyed(&encryption, Some(Format::new("ext4")));
        for request in [&plain, &MountRequest::new(read_only), &ensured] {
            let mount = add(request).await.unwrap();
            rig.assert_content(&mount.path().join("file"), &content)
                .await;
            mount.release().await.unwrap();
        }
        // It is what anybody else makes of it with the key.
        let before = fs::read(&image).unwrap();
        let decrypted = aes_xts::decrypted(&before, &KEY, 4096);
        assert!(aes_xts::file_in(&decrypted, "file") == content.as_bytes());
        // With another key it is neither mounted nor made anew.
        place(&rig, &encryption, &[7; 64]).await;
        for (request, kind) in [
            (&plain, ErrorKind::NotFound),
            (&ensured, ErrorKind::Conflict),
        ] {
            let error = add(request).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{}", error.cause());
            let message = error.cause().message();
            assert!(message.contains("with another key"), "{message}");
        }
        assert!(fs::read(&image).unwrap() == before, "{name}");
        remove(&rig, &encryption).await;
    }
    let keys = rig.ask(json!("keys")).await["keys"].clone();
    assert_eq!(keys, json!([]));
    let console = rig.vm.console();
    assert!(console.contains(DESCRIPTION), "the log has its name");
    for shown in [
        hexadecimal(&KEY[..16]),
        String::from_utf8_lossy(&KEY[..16]).into_owned(),
    ] {
        assert!(!console.contains(&shown), "{shown}");
    }
    rig.end().await;
}

/// The bytes of an image in pieces of 4 KiB, of which the longest run that was zero before and is not now has its middle here.
fn written_between(before: &[u8], after: &[u8]) -> usize {
    let (mut longest, mut run) = ((0, 0), 0);
    let both = before.chunks(4096).zip(after.chunks(4096));
    for (index, (before, after)) in both.enumerate() {
        let is_zero = |piece: &[u8]| piece.iter().all(|byte| *byte == 0);
        run = match is_zero(before) && !is_zero(after) {
            true => run + 1,
            false => 0,
        };
        longest = longest.max((run, index));
    }
    let (length, last) = longest;
    assert!(length > 100, "{length} pieces were written");
    (last - length / 2) * 4096 + 123
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_one_flipped_bit_of_an_encrypted_disk_is_an_error_that_names_it() {
    let rig = Rig::start_logging().await;
    let with_hmac = Encryption::EphemeralWithIntegrity;
    for (name, filesystem, mebibytes, encryption, key_length) in [
        ("ext4", "ext4", 32, with_hmac.clone(), 96),
        ("xfs", "xfs", 320, with_hmac, 96),
        (
            "aegis",
            "ext4",
            32,
            Encryption::EphemeralWithAead(Aead::Aegis128),
            16,
        ),
        (
            "chacha",
            "ext4",
            32,
            Encryption::EphemeralWithAead(Aead::ChaCha20Poly1305),
            32,
        ),
    ] {
        let image = blank(&rig, name, mebibytes);
        let disk = Disk::virtual_disk(&image);
        let request = keyed(&encryption, Some(Format::new(filesystem)));
        let mount = rig.manager.add(&disk, &request).await;
        let mount = mount.unwrap_or_else(|error| panic!("{name}: {}", error.cause()));
        rig.ask(json!("drop_caches")).await;
        let before = fs::read(&image).unwrap();
        let file = mount.path().join("file");
        let content = MARKER.repeat(40_000);
        rig.ask(json!({ "write": { "path": file, "content": content } }))
            .await;
        rig.ask(json!("drop_caches")).await;
        rig.assert_content(&file, &content).await;
        let table = rig.ask(json!("mapped_tables")).await["mapped_tables"].to_string();
        let reference = format!(" :{key_length}:logon:");
        assert!(table.contains(&reference) && !has_key(&table), "{table}");
        // Growing and trimming it is refused, and it is as full as it is.
        let attachment = rig.manager.attach(&disk).await.unwrap();
        let larger = (mebibytes + 64) << 20;
        let error = rig.manager.resize(&attachment, larger).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable, "{}", error.cause());
        assert!(
            error.cause().message().contains("integrity"),
            "{}",
            error.cause()
        );
        let error = rig.manager.trim(&mount).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable, "{}", error.cause());
        let usage = rig.manager.usage(&mount).await.unwrap().bytes;
        assert!(usage.used > content.len() as u64 && usage.total < mebibytes << 20);
        attachment.release().await.unwrap();
        // In the middle of the file.
        let at = written_between(&before, &fs::read(&image).unwrap());
        let open = File::options().read(true).write(true).open(&image).unwrap();
        let mut byte = [0];
        open.read_exact_at(&mut byte, at as u64).unwrap();
        open.write_all_at(&[byte[0] ^ 0x10], at as u64).unwrap();
        rig.ask(json!("drop_caches")).await;
        let answer = rig
            .ask_and_see(json!({ "tree": { "path": mount.path() } }))
            .await;
        assert!(
            answer["failed"].to_string().contains("os error 5"),
            "{answer}"
        );
        mount.release().await.unwrap();
        let console = rig.vm.console();
        let said = "are not what was written to them";
        let line = console.lines().find(|line| line.contains(said));
        assert!(
            line.is_some_and(|line| line.contains("disk=\"sd")),
            "{console}"
        );
        assert!(!holds_marker(&image), "{name}");
        // With the next key the disk is as good as new.
        let mount = rig.manager.add(&disk, &request).await.unwrap();
        assert!(!rig.tree(mount.path()).await.contains_key("file"));
        mount.release().await.unwrap();
        assert_eq!(mapped(&rig).await, Vec::<String>::new());
        assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    }
    assert!(!has_key(&rig.vm.console()));
    // A kernel without the cipher, and which of its modules is missing.
    for module in ["aegis128_aesni", "aegis128"] {
        rig.ask(json!({ "unload": { "module": module } })).await;
    }
    let request = keyed(
        &Encryption::EphemeralWithAead(Aead::Aegis128),
        Some(Format::new("ext4")),
    );
    let disk = Disk::virtual_disk(blank(&rig, "refused", 64));
    let error = rig.manager.add(&disk, &request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable, "{}", error.cause());
    let message = error.cause().message();
    assert!(message.contains("needs module aegis128"), "{message}");
    assert_eq!(mapped(&rig).await, Vec::<String>::new());
    assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    rig.end().await;
}

pub(crate) async fn mapped(rig: &Rig) -> Vec<String> {
    let tables = rig.tables().await;
    let devices = tables["dm_devices"].as_array().unwrap();
    let name = |device: &serde_json::Value| device["name"].as_str().unwrap().to_owned();
    devices.iter().map(name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_what_is_written_to_an_encrypted_scratch_is_in_no_byte_of_its_image() {
    let rig = Rig::start().await;
    for (name, mebibytes, request, readable) in [
        ("plain", 64, request(Format::new("ext4"), false), true),
        ("ext4", 64, encrypted("ext4"), false),
        ("xfs", 320, encrypted("xfs"), false),
    ] {
        let image = blank(&rig, name, mebibytes);
        let disk = Disk::virtual_disk(&image);
        let mount = rig.manager.add(&disk, &request).await;
        let mount = mount.unwrap_or_else(|error| panic!("{name}: {error}: {}", error.cause()));
        let file = mount.path().join("file");
        let content = MARKER.repeat(200);
        rig.ask(json!({ "write": { "path": file, "content": content } }))
            .await;
        rig.assert_content(&file, &content).await;
        let devices = mapped(&rig).await;
        let is_encrypted = devices
            .iter()
            .any(|name| name.starts_with("blockmount-crypt-8."));
        assert_eq!(
            (devices.len(), is_encrypted),
            (usize::from(!readable), !readable)
        );
        mount.release().await.unwrap();
        assert_eq!(mapped(&rig).await, Vec::<String>::new());
        assert_eq!(holds_marker(&image), readable, "{name}");
    }
    // The noise of an earlier key is no content: the disk is used again, and nothing is left of what was on it.
    let disk = Disk::virtual_disk(rig.path("ext4"));
    let mount = rig.manager.add(&disk, &encrypted("ext4")).await.unwrap();
    assert!(!rig.tree(mount.path()).await.contains_key("file"));
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_what_is_on_a_disk_is_not_destroyed_by_encrypting_it_unless_that_was_asked_for() {
    let rig = Rig::start().await;
    let image = rig.path("data.ext4");
    images::image("ext4", &image, &[("file", MARKER)]);
    let disk = Disk::virtual_disk(&image);
    let before = fs::read(&image).unwrap();
    let error = rig
        .manager
        .add(&disk, &encrypted("ext4"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(
        error.cause().to_string().contains("holds ext"),
        "{}",
        error.cause()
    );
    let with_tags = keyed(
        &Encryption::EphemeralWithIntegrity,
        Some(Format::new("ext4")),
    );
    let error = rig.manager.add(&disk, &with_tags).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.cause());
    assert!(fs::read(&image).unwrap() == before);
    let small = rig.path("small");
    File::create(&small).unwrap().set_len(64 << 10).unwrap();
    let small = Disk::virtual_disk(&small);
    let error = rig.manager.add(&small, &with_tags).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{}", error.cause());
    assert!(
        error.cause().message().contains("too few"),
        "{}",
        error.cause()
    );
    assert_eq!(mapped(&rig).await, Vec::<String>::new());
    let forced = request(Format::new("ext4").overwriting_everything(), true);
    let mount = rig.manager.add(&disk, &forced).await.unwrap();
    assert!(!rig.tree(mount.path()).await.contains_key("file"));
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_agent_that_is_killed_leaves_no_encrypted_device() {
    let rig = Rig::start().await;
    let disk = Disk::virtual_disk(blank(&rig, "held", 64));
    let mount = rig.manager.add(&disk, &encrypted("ext4")).await.unwrap();
    let file = mount.path().join("file");
    rig.ask(json!({ "write": { "path": file, "content": MARKER } }))
        .await;
    rig.ask(json!("kill_agent")).await;
    // The next agent has taken it over: its filesystem and its key are as they were.
    rig.assert_content(&file, MARKER).await;
    match mount.release().await {
        Err(doubtful) if doubtful.kind() == ErrorKind::Uncertain => doubtful.retry().await.unwrap(),
        released => released.unwrap(),
    }
    rig.assert_as_at_first().await;
    // So is one with the key of the owner, which is taken out of use meanwhile.
    place(&rig, &in_file(), &KEY).await;
    let disk = Disk::virtual_disk(blank(&rig, "kept", 64));
    let mount = write_with_key(&rig, &disk, &in_file()).await;
    remove(&rig, &in_file()).await;
    rig.ask(json!("kill_agent")).await;
    rig.assert_content(&mount.path().join("file"), &MARKER.repeat(200))
        .await;
    match mount.release().await {
        Err(doubtful) if doubtful.kind() == ErrorKind::Uncertain => doubtful.retry().await.unwrap(),
        released => released.unwrap(),
    }
    assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    rig.assert_as_at_first().await;
    for round in 0..5 {
        let disk = Disk::virtual_disk(blank(&rig, &format!("scratch-{round}"), 64));
        let request = match round % 2 {
            0 => encrypted("ext4"),
            _ => keyed(
                &Encryption::EphemeralWithIntegrity,
                Some(Format::new("ext4")),
            ),
        };
        let killing = async {
            tokio::time::sleep(Duration::from_millis(80 * round)).await;
            rig.ask(json!("kill_agent")).await
        };
        let (added, _) = tokio::join!(rig.manager.add(&disk, &request), killing);
        rig.settle([added]).await;
    }
    rig.end().await;
}

/// Whether a text has so many hexadecimal digits in a row that a key could be among them.
pub(crate) fn has_key(text: &str) -> bool {
    let mut runs = text.split(|c: char| !c.is_ascii_hexdigit());
    runs.any(|digits| digits.len() >= 64)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_the_key_is_in_no_log_at_the_highest_level_and_in_no_table() {
    let rig = Rig::start_logging().await;
    let disk = Disk::virtual_disk(blank(&rig, "scratch", 64));
    let mount = rig.manager.add(&disk, &encrypted("ext4")).await.unwrap();
    let answer = rig.ask(json!("mapped_tables")).await;
    let table = answer["mapped_tables"][0].as_str().unwrap();
    // The kernel names the key by what its keyring called it.
    assert!(table.contains(" :64:logon:blockmount:"), "{table}");
    assert!(!has_key(table), "{table}");
    let keys = rig.ask(json!("keys")).await["keys"].clone();
    assert_eq!(keys.as_array().unwrap().len(), 1, "{keys}");
    mount.release().await.unwrap();
    assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    let console = rig.vm.console();
    let is_detailed = console.contains("TRACE") || console.contains("DEBUG");
    assert!(
        is_detailed && console.contains("made a filesystem"),
        "{console}"
    );
    assert!(!has_key(&console), "{console}");
    assert!(has_key(&"0123456789abcdef".repeat(4)));
    rig.end().await;
}

/// How many blocks of two images are the same, and not zero.
fn equal_blocks(one: &Path, other: &Path) -> usize {
    let (one, other) = (fs::read(one).unwrap(), fs::read(other).unwrap());
    let both = one.chunks(4096).zip(other.chunks(4096));
    both.filter(|(one, other)| one == other && one.iter().any(|byte| *byte != 0))
        .count()
}

/// Random numbers that go on where a state was saved would be the same in each of its VMs, and so would the keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u08_two_vms_of_one_saved_state_encrypt_with_different_keys() {
    let rigs = [Rig::start().await, Rig::start().await];
    for is_encrypted in [false, true] {
        let request = request(Format::new("ext4"), is_encrypted);
        let mut images = Vec::new();
        for rig in &rigs {
            let image = blank(rig, &format!("{is_encrypted}"), 64);
            let mount = rig.manager.add(&Disk::virtual_disk(&image), &request).await;
            let mount = mount.unwrap();
            let content = MARKER.repeat(40_000);
            let file = mount.path().join("file");
            rig.ask(json!({ "write": { "path": file, "content": content } }))
                .await;
            mount.release().await.unwrap();
            images.push(image);
        }
        let equal = equal_blocks(&images[0], &images[1]);
        match is_encrypted {
            false => assert!(equal > 300, "the file is at the same place: {equal}"),
            true => assert_eq!(equal, 0),
        }
    }
    for rig in rigs {
        rig.end().await;
    }
}
