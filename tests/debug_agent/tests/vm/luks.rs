//! Disks with a header of LUKS2, as `cryptsetup` makes them, opened by a passphrase or by their key.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount::{
    Aead, Disk, Encryption, ErrorKind, Format, KeySource, LuksKey, MountOptions, MountRequest,
    Transport, Unplugger,
};
use blockmount_debug_agent::kit::aes_xts;
use blockmount_debug_agent::kit::luks::{self, CONTENT, PASSPHRASE, UNIT};
use blockmount_debug_agent::trial::Trial;
use serde_json::json;

use crate::crypt::{MARKER, has_key, hexadecimal, holds_marker, mapped};
use crate::exercise::Tried;
use crate::rig::{KEYS, Rig};

const NAME: &str = "volumes:luks";

/// An image with a volume, and its key.
fn volume(rig: &Rig, name: &str) -> (PathBuf, Vec<u8>) {
    let image = rig.path(name);
    let key = luks::volume(&image, 64 << 20);
    (image, key)
}

fn file() -> KeySource {
    KeySource::File("luks".to_owned())
}

fn keyring() -> KeySource {
    KeySource::Keyring(NAME.to_owned())
}

/// Puts a passphrase or a key where the guest looks for it, in place of the one that is there.
async fn place(rig: &Rig, key: &LuksKey, bytes: &[u8]) {
    let request = match key.source() {
        KeySource::File(name) => {
            json!({ "write_key": { "path": Path::new(KEYS).join(name), "bytes": bytes } })
        }
        _ => json!({ "add_key": { "kind": kind(key), "description": NAME, "bytes": bytes } }),
    };
    rig.ask(request).await;
}

async fn remove(rig: &Rig, key: &LuksKey) {
    let request = match key.source() {
        KeySource::File(name) => json!({ "remove": { "path": Path::new(KEYS).join(name) } }),
        _ => json!({ "remove_key": { "kind": kind(key), "description": NAME } }),
    };
    rig.ask(request).await;
}

fn kind(key: &LuksKey) -> &'static str {
    match key {
        LuksKey::Passphrase(_) => "user",
        _ => "logon",
    }
}

fn request(key: &LuksKey, format: Option<Format>) -> MountRequest {
    let options = MountOptions::builder().encryption(Encryption::Luks2(key.clone()));
    let options = format.into_iter().fold(options, |all, it| all.format(it));
    MountRequest::new(options.build().unwrap())
}

