//! Mount options as they travel: what is left out, what is refused, and that nothing is lost.

use std::num::NonZeroU32;

use blockmount::{
    Aead, DeviceLocator, DeviceRole, Encryption, ErrorCorrection, Expose, ExtraDevice, Format,
    HashAlgorithm, InvalidOptions, KeySource, LuksKey, MountFlag, MountOptions, MountRequest,
    OnCorruption, Overlay, Verity,
};
use serde_json::{Value, json, to_value};

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(value)
}

fn verity() -> Verity {
    Verity::new("ab".repeat(32), 16)
}

fn format() -> Format {
    Format::new("ext4")
}

#[test]
fn what_is_at_its_default_is_left_out() {
    assert_eq!(to_value(MountOptions::default()).unwrap(), json!({}));
    assert_eq!(
        to_value(MountRequest::default()).unwrap(),
        json!({"options": {}})
    );
    assert_eq!(
        to_value(MountOptions::read_only()).unwrap(),
        json!({"options": ["ro"]})
    );
    let overlay = Overlay::new(["/l"], "/t");
    assert_eq!(
        to_value(&overlay).unwrap(),
        json!({"layers": ["/l"], "target": "/t"})
    );
    assert_eq!(to_value(format()).unwrap(), json!({"filesystem": "ext4"}));
}

#[test]
fn of_an_integrity_check_only_what_differs_travels() {
    let root = "ab".repeat(32);
    let plain = json!({"root_digest": root, "algorithm": "sha256", "data_block_size": 4096, "hash_block_size": 4096,
                       "data_blocks": 16, "hash_start_block": 16});
    assert_eq!(to_value(verity()).unwrap(), plain);
    let mut all = verity();
    (all.on_corruption, all.signature_key) = (OnCorruption::Panic, Some("key:1".into()));
    (all.check_at_most_once, all.try_verify_in_tasklet) = (true, true);
    all.error_correction = Some(ErrorCorrection::new(2, 17, 17));
    let options = MountOptions::builder()
        .read_only()
        .verity(all.clone())
        .build();
    let value = to_value(options.unwrap()).unwrap();
    assert_eq!(value["verity"]["on_corruption"], "panic");
    assert_eq!(read::<MountOptions>(value).unwrap().verity(), Some(&all));
}

