//! Mount options as they travel: what is left out, what is refused, and that nothing is lost.

use std::num::NonZeroU32;

use blockmount::{
    Encryption, Expose, Format, InvalidOptions, MountFlag, MountOptions, MountRequest, Overlay,
    Verity,
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
