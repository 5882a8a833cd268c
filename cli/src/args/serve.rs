//! What a server is told, on the command line and in its file.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount::HolderName;
use blockmount_containerd::service::VmName;
use clap::{Args, ValueEnum};

use crate::failure::Failure;
use crate::guest::{ForeignVm, GuestKind, Place, Transports};
use crate::serve::WebAddress;

use super::VmArgs;
use file::{ConfigFile, Guests, wrong};

/// Where clients of the service find it unless another place is said.
const ADDRESS: &str = "/run/blockmount.sock";
/// The name under which the next server finds what this one has left, unless another is said.
const NAME: &str = "serve";

#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The service is containerd.services.mounts.v1.Mounts, over gRPC. What is \
activated stays when the server ends, also by kill -9, and the next server with \
the same --name takes it over; only what a client has activated as temporary is \
released then. Only once nothing is activated any more does the end of the \
server remove all that is its own. Only processes of root and of \
users that are allowed may connect: the socket is 0600, and 0666 while there are \
such users, of whose processes the kernel tells. That of a socket unit has the \
permissions of its SocketMode=.

SIGTERM ends it once the calls under way have their answers. SIGHUP reads the \
--config again: allow-users takes effect, a new table [vm.NAME] is served, and \
one that has gone takes nothing more, and goes when nothing is activated in it; a \
machine of a table that has died is replaced, once nothing is activated in it; all else waits for \
the next start. With systemd: Type=notify with ExecReload=kill -HUP $MAINPID, and a \
socket unit if you like (LISTEN_FDS).

A --config has these options in TOML, by their names without dashes in front: \
address, guest, vm, agent, agent-token, controllers (a list), transport, name, grace, \
metrics, allow-users (a list). The command line wins. For several virtual machines \
it has a table [vm.NAME] for each, with those of guest, vm, agent, agent-token, \
controllers and transport that are about it; the label blockmount.vm=NAME says in \
which of them a list is activated, and may be left out where there is one. A \
machine that has ended is left out until the next start or SIGHUP.

Examples:
  sudo blockmount serve
  sudo blockmount serve --guest qemu --address /run/vm1.sock --name vm1
  sudo blockmount serve --vm qemu:/run/vm/qmp --agent unix:/run/vm/agent
  sudo blockmount -v serve --config /etc/blockmount/serve.toml --log-format json")]
pub(crate) struct ServeArgs {
    /// The socket; one that systemd has opened comes first [default: /run/blockmount.sock]
    #[arg(long, value_name = "PATH")]
    address: Option<PathBuf>,

    /// Where mounts are made [default: local]
    #[arg(long, value_enum)]
    guest: Option<GuestKind>,

    #[command(flatten)]
    vm: VmArgs,

    /// The guests of a file that names several.
    #[arg(skip)]
    named: BTreeMap<VmName, Settings>,

    /// What the file has said of the server itself.
    #[arg(skip)]
    of_server: OfServer,

    /// How disks get into a virtual machine; scsi by default
    #[arg(long, value_parser = Transports::parser())]
    transport: Option<Transports>,

    /// The name under which the next server finds what this one has left [default: serve]
    #[arg(long, value_name = "NAME")]
    name: Option<HolderName>,

    /// Release what an earlier server has left and no client asks for within this time: 90s, 10m, 1h [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) grace: Option<Duration>,

    /// Offer metrics for Prometheus, and a page that shows them, at an address such as 127.0.0.1:9464 or at unix:PATH, to all who can reach it
    #[arg(long, value_name = "ADDR|unix:PATH")]
    pub(crate) metrics: Option<WebAddress>,

    /// Let processes of this user connect, by its number; repeatable
    #[arg(long = "allow-user", value_name = "UID")]
    allow_users: Vec<u32>,

    /// Read options from a file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// How the log on stderr is written
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// An object of JSON in each line
    Json,
}

/// What is said of one guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Settings {
    guest: Option<GuestKind>,
    vm: VmArgs,
    transport: Option<Transports>,
}

/// What a file says of the server itself, and takes effect at its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct OfServer {
    address: Option<PathBuf>,
    name: Option<HolderName>,
    grace: Option<String>,
    metrics: Option<String>,
}

impl OfServer {
    fn of(file: &ConfigFile) -> Self {
        OfServer {
            address: file.address.clone(),
            name: file.name.clone(),
            grace: file.grace.clone(),
            metrics: file.metrics.clone(),
        }
    }