#[test]
fn y2_an_integrity_check_that_no_kernel_could_be_given_is_refused() {
    type Change = fn(&mut Verity);
    let refused: [(Change, &str); 18] = [
        (|verity| verity.root_digest = "ab".repeat(31), "root digest"),
        (|verity| verity.root_digest = "xy".repeat(32), "root digest"),
        (
            |verity| verity.algorithm = HashAlgorithm::Sha512,
            "root digest",
        ),
        (|verity| verity.salt = "abc".into(), "salt"),
        (|verity| verity.salt = "0 ".into(), "salt"),
        (|verity| verity.salt = "00".repeat(257), "salt"),
        (|verity| verity.data_block_size = 0, "block size"),
        (|verity| verity.data_block_size = 4095, "block size"),
        (|verity| verity.hash_block_size = 256, "block size"),
        (|verity| verity.hash_block_size = 1 << 17, "block size"),
        (|verity| verity.data_blocks = 0, "number of blocks"),
        (|verity| verity.data_blocks = 1 << 52, "number of blocks"),
        (
            |verity| verity.hash_start_block = u64::MAX,
            "number of blocks",
        ),
        (|verity| verity.hash_start_block = 15, "first hash block"),
        (
            |verity| verity.signature_key = Some("a b".into()),
            "signature key",
        ),
        (
            |verity| verity.signature_key = Some(String::new()),
            "signature key",
        ),
        (
            |verity| verity.error_correction = Some(ErrorCorrection::new(1, 17, 17)),
            "error correction",
        ),
        (
            |verity| verity.error_correction = Some(ErrorCorrection::new(2, 16, 17)),
            "error correction",
        ),
    ];
    for (change, what) in refused {
        let mut verity = verity();
        change(&mut verity);
        let built = MountOptions::builder().read_only().verity(verity).build();
        let error = built.unwrap_err();
        assert!(
            matches!(&error, InvalidOptions::Malformed(named, _) if named.contains(what)),
            "{what}: {error}"
        );
    }
    // On a device of its own it may be anywhere, as far as there is one for it.
    let apart = verity().with_separate_tree(1);
    let built = MountOptions::builder()
        .read_only()
        .verity(apart.clone())
        .build();
    let built = built.unwrap();
    assert_eq!(built.verity(), Some(&apart));
    let value = to_value(&built).unwrap();
    assert_eq!(value["verity"]["separate_tree"], true);
    assert_eq!(read::<MountOptions>(value).unwrap(), built);
    let tree = |number| {
        let locator = DeviceLocator::new("scsi", format!("0/{number}")).unwrap();
        ExtraDevice::new(DeviceRole::HashTree, locator)
    };
    let with_trees = |verity: Option<Verity>, trees: u32| {
        let options = MountOptions::builder().read_only();
        let options = verity.into_iter().fold(options, |all, it| all.verity(it));
        (0..trees)
            .fold(options, |all, n| all.device(tree(n)))
            .build()
    };
    let whole = with_trees(Some(apart.clone()), 1).unwrap();
    assert_eq!(
        read::<MountOptions>(to_value(&whole).unwrap()).unwrap(),
        whole
    );
    for (verity, trees) in [(Some(verity()), 1), (None, 1), (Some(apart.clone()), 2)] {
        with_trees(verity, trees).unwrap_err();
    }
    let blob = ExtraDevice::new(DeviceRole::Data, tree(1).locator);
    let options = MountOptions::builder().read_only().verity(apart);
    options.device(tree(0)).device(blob).build().unwrap_err();
    let mut upper = verity();
    upper.root_digest.make_ascii_uppercase();
    let built = MountOptions::builder().read_only().verity(upper).build();
    assert_eq!(built.unwrap().verity(), Some(&verity()));
    let unknown = json!({"options": ["ro"], "verity": {"root_digest": "ab", "algorithm": "md5"}});
    assert!(
        read::<MountOptions>(unknown)
            .unwrap_err()
            .to_string()
            .contains("md5")
    );
}

#[test]
fn g04_a_read_only_mount_makes_no_filesystem() {
    for format in [format(), format().overwriting_everything()] {
        let built = MountOptions::builder().read_only().format(format).build();
        let error = built.unwrap_err();
        assert!(
            matches!(error, InvalidOptions::Contradiction(..)),
            "{error}"
        );
    }
    // Nor does one that a host asks for.
    let asked = json!({"options": ["ro"], "format": to_value(format()).unwrap()});
    let message = read::<MountOptions>(asked).unwrap_err().to_string();
    assert!(message.contains("format"), "{message}");
}

#[test]
fn every_option_survives_the_way() {
    let verified = MountOptions::builder()
        .partition(NonZeroU32::MIN)
        .filesystem("erofs")
        .options(["ro", "rslave", "noatime", "lazytime", "dax=always"])
        .verity(verity())
        .build();
    let encrypted = MountOptions::builder()
        .encryption(Encryption::Ephemeral)
        .format(format())
        .build();
    let with_tags = [
        Encryption::EphemeralWithIntegrity,
        Encryption::EphemeralWithAead(Aead::Aegis128),
        Encryption::EphemeralWithAead(Aead::ChaCha20Poly1305),
    ];
    let [authenticated, aegis, chacha] = with_tags.map(|with_tags| {
        for refused in [
            MountOptions::builder().expose(Expose::BlockDevice),
            MountOptions::builder().read_only(),
        ] {
            refused.encryption(with_tags.clone()).build().unwrap_err();
        }
        let options = MountOptions::builder().encryption(with_tags);
        options.format(format()).build()
    });
    for cipher in Aead::ALL {
        assert_eq!(cipher.to_string().parse::<Aead>().unwrap(), cipher);
        assert_eq!(to_value(cipher).unwrap(), cipher.name());
    }
    assert!(
        "gcm"
            .parse::<Aead>()
            .unwrap_err()
            .to_string()
            .contains("aegis128")
    );
    let exposed = MountOptions::builder().expose(Expose::BlockDevice).build();
    let keyed = |source| {
        let options = MountOptions::builder().read_only();
        options.encryption(Encryption::Keyed(source)).build()
    };
    let in_keyring = keyed(KeySource::Keyring("volumes:data".to_owned()));
    let in_file = keyed(KeySource::File("data.key".to_owned()));
    let luks = |key| {
        let options = MountOptions::builder().encryption(Encryption::Luks2(key));
        options.build()
    };
    let by_passphrase = luks(LuksKey::Passphrase(KeySource::File("data".to_owned())));
    let by_key = luks(LuksKey::Volume(KeySource::Keyring("a:b".to_owned())));
    for options in [
        by_passphrase,
        by_key,
        verified,
        encrypted,
        authenticated,
        aegis,
        chacha,
        exposed,
        in_keyring,
        in_file,
    ] {
        let options = options.unwrap();
        let back: MountOptions = read(to_value(&options).unwrap()).unwrap();
        assert_eq!(back, options);
    }
}

