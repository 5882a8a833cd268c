//! A stack in a file, `blockmount.toml`: what `mount` is told on the command line, in TOML.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read as _};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use blockmount::{HolderName, IdMap};
use clap::ValueEnum as _;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use crate::args::{FORMATS, Integrity, Layer, MountArgs, Shown, VmArgs, parse_size};
use crate::failure::{Context, Failure};
use crate::guest::{GuestKind, Socket, Transports, parse_monitor};
use crate::keys::KeyFrom;
use crate::verity::Trusted;

/// More than a stack has to say, in bytes: what is longer is another file.
const LONGEST: u64 = 1 << 20;

/// What stands for the standard input in place of a file.
const STDIN: &str = "-";

/// The file. Each key is the option of the command line with this name.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct StackFile {
    at: Option<PathBuf>,
    name: Option<HolderName>,
    #[serde(deserialize_with = "guest")]
    guest: Option<GuestKind>,
    #[serde(deserialize_with = "monitor")]
    vm: Option<PathBuf>,
    #[serde(deserialize_with = "agent")]
    agent: Option<Socket>,
    agent_token: Option<PathBuf>,
    controllers: Vec<String>,
    #[serde(deserialize_with = "parsed")]
    transport: Option<Transports>,
    keep_vm: bool,
    allow_backing: bool,
    /// Mount options of all layers of this file.
    options: Vec<String>,
    overlay_options: Vec<String>,
    /// The id map of all layers of this file that have none of their own.
    #[serde(deserialize_with = "parsed")]
    map_ids: Option<IdMap>,
    /// Further places, as on the command line.
    #[serde(deserialize_with = "views")]
    view: Vec<Shown>,
    scratch: Option<Scratch>,
    /// The topmost first.
    layer: Vec<LayerTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Scratch {
    #[serde(deserialize_with = "size")]
    size: u64,
    #[serde(default)]
    encrypt: bool,
    #[serde(default, deserialize_with = "integrity")]
    integrity: Option<Integrity>,
    #[serde(default, deserialize_with = "format")]
    format: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct LayerTable {
    image: PathBuf,
    partition: Option<NonZeroU32>,
    fs: Option<String>,
    #[serde(default, deserialize_with = "parsed")]
    verity: Option<Trusted>,
    verity_tree: Option<PathBuf>,
    #[serde(default, deserialize_with = "parsed")]
    key: Option<KeyFrom>,
    #[serde(default, deserialize_with = "parsed")]
    luks: Option<KeyFrom>,
    #[serde(default, deserialize_with = "parsed")]
    map_ids: Option<IdMap>,
    #[serde(default)]
    devices: Vec<PathBuf>,
    #[serde(default)]
    options: Vec<String>,
}

/// The arguments with what the file says that they name, if they name one. Blocks.
pub(crate) fn complete(mut args: MountArgs) -> Result<MountArgs, Failure> {
    let Some(path) = args.file.take() else {
        return Ok(args);
    };
    let directory = path.parent().unwrap_or(Path::new(""));
    read(&path)?.add_to(&mut args, directory);
    let missing = match () {
        () if args.layers.given.is_empty() => {
            "no layer: add a table [[layer]] with image = \"IMAGE\""
        }
        () if args.layers.given.iter().any(Layer::is_unvouched) => {
            "a hash tree that nothing vouches for: add verity = \"IMAGE.dmverity\" to that layer"
        }
        () if args.layers.given.iter().any(Layer::is_encrypted_twice) => {
            "a layer with a key and with luks: leave one of them out"
        }
        () if args.at.is_none() => "no place for the tree: add at = \"/mnt/tree\"",
        () if args.scratch.is_none() && (args.encrypt || args.format.is_some()) => {
            "no scratch to encrypt or format: add a table [scratch] with size = \"1G\""
        }
        () if args.integrity.is_some() && !args.encrypt => {
            "no encryption that could notice changes: add encrypt = true to the table [scratch]"
        }
        () if args.keep_vm && args.name.is_none() => {
            "no name by which a virtual machine that is kept is found again: add name = \"NAME\""
        }
        () => return Ok(args),
    };
    let (missing, advice) = missing.split_once(": ").expect("each says what to add");
    let what = format!("{} has {missing}", path.display());
    Err(Failure::usage(what).advise(advice))
}

fn read(path: &Path) -> Result<StackFile, Failure> {
    let what = || format!("cannot read {}", path.display());
    let text = read_text(path).context(what)?;
    toml::from_str(&text).map_err(|error| {
        let place = error.span().map_or(String::new(), |span| {
            let (line, column) = place(&text, span.start);
            format!(" line {line}, column {column}")
        });
        let what = format!("{}{place} makes no sense", path.display());
        let advice = "\"blockmount mount --help\" says what can be in such a file";
        Failure::usage(what)
            .because(error.message().to_owned())
            .advise(advice)
    })
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file: &mut dyn io::Read = match path == Path::new(STDIN) {
        true => &mut io::stdin().lock(),
        false => &mut File::open(path)?,
    };
    file.take(LONGEST + 1).read_to_string(&mut text)?;
    match text.len() as u64 <= LONGEST {
        true => Ok(text),
        false => Err(io::Error::other("it is longer than 1 MiB, and no stack")),
    }
}

/// The line and the column of a place in a text, both from 1.
fn place(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    let line = before.matches('\n').count() + 1;
    (line, before[line_start..].chars().count() + 1)
}

impl StackFile {
    /// What the command line says wins; layers of the file are below its layers, and lists are joined.
    fn add_to(self, args: &mut MountArgs, directory: &Path) {
        let for_all = args.layers.options.clone();
        let layers = self.layer.iter().map(|layer| Layer {
            options: [&*for_all, &*self.options, &*layer.options].concat(),
            id_map: layer
                .map_ids
                .as_ref()
                .or(args.layers.id_map.as_ref())
                .or(self.map_ids.as_ref())
                .cloned(),
            ..layer.within(directory)
        });
        args.layers.given.extend(layers);
        args.at = args.at.take().or(self.at.map(|at| directory.join(at)));
        args.name = args.name.take().or(self.name);
        // What the command line says of the place, it says alone.
        if args.guest.is_none() && args.vm.vm.is_none() {
            args.guest = self.guest;
            args.vm.or(VmArgs {
                vm: self.vm,
                agent: self.agent,
                agent_token: self.agent_token.map(|file| directory.join(file)),
                controllers: self.controllers,
            });
        }
        args.transport = args.transport.or(self.transport);
        args.keep_vm |= self.keep_vm;
        args.allow_backing |= self.allow_backing;
        args.overlay_options.splice(0..0, self.overlay_options);
        let views = self.view.into_iter().map(|shown| Shown {
            at: directory.join(&shown.at),
            ..shown
        });
        args.views.splice(0..0, views);
        if let Some(scratch) = self.scratch {
            args.scratch = args.scratch.or(Some(scratch.size));
            args.encrypt |= scratch.encrypt;
            args.integrity = args.integrity.or(scratch.integrity);
            args.format = args.format.take().or(scratch.format);
        }
    }
}

impl LayerTable {
    /// The layer, with its paths from a directory on.
    fn within(&self, directory: &Path) -> Layer {
        let verity = self.verity.clone().map(|trusted| match trusted {
            Trusted::File(path) => Trusted::File(directory.join(path)),
            given => given,
        });
        Layer {
            image: directory.join(&self.image),
            partition: self.partition,
            filesystem: self.fs.clone(),
            verity,
            verity_tree: self.verity_tree.as_ref().map(|image| directory.join(image)),
            key: self.key.as_ref().map(|key| key.within(directory)),
            luks: self.luks.as_ref().map(|key| key.within(directory)),
            devices: self
                .devices
                .iter()
                .map(|image| directory.join(image))
                .collect(),
            options: self.options.clone(),
            id_map: None,
        }
    }
}

fn monitor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let text = String::deserialize(deserializer)?;
    ensure_from_root(&text, "qemu:").map_err(D::Error::custom)?;
    parse_monitor(&text).map(Some).map_err(D::Error::custom)
}