    /// The keys of which the other says something else.
    fn differing(&self, other: &Self) -> Vec<&'static str> {
        let keys = [
            ("address", self.address != other.address),
            ("name", self.name != other.name),
            ("grace", self.grace != other.grace),
            ("metrics", self.metrics != other.metrics),
        ];
        let differing = keys.into_iter().filter(|(_, differs)| *differs);
        differing.map(|(key, _)| key).collect()
    }
}

/// A guest that a server is for.
#[derive(Debug)]
pub(crate) struct Served {
    settings: Settings,
    /// The name of its virtual machine; none for the one guest of a server without names.
    pub(crate) name: Option<VmName>,
    pub(crate) guest: GuestKind,
    /// The virtual machine, if somebody else has started it.
    pub(crate) vm: Option<ForeignVm>,
    pub(crate) place: Place,
}

/// How a file differs from what is served.
#[derive(Debug, Default)]
pub(crate) struct ReadAgain {
    /// The users whose processes may connect.
    pub(crate) users: Vec<u32>,
    /// What is not served yet.
    pub(crate) added: Vec<Served>,
    /// What it does not name any more.
    pub(crate) removed: Vec<VmName>,
    /// Of what it says something else.
    pub(crate) changed: Vec<VmName>,
    /// The keys about the server itself that have changed.
    pub(crate) keys: Vec<&'static str>,
}

impl Settings {
    fn served(&self, name: Option<VmName>) -> Result<Served, Failure> {
        let vm = self.vm.foreign(self.guest)?;
        let guest = self.vm.guest(self.guest);
        let place = Place::of(guest, vm.clone(), self.transport, false)?;
        Ok(Served {
            settings: self.clone(),
            name,
            guest,
            vm,
            place,
        })
    }
}

