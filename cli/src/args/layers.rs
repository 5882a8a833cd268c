//! Layers on the command line, each with what is said of it.

use std::num::NonZeroU32;
use std::path::PathBuf;

use blockmount::IdMap;
use clap::{ArgMatches, Args, Command, FromArgMatches};

use crate::keys::KeyFrom;
use crate::verity::Trusted;

/// One image, and the part of it that is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) image: PathBuf,
    pub(crate) partition: Option<NonZeroU32>,
    /// The kernel's name of the filesystem, where it is not to be found out.
    pub(crate) filesystem: Option<String>,
    /// What vouches for its blocks.
    pub(crate) verity: Option<Trusted>,
    /// The image with their hash tree, if it is another one.
    pub(crate) verity_tree: Option<PathBuf>,
    /// Where the key is that it is encrypted with.
    pub(crate) key: Option<KeyFrom>,
    /// Where the passphrase is that opens it, if it is a volume of LUKS2.
    pub(crate) luks: Option<KeyFrom>,
    /// Mount options.
    pub(crate) options: Vec<String>,
    /// Further images that its filesystem has data in, in its order.
    pub(crate) devices: Vec<PathBuf>,
    /// The owners that its files appear with.
    pub(crate) id_map: Option<IdMap>,
}

impl Layer {
    /// The whole of an image.
    pub(crate) fn of(image: impl Into<PathBuf>) -> Self {
        Layer {
            image: image.into(),
            ..Layer::default()
        }
    }

    pub(crate) fn is_unvouched(&self) -> bool {
        self.verity_tree.is_some() && self.verity.is_none()
    }

    /// Whether it is said to be encrypted in two ways.
    pub(crate) fn is_encrypted_twice(&self) -> bool {
        self.key.is_some() && self.luks.is_some()
    }
}

/// `--layer IMAGE [--partition N] [--fs NAME] [--verity FILE [--verity-tree IMAGE]] [--key KEY | --luks KEY] [--device IMAGE...]
/// [--option OPTION...] [--map-ids MAP]`, as often as wanted.
///
/// What is said of a layer is an argument of its own and belongs to the layer before it, so that a file may have any
/// name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Layers<const REQUIRED: bool> {
    pub(crate) given: Vec<Layer>,
    /// The options that stand before the first, and are for all; each layer has them already.
    pub(crate) options: Vec<String>,
    /// The id map that stands before the first, likewise.
    pub(crate) id_map: Option<IdMap>,
}

pub(crate) type OptionalLayers = Layers<false>;
pub(crate) type RequiredLayers = Layers<true>;

