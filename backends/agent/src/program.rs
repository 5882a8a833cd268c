//! The agent as a program: an ordinary process, or pid 1.

use std::ffi::OsString;
use std::future::Future;
use std::io::{self, Write as _};
use std::process::ExitCode;

use blockmount::printable;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{self, Asked, Options, PORT};
use crate::error::{AgentError, Context, causes};
use crate::log::say;
use crate::{AgentBuilder, init};

/// Exit status where the command line makes no sense.
const USAGE: u8 = 2;

/// A program around an agent.
#[derive(Debug)]
pub struct Program {
    /// What starts it: its name, and the subcommand if it has one.
    command: Vec<&'static str>,
    agent: AgentBuilder,
}

impl Program {
    /// A program that is nothing but this agent.
    pub fn new(name: &'static str, agent: AgentBuilder) -> Self {
        Program {
            command: vec![name],
            agent,
        }
    }

    /// The agent is what the program does when its first argument is this word.
    #[must_use]
    pub fn subcommand(mut self, word: &'static str) -> Self {
        self.command.push(word);
        self
    }

    /// Does what this process was started for: runs the machine as pid 1, or serves as the command line says.
    pub fn main(self) -> ExitCode {
        let words = std::env::args_os().skip(self.command.len());
        match init::is_asked_for() {
            true => self.init(),
            false => self.run(words),
        }
    }

    /// Whether the kernel has started this process as `/init` of its machine.
    pub fn is_init() -> bool {
        init::is_asked_for()
    }

    /// Runs the machine as its pid 1, with an agent as a child. Turns the machine off if that is impossible.
    pub fn init(self) -> ! {
        // An agent that is started by hand with the same arguments behaves the same.
        let own = self.command.iter().skip(1).copied().collect();
        let mut program = self;
        init::run(own, |words| program.parse(words))
    }

    /// Serves as these arguments say, until a signal comes.
    pub fn run(mut self, words: impl IntoIterator<Item = OsString>) -> ExitCode {
        let options = match self.parse(words) {
            Ok(Asked::Serve(options)) => options,
            Ok(Asked::Print(text)) => {
                let written = writeln!(io::stdout(), "{text}");
                return written.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
            }
            Err(error) => {
                complain(&error, &format!("see {} --help", self.name()));
                return USAGE.into();
            }
        };
        match self.serve(*options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error, "");
                ExitCode::FAILURE
            }
        }
    }

    fn parse(&mut self, words: impl IntoIterator<Item = OsString>) -> Result<Asked, AgentError> {
        let name = self.name();
        let asked = args::parse(&name, &mut self.agent, words);
        let asked = asked.context(|| "the command line makes no sense".to_owned())?;
        if let Asked::Serve(options) = &asked {
            options.log_filter()?;
        }
        Ok(asked)
    }

    fn name(&self) -> String {
        self.command.join(" ")
    }

    fn serve(self, options: Options) -> Result<(), AgentError> {
        options.start_log()?;
        if !rustix::process::geteuid().is_root() {
            let name = self.name();
            return Err(AgentError::new(format!(
                "the agent mounts, which only root may; run it with sudo: sudo {name} ..."
            )));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            // If another cannot be started, tokio panics and then waits for the first one for ever. They only wait here, and
            // what blocks has threads of its own.
            .worker_threads(1)
            .build()
            .context(|| "cannot start the runtime".to_owned())?;
        runtime.block_on(async {
            let ended = termination().context(|| "cannot listen to signals".to_owned())?;
            let agent = self.agent.build().await?;
            options.endpoints.or_port(PORT).serve(agent, ended).await
        })
    }
}

/// Waits for SIGINT, SIGTERM or SIGHUP, which end nothing by themselves any more.
///
/// # Errors
///
/// If signals cannot be handled. Must be called in a runtime.
pub fn termination() -> io::Result<impl Future<Output = ()> + Send> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

/// Says what went wrong, and each cause on a line of its own.
fn complain(error: &AgentError, advice: &str) {
    say(format_args!("error: {}", printable(error)));
    for cause in causes(error) {
        say(format_args!("  because: {}", printable(cause)));
    }
    if !advice.is_empty() {
        say(format_args!("advice: {advice}"));
    }
}
