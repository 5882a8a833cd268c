use clap::{CommandFactory as _, Parser as _};

use super::*;
use crate::args::{Cli, Cmd};

/// The arguments of `mount` with a file of this text.
fn mount(text: &str, words: &[&str]) -> Result<MountArgs, Failure> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stack.toml");
    std::fs::write(&file, text).unwrap();
    let words = ["blockmount", "mount"].iter().chain(words);
    let words = words.copied().chain(["--file", file.to_str().unwrap()]);
    let Cmd::Mount(args) = Cli::try_parse_from(words).unwrap().command else {
        unreachable!()
    };
    let mut args = complete(args)?;
    // As if it had been in the working directory.
    let relative = |path: &mut PathBuf| {
        if let Ok(below) = path.strip_prefix(dir.path()) {
            *path = below.to_owned();
        }
    };
    args.layers.given.iter_mut().for_each(|layer| {
        relative(&mut layer.image);
        layer.devices.iter_mut().for_each(relative);
        layer.verity_tree.iter_mut().for_each(relative);
        if let Some(Trusted::File(path)) = &mut layer.verity {
            relative(path);
        }
    });
    args.at.iter_mut().for_each(relative);
    Ok(args)
}

const WHOLE: &str = r#"
    at = "tree"
    name = "web"
    guest = "qemu"
    transport = "auto"
    keep-vm = true
    allow-backing = true
    options = ["nodev"]
    overlay-options = ["volatile"]
    map-ids = "0:7:1"
    view = ["/mnt/etc:ro,subpath=etc"]

    [scratch]
    size = "64M"
    encrypt = true
    integrity = true
    format = "xfs"

    [[layer]]
    image = "app.erofs"
    fs = "erofs"
    verity = "app.erofs.dmverity"
    verity-tree = "app.tree"
    key = "volumes:app"
    devices = ["a.blob", "/b.blob"]

    [[layer]]
    image = "/disks/base.img"
    partition = 2
    luks = "file=/keys/base"
    options = ["nouuid"]
"#;

#[test]
fn a_file_says_what_the_command_line_can_say() {
    let args = mount(WHOLE, &[]).unwrap();
    assert_eq!(args.at.as_deref(), Some(Path::new("tree")));
    assert_eq!(args.name.unwrap().as_str(), "web");
    assert_eq!(args.guest, Some(GuestKind::Qemu));
    assert_eq!(args.transport, Some(Transports::Auto));
    assert!(args.keep_vm && args.allow_backing && args.encrypt);
    assert_eq!(args.integrity, Some(Integrity::HmacSha256));
    assert_eq!(args.overlay_options, ["volatile"]);
    assert_eq!(
        (args.scratch, args.format.as_deref()),
        (Some(64 << 20), Some("xfs"))
    );
    assert_eq!(args.views, ["/mnt/etc:ro,subpath=etc".parse().unwrap()]);
    let app = Layer {
        id_map: Some("0:7:1".parse().unwrap()),
        filesystem: Some("erofs".into()),
        verity: Some(Trusted::File("app.erofs.dmverity".into())),
        verity_tree: Some("app.tree".into()),
        key: Some(KeyFrom::Keyring("volumes:app".into())),
        devices: vec!["a.blob".into(), "/b.blob".into()],
        options: vec!["nodev".into()],
        ..Layer::of("app.erofs")
    };
    let base = Layer {
        id_map: Some("0:7:1".parse().unwrap()),
        partition: NonZeroU32::new(2),
        luks: Some(KeyFrom::File("/keys/base".into())),
        options: vec!["nodev".into(), "nouuid".into()],
        ..Layer::of("/disks/base.img")
    };
    assert_eq!(args.layers.given, [app, base]);
}

#[test]
fn the_command_line_wins_and_its_layers_are_above() {
    let words = [
        "-o",
        "noatime",
        "--layer",
        "top",
        "-o",
        "nosuid",
        "--at",
        "/mnt/other",
        "--guest",
        "local",
        "--scratch",
        "8M",
        "--overlay-option",
        "metacopy=on",
    ];
    let args = mount(WHOLE, &words).unwrap();
    assert_eq!(args.at.as_deref(), Some(Path::new("/mnt/other")));
    assert_eq!(
        (args.guest, args.scratch),
        (Some(GuestKind::Local), Some(8 << 20))
    );
    assert_eq!(args.overlay_options, ["volatile", "metacopy=on"]);
    let layers: Vec<_> = args
        .layers
        .given
        .iter()
        .map(|layer| (layer.image.to_str().unwrap(), layer.options.join(",")))
        .collect();
    let expected = [
        ("top", "noatime,nosuid"),
        ("app.erofs", "noatime,nodev"),
        ("/disks/base.img", "noatime,nodev,nouuid"),
    ];
    assert_eq!(
        layers,
        expected.map(|(image, options)| (image, options.to_owned()))
    );
}

