//! Mount options as they travel: what is left out, what is refused, and that nothing is lost.

use std::num::NonZeroU32;

use blockmount::{
    Encryption, Expose, Format, MountOptions, MountRequest, Overlay, Overwrite, Verity,
};
use serde_json::{Value, json, to_value};

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(value)
}

fn verity() -> Verity {
    Verity {
        root_digest: "ab".repeat(32),
        salt: String::new(),
        algorithm: "sha256".into(),
        data_block_size: 4096,
        hash_block_size: 4096,
        data_blocks: 16,
        hash_start_block: 16,
    }
}

fn format() -> Format {
    Format {
        filesystem: "ext4".into(),
        overwrite: Overwrite::Blank,
    }
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
    let overlay = Overlay {
        layers: vec!["/l".into()],
        scratch: None,
        target: "/t".into(),
    };
    assert_eq!(
        to_value(&overlay).unwrap(),
        json!({"layers": ["/l"], "target": "/t"})
    );
    assert_eq!(to_value(format()).unwrap(), json!({"filesystem": "ext4"}));
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
    let exposed = MountOptions::builder().expose(Expose::BlockDevice).build();
    for options in [verified, encrypted, exposed] {
        let options = options.unwrap();
        let back: MountOptions = read(to_value(&options).unwrap()).unwrap();
        assert_eq!(back, options);
    }
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
