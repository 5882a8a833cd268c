//! What can be said to the agent.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::{Arg, ValueExt};

use crate::endpoints::{self, Endpoints};
use crate::error::Context;
use crate::log::{LogFilter, start_log};
use crate::{AgentBuilder, AgentError, Argument};

/// The virtio port over which a host reaches the agent, unless told otherwise.
pub const PORT: &str = "blockmount.agent";

const ABOUT: &str = "\
The agent does in a guest what its host asks for: it finds the devices that the host has attached, mounts them, stacks \
them as overlays, and unplugs them. Without any of --virtio-port, --vsock, --vsock-listen, --unix and --serial it serves \
every virtio port named blockmount.agent. What is mounted when it ends stays mounted, and the next agent goes on with it.";

const INIT: &str = "\
As pid 1 (as /init of an initramfs) the program is this agent without being told: it mounts /proc, /sys, /dev, /run and \
/tmp, loads the modules whose paths are in /etc/blockmount/modules, one a line in the order of loading, and keeps an \
agent running whose arguments are in /etc/blockmount/agent.args, one a line, and in blockmount.arg=... on the kernel's \
command line. It keeps the programs of /etc/blockmount/programs running too: each file there has the path of a program \
in its first line, and an argument in each of the others.";

/// The agent's own arguments.
const OWN: [Argument; 9] = [
    Argument::new(
        "root",
        "DIR",
        "Mount only below this directory, and stack only what is there; repeatable. By default /run/mounts, /run/gcs, /run/layers and /run/blockmount",
    ),
    Argument::new(
        "journal",
        "DIR",
        "What is mounted is noted here, so that an agent started after a killed one can undo it. By default \
         /run/blockmount-agent",
    ),
    Argument::new(
        "keys",
        "DIR",
        "Where the keys of encrypted disks are that a host names by their file: a directory that only root can use, with \
         such files, of 64 bytes without a header of LUKS2. By default a host can only name keys in root's keyring",
    ),
    Argument::new(
        "set-clock",
        "",
        "Set the clock of this machine to that of each host that connects, and seed its random numbers with the host's. \
         Always so where pid 1 is this program",
    ),
    Argument::new(
        "device-timeout",
        "SECONDS",
        "How long a device may take to appear, and to be removed. By default 45; hosts of ours wait 90 seconds for an answer",
    ),
    Argument::new(
        "busy-timeout",
        "SECONDS",
        "How long the users of a device or a mount may take to go before it counts as in use. By default 5",
    ),
    Argument::new(
        "format-timeout",
        "SECONDS",
        "How long making a filesystem may take, checking one, or giving a volume's files to a group. By default 60",
    ),
    Argument::new(
        "log",
        "FILTER",
        "What is logged to stderr, such as \"blockmount_agent=debug,blockmount_linux=trace\" or \"info\"; overrides -v",
    ),
    Argument::new(
        "verbose",
        "",
        "Log more: -v the steps, -vv their details, -vvv everything",
    ),
];

/// The longest time that can be waited for: a day.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    Serve(Box<Options>),
    Print(String),
}

/// How to serve.
#[derive(Debug, Default)]
pub(crate) struct Options {
    pub(crate) endpoints: Endpoints,
    pub(crate) log: Option<String>,
    pub(crate) verbose: u8,
}

impl Options {
    /// What is logged: only what goes wrong, unless more was asked for.
    pub(crate) fn log_filter(&self) -> Result<LogFilter, AgentError> {
        let Some(text) = &self.log else {
            return Ok(LogFilter::verbose(self.verbose));
        };
        LogFilter::parse(text).context(|| format!("--log {text:?} is no log filter"))
    }

    /// Starts the log that was asked for.
    pub(crate) fn start_log(&self) -> Result<(), AgentError> {
        start_log(self.log_filter()?, false)
    }
}