impl<const REQUIRED: bool> Args for Layers<REQUIRED> {
    fn augment_args(command: Command) -> Command {
        let layer = clap::Arg::new("layer")
            .long("layer")
            .short('l')
            .value_name("IMAGE")
            .value_parser(clap::value_parser!(PathBuf))
            .action(clap::ArgAction::Append)
            .help("Image file or block device of a layer, the topmost first; repeatable");
        let partition = clap::Arg::new("partition")
            .long("partition")
            .short('p')
            .value_name("N")
            .value_parser(clap::value_parser!(NonZeroU32))
            .action(clap::ArgAction::Append)
            .help("Use partition N (from 1) of the --layer before it, in place of the whole image");
        let layer = match REQUIRED {
            true => layer.required_unless_present_any(["resume", "file"]),
            false => layer,
        };
        let verity = clap::Arg::new("verity")
            .long("verity")
            .value_name("FILE")
            .value_parser(clap::value_parser!(Trusted))
            .action(clap::ArgAction::Append)
            .help("Check each block of the --layer before it, by its .dmverity file or root=DIGEST,offset=BYTES");
        let verity_tree = clap::Arg::new("verity_tree")
            .long("verity-tree")
            .value_name("IMAGE")
            .value_parser(clap::value_parser!(PathBuf))
            .action(clap::ArgAction::Append)
            .requires("verity")
            .help("Image with the hash tree of the --layer before it, where that is not behind its data");
        let key = clap::Arg::new("key")
            .long("key")
            .value_name("KEY")
            .value_parser(clap::value_parser!(KeyFrom))
            .action(clap::ArgAction::Append)
            .help("Decrypt the --layer before it with this key: file=FILE, or the description of one of the type logon in the keyring of the guest's root");
        let luks = clap::Arg::new("luks")
            .long("luks")
            .value_name("KEY")
            .value_parser(clap::value_parser!(KeyFrom))
            .action(clap::ArgAction::Append)
            .help("Open the volume of LUKS2 that the --layer before it is by this passphrase: file=FILE (all of it), or the description of a key of the type user in that keyring");
        let filesystem = clap::Arg::new("fs")
            .long("fs")
            .value_name("NAME")
            .value_parser(clap::value_parser!(String))
            .action(clap::ArgAction::Append)
            .help("Mount the --layer before it as this filesystem, by the kernel's name, in place of what is found on it");
        let option = clap::Arg::new("option")
            .long("option")
            .short('o')
            .value_name("OPTION")
            .value_parser(clap::value_parser!(String))
            .action(clap::ArgAction::Append)
            .help("Mount option, such as nodev, of the --layer before it, or of all if it stands before the first; repeatable");
        let device = clap::Arg::new("device")
            .long("device")
            .value_name("IMAGE")
            .value_parser(clap::value_parser!(PathBuf))
            .action(clap::ArgAction::Append)
            .help("Image of a further device of the --layer before it, such as a blob of an erofs, in its order; repeatable");
        let id_map = clap::Arg::new("map_ids")
            .long("map-ids")
            .value_name("MAP")
            .value_parser(clap::value_parser!(IdMap))
            .action(clap::ArgAction::Append)
            .help("Show files of the --layer before it with other owners, or of all: STORED:SHOWN:COUNT, such as 0:100000:65536");
        command.args([
            layer,
            partition,
            filesystem,
            verity,
            verity_tree,
            key,
            luks,
            device,
            option,
            id_map,
        ])
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<const REQUIRED: bool> FromArgMatches for Layers<REQUIRED> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut layers = Layers::default();
        layers.update_from_arg_matches(matches)?;
        Ok(layers)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let images = matches.get_many::<PathBuf>("layer").into_iter().flatten();
        self.given = images.map(Layer::of).collect();
        self.add(matches, "partition", |layer| &mut layer.partition)?;
        self.add(matches, "fs", |layer| &mut layer.filesystem)?;
        self.add(matches, "verity", |layer| &mut layer.verity)?;
        self.add(matches, "key", |layer| &mut layer.key)?;
        self.add(matches, "luks", |layer| &mut layer.luks)?;
        self.add(matches, "verity_tree", |layer| &mut layer.verity_tree)?;
        if let Some(layer) = self.given.iter().find(|layer| layer.is_unvouched()) {
            let image = layer.image.display();
            let message = format!("--verity-tree of --layer {image} is given without a --verity");
            return Err(misplaced(message));
        }
        if let Some(layer) = self.given.iter().find(|layer| layer.is_encrypted_twice()) {
            let image = layer.image.display();
            let message = format!(
                "--key and --luks are given for --layer {image}, which is encrypted in one way"
            );
            return Err(misplaced(message));
        }
        for (image, before) in placed::<PathBuf>(matches, "device") {
            let Some(layer) = before.and_then(|index| self.given.get_mut(index)) else {
                return Err(misplaced("--device has no --layer before it".to_owned()));
            };
            layer.devices.push(image.clone());
        }
        self.add_options(matches);
        self.add_id_maps(matches);
        Ok(())
    }
}

impl<const REQUIRED: bool> Layers<REQUIRED> {
    /// Adds mount options to the layer that is before each, or to all if none is.
    fn add_options(&mut self, matches: &ArgMatches) {
        for (option, before) in placed::<String>(matches, "option") {
            if before.is_none() {
                self.options.push(option.clone());
            }
            for layer in self.one_or_all(before) {
                layer.options.push(option.clone());
            }
        }
    }