#[test]
fn a_key_is_named_so_that_its_guest_can_look_for_it() {
    let encrypted = |source| {
        let options = MountOptions::builder().encryption(Encryption::Keyed(source));
        options.build()
    };
    for name in [
        "",
        ":",
        "a:",
        ":b",
        "plain",
        "a:b c",
        "a:\n",
        "ä:b",
        "blockmount:x",
        &format!("a:{}", "b".repeat(254)),
    ] {
        let error = encrypted(KeySource::Keyring(name.to_owned())).unwrap_err();
        assert!(matches!(error, InvalidOptions::Malformed(..)), "{name}");
        let key = LuksKey::Passphrase(KeySource::Keyring(name.to_owned()));
        let options = MountOptions::builder().encryption(Encryption::Luks2(key));
        options.build().unwrap_err();
    }
    for name in [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a b",
        "/etc/passwd",
        &"b".repeat(256),
    ] {
        let error = encrypted(KeySource::File(name.to_owned())).unwrap_err();
        assert!(matches!(error, InvalidOptions::Malformed(..)), "{name}");
    }
    for value in [
        json!({"encryption": {"Keyed": {"keyring": "a:b"}}}),
        json!({"encryption": {"Luks2": {"passphrase": {"file": "data"}}}}),
    ] {
        let read: MountOptions = read(value.clone()).unwrap();
        assert_eq!(to_value(&read).unwrap(), value);
    }
    // Readers share a device if they have one key.
    let reader = |name: &str| {
        let key = Encryption::Keyed(KeySource::File(name.to_owned()));
        MountOptions::builder()
            .read_only()
            .encryption(key)
            .build()
            .unwrap()
    };
    assert!(reader("a").is_compatible_with(&reader("a")));
    assert!(!reader("a").is_compatible_with(&reader("b")));
    assert!(!reader("a").is_compatible_with(&MountOptions::read_only()));
}

#[test]
fn a_reader_refuses_what_it_does_not_know() {
    let with = |value: Value| {
        let mut value = value;
        value["newer"] = json!(true);
        value
    };
    let overlay = json!({"layers": [], "target": "/t"});
    let refusals = [
        read::<MountOptions>(json!({"newer": true})).map(drop),
        read::<MountOptions>(json!({"verity": with(to_value(verity()).unwrap())})).map(drop),
        read::<MountOptions>(json!({"format": with(to_value(format()).unwrap())})).map(drop),
        read::<MountRequest>(with(to_value(MountRequest::default()).unwrap())).map(drop),
        read::<Overlay>(with(overlay.clone())).map(drop),
    ];
    for refusal in refusals {
        let message = refusal.unwrap_err().to_string();
        assert!(message.contains("unknown field `newer`"), "{message}");
    }
    assert!(read::<MountOptions>(json!({"encryption": "Newer"})).is_err());
    assert!(read::<MountOptions>(json!({"options": ["ro", "rw"]})).is_err());
    read::<Overlay>(overlay).unwrap();
    read::<MountOptions>(json!({"verity": to_value(verity()).unwrap(), "options": ["ro"]}))
        .unwrap();
}

