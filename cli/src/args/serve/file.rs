//! The file of a server.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use blockmount::HolderName;
use blockmount_containerd::service::VmName;
use clap::ValueEnum as _;
use rustix::fs::OFlags;
use serde::Deserialize;
use toml::Value;

use super::super::VmArgs;
use super::Settings;
use crate::failure::{Context, Failure};
use crate::guest::{GuestKind, Socket, Transports, parse_monitor};

/// More than a server has to be told, in bytes.
const LONGEST: u64 = 1 << 20;

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct ConfigFile {
    pub(super) address: Option<PathBuf>,
    guest: Option<String>,
    vm: Option<VmKey>,
    agent: Option<String>,
    agent_token: Option<PathBuf>,
    controllers: Vec<String>,
    transport: Option<String>,
    pub(super) name: Option<HolderName>,
    pub(super) grace: Option<String>,
    pub(super) metrics: Option<String>,
    pub(super) allow_users: Vec<u32>,
}

/// The one virtual machine, or several by their names.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "vm is a string such as \"qemu:SOCKET\", or has tables such as [vm.NAME]"
)]
enum VmKey {
    One(String),
    Named(BTreeMap<String, Value>),
}

/// What is said of one guest.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct GuestTable {
    guest: Option<String>,
    vm: Option<String>,
    agent: Option<String>,
    agent_token: Option<PathBuf>,
    controllers: Vec<String>,
    transport: Option<String>,
}

/// For which guests a file is.
#[derive(Debug)]
pub(super) enum Guests {
    One(Settings),
    Named(BTreeMap<VmName, Settings>),
}

/// An error of a file on one line: its own text draws a picture over several.
fn in_line(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().lines().collect::<Vec<_>>().join(", ");
    let before = error.span().and_then(|span| text.get(..span.start));
    match before {
        Some(before) => format!("line {}: {message}", before.matches('\n').count() + 1),
        None => message,
    }
}

/// What fails if a key has a value that cannot be.
pub(super) fn wrong(key: &str, path: &Path, why: impl Into<String>) -> Failure {
    let what = format!("{key} in {} makes no sense", path.display());
    Failure::usage(what).because(why.into())
}

impl ConfigFile {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let what = || format!("cannot read {}", path.display());
        // A pipe that nobody writes to would be waited for without an end.
        let mut options = OpenOptions::new();
        let options = options
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        let file = options.open(path).context(what)?;
        if !file.metadata().context(what)?.is_file() {
            return Err(Failure::usage(what()).because("it is no regular file"));
        }
        let mut text = String::new();
        let mut file = file.take(LONGEST + 1);
        file.read_to_string(&mut text).context(what)?;
        if text.len() as u64 > LONGEST {
            let why = format!("it is longer than {LONGEST} bytes");
            return Err(Failure::usage(what()).because(why));
        }
        let parsed: Result<ConfigFile, toml::de::Error> = toml::from_str(&text);
        parsed.map_err(|error| Failure::usage(what()).because(in_line(&error, &text)))
    }

    /// Takes what is said of guests out.
    pub(super) fn take_guests(&mut self, path: &Path) -> Result<Guests, Failure> {
        let mut table = GuestTable {
            guest: self.guest.take(),
            vm: None,
            agent: self.agent.take(),
            agent_token: self.agent_token.take(),
            controllers: std::mem::take(&mut self.controllers),
            transport: self.transport.take(),
        };
        let named = match self.vm.take() {
            None => return table.settings("", path).map(Guests::One),
            Some(VmKey::One(vm)) => {
                table.vm = Some(vm);
                return table.settings("", path).map(Guests::One);
            }
            Some(VmKey::Named(named)) => named,
        };
        if table.settings("", path)? != Settings::default() {
            let why = "what is said of a guest belongs into its table, where there are several";
            return Err(wrong("[vm]", path, why));
        }
        if named.is_empty() {
            return Err(wrong("[vm]", path, "it names no virtual machine"));
        }
        let named = named.into_iter().map(|(name, value)| {
            let key = format!("[vm.{name}]");
            let parsed: Result<VmName, _> = name.parse();
            let parsed = parsed.map_err(|error| wrong(&key, path, error.to_string()))?;
            let table = GuestTable::deserialize(value);
            let table = table.map_err(|error| wrong(&key, path, error.message()))?;
            Ok((parsed, table.settings(&format!("vm.{name}."), path)?))
        });
        named.collect::<Result<_, _>>().map(Guests::Named)
    }
}

impl GuestTable {
    fn settings(self, of: &str, path: &Path) -> Result<Settings, Failure> {
        let wrong = |key: &'static str| move |why: String| wrong(&format!("{of}{key}"), path, why);
        let guest = self.guest.map(|text| GuestKind::from_str(&text, false));
        let vm = self.vm.as_deref().map(parse_monitor);
        let agent = self.agent.map(|text| text.parse::<Socket>());
        let transport = self.transport.map(|text| text.parse::<Transports>());
        let transport = transport.transpose().map_err(|error| error.to_string());
        Ok(Settings {
            guest: guest.transpose().map_err(wrong("guest"))?,
            vm: VmArgs {
                vm: vm.transpose().map_err(wrong("vm"))?,
                agent: agent.transpose().map_err(wrong("agent"))?,
                agent_token: self.agent_token,
                controllers: self.controllers,
            },
            transport: transport.map_err(wrong("transport"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_none_or_make_no_sense_are_refused_on_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.toml");
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            ConfigFile::read(&path).unwrap_err().on_one_line()
        };
        let said = refused("name = \"x\"\nnonsense = 1\n");
        assert!(said.contains("line 2: unknown field `nonsense`"), "{said}");
        assert!(!said.contains('\n'), "{said}");
        // Cut off, it would make sense.
        let said = refused(&"#\n".repeat(LONGEST as usize / 2 + 1));
        assert!(said.contains("longer than"), "{said}");
        // Nobody ever writes to it.
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let said = ConfigFile::read(&path).unwrap_err().on_one_line();
        assert!(said.contains("no regular file"), "{said}");
    }
}