    /// Adds id maps to the layer that is before each, or to all if none is.
    fn add_id_maps(&mut self, matches: &ArgMatches) {
        for (map, before) in placed::<IdMap>(matches, "map_ids") {
            if before.is_none() {
                self.id_map = Some(map.clone());
            }
            for layer in self.one_or_all(before) {
                layer.id_map = Some(map.clone());
            }
        }
    }

    fn one_or_all(&mut self, before: Option<usize>) -> &mut [Layer] {
        match before {
            Some(index) => &mut self.given[index..=index],
            None => &mut self.given[..],
        }
    }

    /// Adds what is said of layers to the layer that is before it.
    fn add<T: Clone + Send + Sync + 'static>(
        &mut self,
        matches: &ArgMatches,
        name: &str,
        field: impl Fn(&mut Layer) -> &mut Option<T>,
    ) -> Result<(), clap::Error> {
        for (value, before) in placed::<T>(matches, name) {
            let Some(layer) = before.and_then(|index| self.given.get_mut(index)) else {
                let name = name.replace('_', "-");
                return Err(misplaced(format!("--{name} has no --layer before it")));
            };
            if field(layer).replace(value.clone()).is_some() {
                let (image, name) = (layer.image.display(), name.replace('_', "-"));
                return Err(misplaced(format!(
                    "--{name} is given twice for --layer {image}; repeat the --layer"
                )));
            }
        }
        Ok(())
    }
}