impl ServeArgs {
    /// These, and what else the file says.
    pub(crate) fn complete(mut self) -> Result<Self, Failure> {
        let Some(path) = self.config.clone() else {
            return Ok(self);
        };
        let mut file = ConfigFile::read(&path)?;
        self.of_server = OfServer::of(&file);
        let of_file = file.take_guests(&path)?;
        let wrong = |key: &'static str| {
            let path = &path;
            move |why: String| wrong(key, path, why)
        };
        let metrics = file.metrics.map(|text| text.parse::<WebAddress>());
        let metrics = metrics.transpose().map_err(wrong("metrics"))?;
        let grace = file.grace.map(|text| parse_time(&text));
        let grace = grace.transpose().map_err(wrong("grace"))?;
        match of_file {
            Guests::One(settings) => {
                // What the command line says of the place, it says alone.
                if self.guest.is_none() && self.vm.vm.is_none() {
                    self.guest = settings.guest;
                    self.vm.or(settings.vm);
                }
                self.transport = self.transport.or(settings.transport);
            }
            Guests::Named(_) if self.settings() != Settings::default() => {
                let what = format!(
                    "the command line is about one guest, and {} names several",
                    path.display()
                );
                let advice = "say in the tables [vm.NAME] of the file what is to be said of each";
                return Err(Failure::usage(what).advise(advice));
            }
            Guests::Named(named) => self.named = named,
        }
        self.address = self.address.or(file.address);
        self.name = self.name.or(file.name);
        self.grace = self.grace.or(grace);
        self.metrics = self.metrics.or(metrics);
        Ok(self)
    }

    /// What it is for: one guest, or several by their names.
    pub(crate) fn served(&self) -> Result<Vec<Served>, Failure> {
        if self.named.is_empty() {
            return Ok(vec![self.settings().served(None)?]);
        }
        served_by(&self.named)
    }

    /// What the file says now, compared with what is served. What is lost counts as not served yet.
    pub(crate) fn read_again(&self, lost: &[VmName]) -> Result<ReadAgain, Failure> {
        let mut again = ReadAgain {
            users: self.allow_users.clone(),
            ..ReadAgain::default()
        };
        let Some(path) = &self.config else {
            return Ok(again);
        };
        let mut file = ConfigFile::read(path)?;
        again.users.append(&mut file.allow_users);
        again.keys = self.of_server.differing(&OfServer::of(&file));
        let named = match file.take_guests(path)? {
            Guests::One(_) if self.named.is_empty() => return Ok(again),
            Guests::Named(named) if !self.named.is_empty() => named,
            guests => {
                let (now, server) = match guests {
                    Guests::One(_) => ("no virtual machines", "several"),
                    Guests::Named(_) => ("several virtual machines", "one guest"),
                };
                let path = path.display();
                let what = format!("{path} names {now} now, and the server is for {server}");
                return Err(Failure::usage(what).advise("start the server again"));
            }
        };
        again.added = served_by(&named)?;
        again.added.retain(|served| {
            let mut names = served.name.iter();
            names.all(|name| !self.named.contains_key(name) || lost.contains(name))
        });
        let names = || self.named.keys().cloned();
        again.removed = names().filter(|name| !named.contains_key(name)).collect();
        let has_changed = |name: &VmName| {
            let now = named.get(name);
            now.is_some_and(|now| self.named.get(name) != Some(now))
        };
        again.changed = names().filter(has_changed).collect();
        Ok(again)
    }

    /// The other name by which a machine of somebody else is served, if it is.
    pub(crate) fn serves_as(&self, of: &Served) -> Option<&VmName> {
        let monitor = of.settings.vm.vm.as_ref()?;
        let is_same = |settings: &Settings| settings.vm.vm.as_ref() == Some(monitor);
        let served = self.named.iter().find(|(_, settings)| is_same(settings));
        served.map(|(name, _)| name)
    }

    /// A guest of the file is served now.
    pub(crate) fn remember(&mut self, served: Served) {
        if let Some(name) = served.name {
            self.named.insert(name, served.settings);
        }
    }

    /// A guest of the file is not served, or not any more.
    pub(crate) fn forget(&mut self, name: &VmName) {
        self.named.remove(name);
    }

    /// Of several guests no others are served.
    pub(crate) fn remember_only<'a>(&mut self, names: impl IntoIterator<Item = &'a VmName>) {
        let names: BTreeSet<&VmName> = names.into_iter().collect();
        self.named.retain(|name, _| names.contains(name));
    }

    /// What the command line says of its guest.
    fn settings(&self) -> Settings {
        Settings {
            guest: self.guest,
            vm: self.vm.clone(),
            transport: self.transport,
        }
    }

    pub(crate) fn address(&self) -> &Path {
        self.address.as_deref().unwrap_or(Path::new(ADDRESS))
    }

    pub(crate) fn name(&self) -> HolderName {
        let default = || HolderName::new(NAME).expect("it is a short word");
        self.name.clone().unwrap_or_else(default)
    }

    /// The users whose processes may connect, as the file says now.
    pub(crate) fn allowed_users(&self) -> Result<Vec<u32>, Failure> {
        let file = self.config.as_deref().map(ConfigFile::read).transpose()?;
        let of_file = file.unwrap_or_default().allow_users.into_iter();
        Ok(self.allow_users.iter().copied().chain(of_file).collect())
    }

    pub(crate) fn logs_json(&self) -> bool {
        self.log_format == LogFormat::Json
    }
}

/// The guests of a file, none of them twice.
fn served_by(named: &BTreeMap<VmName, Settings>) -> Result<Vec<Served>, Failure> {
    let served = named.iter().map(|(name, settings)| {
        settings.served(Some(name.clone())).map_err(|failure| {
            Failure::usage(format!("[vm.{name}] makes no sense")).because(failure.on_one_line())
        })
    });
    let served: Vec<Served> = served.collect::<Result<_, _>>()?;
    let mut monitors = BTreeMap::new();
    for Served { name, vm, .. } in &served {
        let (Some(name), Some(vm)) = (name, vm) else {
            continue;
        };
        if let Some(other) = monitors.insert(&vm.monitor, name) {
            let what = format!("[vm.{other}] and [vm.{name}] are the same virtual machine");
            return Err(Failure::usage(what).advise("leave one of them out"));
        }
    }
    Ok(served)
}

/// A time: a number of seconds, or one with s, m or h behind it.
fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time, such as 90s, 10m or 1h");
    let (number, scale) = match text.strip_suffix(['s', 'm', 'h']) {
        None => (text, 1),
        Some(number) if text.ends_with('s') => (number, 1),
        Some(number) if text.ends_with('m') => (number, 60),
        Some(number) => (number, 3600),
    };
    let number: u32 = number.parse().map_err(|_| wrong())?;
    Ok(Duration::from_secs(u64::from(number) * scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("10m", 600),
            ("1h", 3600),
            ("0", 0),
        ] {
            assert_eq!(parse_time(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "s", "-1", "1d", "1.5h", "1 h", "99999999999"] {
            assert!(parse_time(text).is_err(), "{text:?}");
        }
    }
}