fn agent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Socket>, D::Error> {
    let text = String::deserialize(deserializer)?;
    ensure_from_root(&text, "unix:").map_err(D::Error::custom)?;
    text.parse().map(Some).map_err(D::Error::custom)
}

/// On the command line such a path starts at the working directory, which means nothing to a file.
fn ensure_from_root(text: &str, scheme: &str) -> Result<(), String> {
    match text.strip_prefix(scheme) {
        Some(path) if !path.starts_with('/') => Err(format!(
            "{text:?} has to have a whole path, such as {scheme}/run/vm/socket"
        )),
        _ => Ok(()),
    }
}

/// A text that is a value of the command line.
fn parsed<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(D::Error::custom)
}

fn views<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Shown>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let views = texts.iter().map(|text| text.parse());
    views.collect::<Result<_, _>>().map_err(D::Error::custom)
}

fn guest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<GuestKind>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let guest = GuestKind::from_str(&text, false);
    let wrong = |_| D::Error::custom("a guest is \"local\" or \"qemu\"");
    guest.map(Some).map_err(wrong)
}

/// Whether changes are to be noticed, or by which cipher.
fn integrity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Integrity>, D::Error> {
    match toml::Value::deserialize(deserializer)? {
        toml::Value::Boolean(is_wanted) => Ok(is_wanted.then(Integrity::default)),
        toml::Value::String(name) => {
            let wrong =
                |_| D::Error::custom(format!("integrity is true or {}", Integrity::names()));
            Integrity::from_str(&name, false).map(Some).map_err(wrong)
        }
        _ => Err(D::Error::custom(format!(
            "integrity is true or {}",
            Integrity::names()
        ))),
    }
}

fn format<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    match FORMATS.contains(&&*text) {
        true => Ok(Some(text)),
        false => {
            let known = FORMATS.join(" or ");
            Err(D::Error::custom(format!("a guest makes {known}")))
        }
    }
}

/// A number of bytes, or a text such as `"1G"`.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = match toml::Value::deserialize(deserializer)? {
        toml::Value::String(text) => text,
        toml::Value::Integer(bytes) => bytes.to_string(),
        _ => {
            return Err(D::Error::custom(
                "a size is a number, or a text such as \"1G\"",
            ));
        }
    };
    parse_size(&text).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests;