/// The values of an argument, each with the number of the layer that is before it.
fn placed<'a, T: Clone + Send + Sync + 'static>(
    matches: &'a ArgMatches,
    name: &str,
) -> impl Iterator<Item = (&'a T, Option<usize>)> + use<'a, T> {
    let layers: Vec<usize> = matches.indices_of("layer").into_iter().flatten().collect();
    let values = matches.get_many::<T>(name).into_iter().flatten();
    let said_at = matches.indices_of(name).into_iter().flatten();
    let placed = values.zip(said_at);
    placed.map(move |(value, at)| (value, layers.iter().rposition(|layer| *layer < at)))
}

fn misplaced(message: String) -> clap::Error {
    clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, message)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Cmd};

    fn layers(arguments: &[&str]) -> Result<Vec<Layer>, clap::Error> {
        let words = ["blockmount", "mount", "--at", "/x"]
            .iter()
            .chain(arguments);
        let Cmd::Mount(mount) = Cli::try_parse_from(words)?.command else {
            unreachable!()
        };
        Ok(mount.layers.given)
    }

    fn layer(image: &str, partition: u32) -> Layer {
        Layer {
            partition: NonZeroU32::new(partition),
            ..Layer::of(image)
        }
    }

    #[test]
    fn devices_belong_to_the_layer_before_them_in_their_order() {
        let words = ["-l", "a", "--device", "y", "--device", "x", "-l", "b"];
        let given = layers(&words).unwrap();
        assert_eq!(given[0].devices, [PathBuf::from("y"), "x".into()]);
        assert!(given[1].devices.is_empty());
        let misplaced = layers(&["--device", "x", "-l", "a"]).unwrap_err();
        assert_eq!(misplaced.exit_code(), 2);
    }

    #[test]
    fn a_digest_belongs_to_the_layer_before_it() {
        let given = layers(&["-l", "a", "--verity", "x", "-p", "1", "-l", "b"]).unwrap();
        assert_eq!(given[0].verity, Some(Trusted::File("x".into())));
        assert_eq!(
            (&given[1].verity, given[0].partition.map(u32::from)),
            (&None, Some(1))
        );
        assert_eq!(
            layers(&["--verity", "x", "-l", "a"])
                .unwrap_err()
                .exit_code(),
            2
        );
        let twice = layers(&["-l", "a", "--verity", "x", "--verity", "y"]);
        assert_eq!(twice.unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_key_or_a_passphrase_belongs_to_the_layer_before_it() {
        let words = ["-l", "a", "--luks", "file=p", "-l", "b", "--key", "v:b"];
        let given = layers(&words).unwrap();
        assert_eq!(given[0].luks, Some(KeyFrom::File("p".into())));
        assert_eq!(given[1].key, Some(KeyFrom::Keyring("v:b".into())));
        assert_eq!((&given[0].key, &given[1].luks), (&None, &None));
        for words in [
            &["--luks", "v:b", "-l", "a"][..],
            &["-l", "a", "--luks", "v:a", "--key", "v:b"],
            &["-l", "a", "--luks", "v:a", "--luks", "v:b"],
            &["-l", "a", "--luks", "passphrase.txt"],
        ] {
            assert_eq!(layers(words).unwrap_err().exit_code(), 2, "{words:?}");
        }
    }

    #[test]
    fn a_tree_belongs_to_a_layer_with_a_digest() {
        let given = layers(&[
            "-l",
            "a",
            "--verity",
            "x",
            "--verity-tree",
            "t",
            "-l",
            "b",
            "--verity",
            "y",
        ]);
        let given = given.unwrap();
        assert_eq!(given[0].verity_tree, Some("t".into()));
        assert_eq!(given[1].verity_tree, None);
        for words in [
            &["-l", "a", "--verity-tree", "t"][..],
            &["-l", "a", "--verity", "x", "-l", "b", "--verity-tree", "t"],
            &["--verity-tree", "t", "-l", "a", "--verity", "x"],
        ] {
            assert_eq!(layers(words).unwrap_err().exit_code(), 2, "{words:?}");
        }
    }

    #[test]
    fn an_option_belongs_to_the_layer_before_it_or_to_all() {
        let words = [
            "-o", "nodev", "-l", "a", "--fs", "erofs", "-l", "b", "-o", "nouuid", "-o", "noatime",
        ];
        let given = layers(&words).unwrap();
        assert_eq!(given[0].options, ["nodev"]);
        assert_eq!(given[1].options, ["nodev", "nouuid", "noatime"]);
        assert_eq!(given[0].filesystem.as_deref(), Some("erofs"));
        assert_eq!(given[1].filesystem, None);
        let misplaced = layers(&["--fs", "xfs", "-l", "a"]);
        assert_eq!(misplaced.unwrap_err().exit_code(), 2);
    }

    #[test]
    fn u21_an_id_map_belongs_to_the_layer_before_it_or_to_all() {
        let words = [
            "--map-ids",
            "0:7:1",
            "-l",
            "a",
            "-l",
            "b",
            "--map-ids",
            "u:0:8:1",
        ];
        let given = layers(&words).unwrap();
        let map = |text: &str| Some(text.parse().unwrap());
        assert_eq!(
            (&given[0].id_map, &given[1].id_map),
            (&map("0:7:1"), &map("u:0:8:1"))
        );
        let wrong = layers(&["-l", "a", "--map-ids", "7"]);
        assert_eq!(wrong.unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_partition_belongs_to_the_layer_before_it() {
        let words = [
            "--layer",
            "a:1",
            "-p",
            "2",
            "-l",
            "b",
            "--layer=c,d",
            "--partition=7",
        ];
        let expected = [layer("a:1", 2), layer("b", 0), layer("c,d", 7)];
        assert_eq!(layers(&words).unwrap(), expected);
    }

    #[test]
    fn a_partition_that_belongs_nowhere_is_refused() {
        for words in [
            &["-p", "2", "-l", "a"][..],
            &["-l", "a", "-p", "1", "-p", "2"],
        ] {
            assert_eq!(layers(words).unwrap_err().exit_code(), 2);
        }
        assert_eq!(layers(&["-l", "a", "-p", "0"]).unwrap_err().exit_code(), 2);
        assert_eq!(layers(&[]).unwrap_err().exit_code(), 2);
    }
}