#[test]
fn each_fault_is_told_with_its_line_and_column() {
    let layer = "at = \"x\"\n[[layer]]\nimage = \"a\"\n";
    for (text, place, why) in [
        (
            "at = \"x\"\nlayers = 1\n",
            "line 2, column 1",
            "unknown field `layers`",
        ),
        (
            &format!("{layer}partiton = 1\n"),
            "line 4, column 1",
            "unknown field `partiton`",
        ),
        (
            &format!("{layer}partition = 0\n"),
            "line 4, column 13",
            "nonzero",
        ),
        (
            &format!("{layer}[scratch]\nsize = \"1X\"\n"),
            "line 5, column 8",
            "a size is a number",
        ),
        (
            &format!("{layer}[scratch]\nsize = true\n"),
            "line 5, column 8",
            "a size is a number",
        ),
        (
            &format!("{layer}[scratch]\n"),
            "line 4, column 1",
            "missing field `size`",
        ),
        (
            &format!("{layer}[scratch]\nsize = \"1G\"\nintegrity = \"crc\"\n"),
            "line 6, column 13",
            "aegis128",
        ),
        (
            &format!("{layer}luks = \"passphrase.txt\"\n"),
            "line 4, column 8",
            "file=FILE",
        ),
        (
            &format!("{layer}verity = \"root=ab\"\n"),
            "line 4, column 10",
            "root=DIGEST",
        ),
        (
            "guest = \"vmware\"\n",
            "line 1, column 9",
            "\"local\" or \"qemu\"",
        ),
        ("transport = \"usb\"\n", "line 1, column 13", "vpmem"),
        ("at = \"x\n", "line 1, column 8", "invalid basic string"),
        (
            "at = \"x\"\nat = \"y\"\n",
            "line 2, column 1",
            "duplicate key",
        ),
        ("é = 1\n", "line 1, column 1", ""),
    ] {
        let failure = mount(text, &[]).map(|_| ()).unwrap_err();
        let said = failure.to_string();
        assert_eq!(failure.status(), 2, "{said}");
        assert!(
            said.contains(place) && said.contains(why),
            "{text:?}: {said}"
        );
    }
}

#[test]
fn what_is_missing_is_told_with_what_to_add() {
    for (text, missing) in [
        ("", "[[layer]]"),
        ("at = \"x\"\n", "[[layer]]"),
        ("[[layer]]\nimage = \"a\"\n", "at = "),
        (
            "[[layer]]\nimage = \"a\"\nverity-tree = \"t\"\n",
            "verity = ",
        ),
        (
            "at = \"x\"\n[[layer]]\nimage = \"a\"\nkey = \"v:a\"\nluks = \"v:a\"\n",
            "leave one of them out",
        ),
        (
            "at = \"x\"\nkeep-vm = true\n[[layer]]\nimage = \"a\"\n",
            "name = ",
        ),
    ] {
        let failure = mount(text, &[]).map(|_| ()).unwrap_err();
        assert_eq!(failure.status(), 2);
        assert!(failure.to_string().contains(missing), "{failure}");
    }
}

#[test]
fn the_example_is_a_whole_file() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/blockmount.toml");
    let args = mount(&std::fs::read_to_string(example).unwrap(), &[]).unwrap();
    assert_eq!(args.layers.given.len(), 2);
}

/// What a new option of the command line is called in a file, or why it is not there.
#[test]
fn no_option_of_mount_is_forgotten_in_the_file() {
    let elsewhere = [
        "help",
        "file",
        "resume",
        "json",
        "option",
        "layer",
        "device",
        "overlay-option",
        "controller",
    ];
    let command = Cli::command();
    let mount = command.find_subcommand("mount").unwrap();
    for option in mount
        .get_arguments()
        .filter(|option| !option.is_global_set())
    {
        let name = option.get_long().unwrap();
        // A value of another type is refused as well, and a key that is not known by other words.
        let is_known = |text: String| match toml::from_str::<StackFile>(&text) {
            Ok(_) => true,
            Err(error) => !error.message().contains("unknown field"),
        };
        let places = [
            "",
            "[scratch]\nsize = \"8M\"\n",
            "[[layer]]\nimage = \"a\"\n",
        ];
        let is_said = places
            .iter()
            .any(|place| is_known(format!("{place}{name} = 1\n")));
        assert!(
            elsewhere.contains(&name) || is_said,
            "--{name} cannot be said in a file"
        );
    }
}