/// Reads the arguments. Those that say what the agent is go into its builder.
pub(crate) fn parse(
    name: &str,
    agent: &mut AgentBuilder,
    words: impl IntoIterator<Item = OsString>,
) -> Result<Asked, lexopt::Error> {
    let mut options = Options::default();
    let mut roots: Vec<PathBuf> = Vec::new();
    let mut parser = lexopt::Parser::from_args(words);
    while let Some(argument) = parser.next()? {
        let long = match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Asked::Print(help(name, agent))),
            Arg::Short('V') | Arg::Long("version") => {
                return Ok(Asked::Print(format!(
                    "{name} {}",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            Arg::Short('v') | Arg::Long("verbose") => {
                options.verbose = options.verbose.saturating_add(1);
                continue;
            }
            Arg::Long(long) => long.to_owned(),
            other => return Err(other.unexpected()),
        };
        match &*long {
            "root" => roots.push(parser.value()?.into()),
            "journal" => agent.journal = parser.value()?.into(),
            "keys" => agent.keys = Some(parser.value()?.into()),
            "set-clock" => agent.sets_clock = true,
            "device-timeout" => agent.timeouts.device = seconds(&long, &mut parser)?,
            "busy-timeout" => agent.timeouts.busy = seconds(&long, &mut parser)?,
            "format-timeout" => agent.timeouts.format = seconds(&long, &mut parser)?,
            "log" => options.log = Some(parser.value()?.string()?),
            long if options.endpoints.argument(long, &mut parser)? => {}
            long => set(agent, long, &mut parser)?,
        }
    }
    options.endpoints.validate()?;
    if !roots.is_empty() {
        agent.roots = roots;
    }
    Ok(Asked::Serve(Box::new(options)))
}

fn seconds(name: &str, parser: &mut lexopt::Parser) -> Result<Duration, lexopt::Error> {
    let value = parser.value()?.string()?;
    let seconds = value.parse().ok();
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A deadline further away than this is none, and could be past the end of the clock.
    let seconds = seconds.filter(|seconds| *seconds <= LONGEST);
    seconds.ok_or_else(|| format!("--{name} {value:?}: not a number of seconds up to a day").into())
}

/// Gives an argument to the transport that knows it.
fn set(
    agent: &mut AgentBuilder,
    name: &str,
    parser: &mut lexopt::Parser,
) -> Result<(), lexopt::Error> {
    let transport = agent.transports.iter_mut().find(|transport| {
        let mut arguments = transport.arguments().iter();
        arguments.any(|argument| argument.name == name)
    });
    let Some(transport) = transport else {
        return Err(Arg::Long(name).unexpected());
    };
    let value = parser.value()?.string()?;
    let set = transport.set(name, &value);
    set.map_err(|error| format!("--{name} {value:?}: {error}").into())
}

fn help(name: &str, agent: &AgentBuilder) -> String {
    let mut text = format!(
        "Serves this machine, a guest, to its host.\n\nUsage: {name} [OPTIONS]\n\nOptions:\n"
    );
    let transports = agent.transports.iter();
    let arguments = endpoints::ARGUMENTS.iter();
    let arguments = arguments.chain(transports.flat_map(|known| known.arguments()));
    for Argument { name, value, help } in arguments.chain(&OWN) {
        let space = if value.is_empty() { "" } else { " " };
        text += &format!("  --{name}{space}{value}\n{}", wrapped(help, "      "));
    }
    text += &format!(
        "\n{}\n{}\nExamples:\n  \
         {name}                  in a guest of QEMU\n  \
         {name} --vsock          in a guest of Hyper-V\n  \
         {name} --unix /run/agent.sock --journal /run/agent --root /srv\n\n\
         SIGTERM or Ctrl-C ends it.",
        wrapped(ABOUT, ""),
        wrapped(INIT, "")
    );
    text
}

/// The columns of the narrowest terminal that help is written for.
const COLUMNS: usize = 80;

/// A text in lines that fit, each after an indent.
fn wrapped(text: &str, indent: &str) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && indent.len() + line.len() + 1 + word.len() > COLUMNS {
            lines += &format!("{indent}{line}\n");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines + &format!("{indent}{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Toy(Vec<String>);

    impl crate::GuestTransport for Toy {
        fn scheme(&self) -> &str {
            "toy"
        }
        fn arguments(&self) -> &[Argument] {
            const { &[Argument::new("toy-size", "SIZE", "How large toys are")] }
        }
        fn set(&mut self, argument: &str, value: &str) -> Result<(), String> {
            let size: u32 = value.parse().map_err(|_| "a size is a number")?;
            self.0.push(format!("{argument}={size}"));
            Ok(())
        }
        fn modules(&self) -> &[&str] {
            &["toy"]
        }
        fn devices(&self, _timeouts: crate::Timeouts) -> Option<crate::GuestDevices> {
            None
        }
    }

    fn parsed(words: &[&str]) -> (Result<Asked, lexopt::Error>, AgentBuilder) {
        let mut agent = crate::Agent::builder().transport(Toy::default());
        let asked = parse("agent", &mut agent, words.iter().map(OsString::from));
        (asked, agent)
    }

    #[test]
    fn a_transport_gets_its_own_arguments_and_is_in_the_help() {
        let (asked, agent) = parsed(&[
            "--toy-size",
            "7",
            "--root=/a",
            "--keys=/k",
            "--toy-size=8",
            "-vv",
            "--set-clock",
        ]);
        let Ok(Asked::Serve(options)) = asked else {
            panic!("{asked:?}");
        };
        assert_eq!(options.verbose, 2);
        assert_eq!(agent.roots, [PathBuf::from("/a")]);
        assert_eq!(agent.keys, Some("/k".into()));
        assert!(agent.sets_clock && !parsed(&[]).1.sets_clock);
        assert!(format!("{agent:?}").contains(r#"["toy-size=7", "toy-size=8"]"#));
        assert_eq!(agent.modules(), ["toy"]);
        let Ok(Asked::Print(help)) = parsed(&["--help"]).0 else {
            panic!();
        };
        assert!(
            help.contains("--toy-size SIZE\n      How large toys are\n"),
            "{help}"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_name() {
        for (words, part) in [
            (&["--toy-size", "x"][..], "a size is a number"),
            (&["--toy-size"], "toy-size"),
            (&["--roof", "/"], "--roof"),
            (&["--busy-timeout", "-1"], "a number of seconds"),
            (&["--device-timeout=1e9"], "a number of seconds"),
            (&["--format-timeout=soon"], "a number of seconds"),
            (&["extra"], "extra"),
            (&["--vsock", "--vsock-listen=x"], "vsock port"),
            (&["--vsock-listen=7"], "needs --vsock-token"),
            (&["--vsock-token=x"], "is for --vsock-listen"),
        ] {
            let error = parsed(words).0.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