async fn refused(rig: &Rig, disk: &Disk, key: &LuksKey, kind: ErrorKind, words: &str) {
    let error = rig
        .manager
        .add(disk, &request(key, None))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), kind, "{key:?}: {}", error.cause());
    let message = error.cause().message();
    assert!(message.contains(words), "{key:?}: {message}");
    assert_eq!(mapped(rig).await, Vec::<String>::new());
    assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_volume_of_luks2_is_opened_by_its_passphrase_or_its_key() {
    let rig = Rig::start_logging().await;
    let (image, volume_key) = volume(&rig, "volume");
    let disk = Disk::virtual_disk(&image);
    let content = MARKER.repeat(200);
    let header = fs::read(&image).unwrap()[..CONTENT].to_vec();
    for (number, (key, right, wrong, why)) in [
        (
            LuksKey::Passphrase(file()),
            PASSPHRASE.as_bytes(),
            &b"wrong"[..],
            "No key available",
        ),
        (
            LuksKey::Passphrase(keyring()),
            PASSPHRASE.as_bytes(),
            b"wrong",
            "No key available",
        ),
        (
            LuksKey::Volume(file()),
            &volume_key,
            &[7; 64],
            "does not match",
        ),
        (
            LuksKey::Volume(keyring()),
            &volume_key,
            &[7; 64],
            "with another key",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        refused(&rig, &disk, &key, ErrorKind::NotFound, "there is no").await;
        place(&rig, &key, wrong).await;
        // A key that no program can read is the wrong one when there is no filesystem.
        let kind = match number {
            3 => ErrorKind::NotFound,
            _ => ErrorKind::Invalid,
        };
        refused(&rig, &disk, &key, kind, why).await;
        place(&rig, &key, right).await;
        let format = (number == 0).then(|| Format::new("ext4"));
        let mount = rig.manager.add(&disk, &request(&key, format)).await;
        let mount = mount.unwrap_or_else(|error| panic!("{key:?}: {}", error.cause()));
        let file = mount.path().join("file");
        if number == 0 {
            let write = json!({ "write": { "path": file, "content": content } });
            rig.ask(write).await;
        }
        rig.assert_content(&file, &content).await;
        let table = rig.ask(json!("mapped_tables")).await["mapped_tables"].to_string();
        assert!(
            table.contains("aes-xts-plain64 :64:logon:") && !has_key(&table),
            "{table}"
        );
        for bytes in [
            &volume_key[..],
            hexadecimal(&volume_key).as_bytes(),
            PASSPHRASE.as_bytes(),
        ] {
            let search =
                json!({ "files_with": { "bytes": bytes, "below": "/run/blockmount-agent" } });
            assert_eq!(rig.ask(search).await, json!({ "files": [] }));
        }
        mount.release().await.unwrap();
        remove(&rig, &key).await;
    }
    assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    assert!(!holds_marker(&image));
    // It is what anybody else makes of it, and its header is as it was.
    let after = fs::read(&image).unwrap();
    assert!(after[..CONTENT] == header);
    let plain = aes_xts::decrypted(&after[CONTENT..], &volume_key, UNIT);
    assert!(aes_xts::file_in(&plain, "file") == content.as_bytes());
    let console = rig.vm.console();
    assert!(console.contains(NAME), "the log has its name");
    for secret in [PASSPHRASE, &hexadecimal(&volume_key[..16])] {
        assert!(!console.contains(secret), "{secret}");
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_volume_of_luks2_grows_and_survives_kills_and_what_is_none_is_refused() {
    let rig = Rig::start().await;
    let key = LuksKey::Passphrase(file());
    place(&rig, &key, PASSPHRASE.as_bytes()).await;
    let plain = rig.path("plain");
    File::create(&plain).unwrap().set_len(64 << 20).unwrap();
    let no_volume = Disk::virtual_disk(&plain);
    refused(
        &rig,
        &no_volume,
        &key,
        ErrorKind::NotFound,
        "no volume of LUKS2",
    )
    .await;
    let (image, _) = volume(&rig, "volume-of-ext4");
    let disk = Disk::virtual_disk(&image);
    let attachment = rig.manager.attach(&disk).await.unwrap();
    // Its content is blank below the cipher, so that a filesystem may be made, and is none yet.
    refused(&rig, &disk, &key, ErrorKind::NotFound, "no filesystem").await;
    let made = request(&key, Some(Format::new("ext4")));
    let mount = rig.manager.add(&disk, &made).await.unwrap();
    let before = rig.manager.usage(&mount).await.unwrap().bytes.total;
    assert!(before < 48 << 20, "{before}");
    rig.manager.resize(&attachment, 96 << 20).await.unwrap();
    let after = rig.manager.usage(&mount).await.unwrap().bytes.total;
    assert!(after > 64 << 20, "{after}");
    let file = mount.path().join("file");
    rig.ask(json!({ "write": { "path": file, "content": MARKER } }))
        .await;
    rig.ask(json!("kill_agent")).await;
    rig.assert_content(&file, MARKER).await;
    match mount.release().await {
        Err(doubtful) if doubtful.kind() == ErrorKind::Uncertain => doubtful.retry().await.unwrap(),
        released => released.unwrap(),
    }
    attachment.release().await.unwrap();
    assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    rig.assert_as_at_first().await;
    for round in 0..4 {
        let killing = async {
            tokio::time::sleep(Duration::from_millis(100 * round)).await;
            rig.ask(json!("kill_agent")).await
        };
        let plain = request(&key, None);
        let (added, _) = tokio::join!(rig.manager.add(&disk, &plain), killing);
        rig.settle([added]).await;
        assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    }
    only_reads_of_a_range(&rig, &image, &key).await;
    rig.end().await;
}

/// A byte range is part of a disk that others read: what is encrypted there can be read, and not written to.
async fn only_reads_of_a_range(rig: &Rig, image: &Path, key: &LuksKey) {
    let before = fs::read(image).unwrap();
    let used = before.len() as u64;
    let tried = Tried::attach(rig, image, used).await;
    let encryptions = [
        Encryption::Luks2(key.clone()),
        Encryption::Ephemeral,
        Encryption::EphemeralWithIntegrity,
        Encryption::EphemeralWithAead(Aead::Aegis128),
        Encryption::Keyed(file()),
    ];
    for (index, encryption) in encryptions.into_iter().enumerate() {
        let options = MountOptions::builder().encryption(encryption);
        let forced = Format::new("ext4").overwriting_everything();
        let mut tries = vec![(options.clone().format(forced), false)];
        if index == 0 {
            tries.extend([(options.clone().read_only(), true), (options, false)]);
        }
        for (options, is_mounted) in tries {
            let trial = Trial {
                disk: tried.address().into(),
                range: Some((0, used)),
                options: options.build().unwrap(),
                directory: "/run/trial".into(),
                keys: Some(KEYS.into()),
            };
            let answer = rig.ask(json!({ "try": trial })).await;
            let refused = answer["refused"].as_str();
            let why = refused.is_some_and(|why| why.contains("it is read-only"));
            assert_eq!(
                (refused.is_none(), why),
                (is_mounted, !is_mounted),
                "{answer}"
            );
        }
    }
    rig.guest.unplug(&tried.locator).await.unwrap();
    rig.scsi.detach(&tried.disk).await.unwrap();
    assert!(fs::read(image).unwrap() == before);
}