#[test]
fn i06_every_flag_is_parsed_by_its_name_and_excludes_its_opposite() {
    let opposites = [
        "suid",
        "dev",
        "exec",
        "relatime",
        "diratime",
        "atime",
        "symfollow",
        "async",
        "",
        "nolazytime",
    ];
    for (flag, opposite) in MountFlag::all().iter().zip(opposites) {
        let built = |options: &[&str]| MountOptions::builder().options(options.to_vec()).build();
        let options = built(&[flag.name()]).unwrap();
        assert_eq!(options.flags().iter().collect::<Vec<_>>(), [*flag]);
        assert!(
            options.data().is_empty(),
            "{flag:?} is not the filesystem's"
        );
        if !opposite.is_empty() {
            assert!(built(&[opposite]).unwrap() == MountOptions::default());
            let refused = built(&[flag.name(), opposite]).unwrap_err();
            assert!(
                matches!(refused, InvalidOptions::Contradiction(..)),
                "{refused}"
            );
        }
    }
    let of_superblock = |flag: &&MountFlag| flag.is_of_superblock();
    let of_superblock: Vec<_> = MountFlag::all().iter().filter(of_superblock).collect();
    assert_eq!(
        of_superblock,
        [&MountFlag::Sync, &MountFlag::DirSync, &MountFlag::LazyTime]
    );
}

#[test]
fn u14_a_security_label_has_commas_and_may_be_quoted() {
    let built = |option: &str| MountOptions::builder().option(option).build();
    let label = "context=system_u:object_r:svirt_sandbox_file_t:s0:c1,c2";
    let quoted = "context=\"system_u:object_r:svirt_sandbox_file_t:s0:c1,c2\"";
    let options = built(label).unwrap();
    assert_eq!(options.data(), [label]);
    assert_eq!(built(quoted).unwrap(), options);
    let crossed = serde_json::to_string(&options).unwrap();
    assert_eq!(
        serde_json::from_str::<MountOptions>(&crossed).unwrap(),
        options
    );
    for refused in ["context=a\",b", "commit=1,noatime", "xcontext=a,b"] {
        let error = built(refused).unwrap_err();
        assert!(matches!(error, InvalidOptions::Malformed(..)), "{refused}");
    }
}

#[test]
fn u21_u22_owners_travel_and_exclude_what_has_none() {
    let map: blockmount::IdMap = "u:0:100000:65536".parse().unwrap();
    let group = blockmount::FsGroup::new(2000);
    let both = || MountOptions::builder().id_map(map.clone()).fs_group(group);
    let options = both().build().unwrap();
    let value = to_value(&options).unwrap();
    let range = json!([{"stored": 0, "shown": 100_000, "count": 65_536}]);
    assert_eq!(
        value,
        json!({"id_map": {"users": range}, "fs_group": {"gid": 2000}})
    );
    assert_eq!(read::<MountOptions>(value).unwrap(), options);
    // Mounts with other owners are other mounts, and two that only read can be side by side.
    let reading = |map: Option<&blockmount::IdMap>| {
        let options = MountOptions::builder().read_only();
        match map {
            Some(map) => options.id_map(map.clone()).build().unwrap(),
            None => options.build().unwrap(),
        }
    };
    let (plain, mapped) = (reading(None), reading(Some(&map)));
    assert!(plain != mapped && plain.is_compatible_with(&mapped));
    for refused in [
        both().read_only().build(),
        both().expose(Expose::BlockDevice).build(),
        MountOptions::builder()
            .id_map(map.clone())
            .expose(Expose::BlockDevice)
            .build(),
        MountOptions::builder()
            .fs_group(blockmount::FsGroup::new(u32::MAX))
            .build(),
    ] {
        refused.unwrap_err();
    }
    let unknown = json!({"fs_group": {"gid": 1, "policy": "Sometimes"}});
    read::<MountOptions>(unknown).unwrap_err();
}
