//! What a server is told, on the command line and in its file.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount::HolderName;
use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::failure::{Context, Failure};
use crate::guest::{ForeignVm, GuestKind, Socket, Transports, parse_monitor};
use crate::serve::WebAddress;

use super::VmArgs;

/// Where clients of the service find it unless another place is said.
const ADDRESS: &str = "/run/blockmount.sock";
/// The name under which the next server finds what this one has left, unless another is said.
const NAME: &str = "serve";
/// More than a server has to be told, in bytes.
const LONGEST: u64 = 1 << 20;

#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The service is containerd.services.mounts.v1.Mounts, over gRPC. What is \
activated stays when the server ends, also by kill -9, and the next server with \
the same --name takes it over; only once nothing is activated any more does the \
end of the server remove all that is its own. Only processes of root and of \
users that are allowed may connect.

SIGTERM ends it once the calls under way have their answers. SIGHUP reads the \
--config again, of which allow-users takes effect. With systemd: Type=notify, \
and a socket unit if you like (LISTEN_FDS).

A --config has these options in TOML, by their names without dashes in front: \
address, guest, vm, agent, agent-token, controllers (a list), transport, name, grace, \
metrics, allow-users (a list). The command line wins.

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

    /// How disks get into a virtual machine; scsi by default
    #[arg(long, value_parser = Transports::parser())]
    pub(crate) transport: Option<Transports>,

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

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct ConfigFile {
    address: Option<PathBuf>,
    guest: Option<String>,
    vm: Option<String>,
    agent: Option<String>,
    agent_token: Option<PathBuf>,
    controllers: Vec<String>,
    transport: Option<String>,
    name: Option<HolderName>,
    grace: Option<String>,
    metrics: Option<String>,
    allow_users: Vec<u32>,
}

impl ServeArgs {
    /// These, and what else the file says.
    pub(crate) fn complete(mut self) -> Result<Self, Failure> {
        let Some(path) = self.config.clone() else {
            return Ok(self);
        };
        let file = read(&path)?;
        let wrong = |key: &'static str| {
            let path = path.clone();
            move |why: String| {
                let what = format!("{key} in {} makes no sense", path.display());
                Failure::usage(what).because(why)
            }
        };
        let guest = file.guest.map(|text| GuestKind::from_str(&text, false));
        let guest = guest.transpose().map_err(wrong("guest"))?;
        let vm = file.vm.as_deref().map(parse_monitor).transpose();
        let agent = file.agent.map(|text| text.parse::<Socket>()).transpose();
        let vm = VmArgs {
            vm: vm.map_err(wrong("vm"))?,
            agent: agent.map_err(wrong("agent"))?,
            agent_token: file.agent_token,
            controllers: file.controllers,
        };
        let transport = file.transport.map(|text| text.parse::<Transports>());
        let transport = transport.transpose();
        let transport = transport.map_err(|error| wrong("transport")(error.to_string()))?;
        let metrics = file.metrics.map(|text| text.parse::<WebAddress>());
        let metrics = metrics.transpose().map_err(wrong("metrics"))?;
        let grace = file.grace.map(|text| parse_time(&text));
        let grace = grace.transpose().map_err(wrong("grace"))?;
        self.address = self.address.or(file.address);
        // What the command line says of the place, it says alone.
        if self.guest.is_none() && self.vm.vm.is_none() {
            self.guest = guest;
            self.vm.or(vm);
        }
        self.transport = self.transport.or(transport);
        self.name = self.name.or(file.name);
        self.grace = self.grace.or(grace);
        self.metrics = self.metrics.or(metrics);
        Ok(self)
    }

    pub(crate) fn address(&self) -> &Path {
        self.address.as_deref().unwrap_or(Path::new(ADDRESS))
    }

    pub(crate) fn guest(&self) -> GuestKind {
        self.vm.guest(self.guest)
    }

    /// The virtual machine that somebody else has started, if it is for one.
    pub(crate) fn foreign(&self) -> Result<Option<ForeignVm>, Failure> {
        self.vm.foreign(self.guest)
    }

    pub(crate) fn name(&self) -> HolderName {
        let default = || HolderName::new(NAME).expect("it is a short word");
        self.name.clone().unwrap_or_else(default)
    }

    /// The users whose processes may connect, as the file says now.
    pub(crate) fn allowed_users(&self) -> Result<Vec<u32>, Failure> {
        let file = self.config.as_deref().map(read).transpose()?;
        let of_file = file.unwrap_or_default().allow_users.into_iter();
        Ok(self.allow_users.iter().copied().chain(of_file).collect())
    }

    pub(crate) fn logs_json(&self) -> bool {
        self.log_format == LogFormat::Json
    }
}

fn read(path: &Path) -> Result<ConfigFile, Failure> {
    let what = || format!("cannot read {}", path.display());
    let file = File::open(path).context(what)?;
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).context(what)?;
    let parsed: Result<ConfigFile, toml::de::Error> = toml::from_str(&text);
    parsed.map_err(|error| Failure::usage(what()).because(error))
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
