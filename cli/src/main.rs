//! The `blockmount` program: mounts stacks of disk images, and cleans up after itself.

mod args;
mod bench;
mod check;
mod child;
mod cleanup;
mod command_line;
mod content;
mod demo;
mod failure;
mod guest;
mod image_sources;
mod images;
mod inspect;
mod interrupt;
mod kernel;
mod keys;
mod limits;
mod machine;
mod mount;
mod recorder;
mod report;
mod run;
mod seal;
mod serve;
mod speed;
mod stack_file;
mod stacking;
mod status;
mod target;
mod terminal;
mod test_images;
mod verity;
mod viewing;

use std::path::PathBuf;
use std::process::ExitCode;

use blockmount_agent::{Endpoints, LogFilter, Program, standard};
use blockmount_checker::CheckerServer;
use tokio::runtime::Runtime;

use args::{Cli, Cmd};
use failure::{Context, Failure};
use interrupt::{Interrupt, Signals};

fn main() -> ExitCode {
    if Program::is_init() {
        agent().init();
    }
    if let Some(roots) = checked_roots() {
        return ended(check_for_host(roots));
    }
    let cli = command_line::read();
    if let Cmd::Agent(args) = cli.command {
        return agent().run(args.words(cli.verbose, cli.log));
    }
    terminal::start(cli.color, cli.quiet);
    ended(start_log(&cli).and_then(|()| execute(cli.command)))
}

fn ended(result: Result<u8, Failure>) -> ExitCode {
    match result {
        Ok(status) => status.into(),
        Err(failure) => {
            terminal::complain(&failure);
            failure.status().into()
        }
    }
}

/// The agent, which this program is for a guest.
fn agent() -> Program {
    Program::new("blockmount", standard::agent()).subcommand("agent")
}

fn execute(command: Cmd) -> Result<u8, Failure> {
    let command = match command {
        Cmd::Mount(args) => Cmd::Mount(stack_file::complete(args)?),
        Cmd::Serve(args) => Cmd::Serve(args.complete()?),
        command => command,
    };
    let layers = match &command {
        Cmd::Mount(args) => args.layers.given.len(),
        Cmd::Demo(args) => args.layers.given.len(),
        Cmd::Bench(args) => args.disks.iter().copied().max().unwrap_or_default(),
        _ => 0,
    };
    limits::ensure_files(layers)?;
    // Reading a superblock needs no runtime, and ends by itself.
    match command {
        Cmd::Inspect(args) => return inspect::run(args),
        Cmd::Completions(args) => return command_line::completions(args.shell),
        Cmd::Man(args) => return command_line::man(args.to.as_deref()),
        _ => {}
    }
    let (signals, hangup) = match &command {
        Cmd::Serve(_) => signals()?.without_hangup(),
        _ => (signals()?, None),
    };
    runtime()?.block_on(async {
        let interrupt = Interrupt::listen(signals);
        match command {
            Cmd::Serve(args) => serve::run(args, interrupt, hangup).await,
            Cmd::Status(args) => status::run(args, interrupt).await,
            Cmd::Agent(_) | Cmd::Inspect(_) | Cmd::Completions(_) | Cmd::Man(_) => {
                unreachable!("these are done before")
            }
            Cmd::Demo(args) => demo::run(args, interrupt).await,
            Cmd::Mount(args) => mount::run(args, interrupt).await,
            Cmd::Bench(args) => bench::run(args, interrupt).await,
            Cmd::Seal(args) => seal::run(args, interrupt).await,
            Cmd::Cleanup(args) => cleanup::run(args, interrupt).await,
        }
    })
}

fn signals() -> Result<Signals, Failure> {
    Signals::take_over().context(|| "cannot listen to signals".to_owned())
}

fn runtime() -> Result<Runtime, Failure> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime
        .enable_all()
        // If another cannot be started, tokio panics and then waits for the first one for ever. They only wait here, and
        // what blocks has threads of its own.
        .worker_threads(1)
        .build()
        .context(|| "cannot start the runtime".to_owned())
}

/// The first word for a program of a guest, which no user has a use for.
const CHECKER: &str = "checker";

/// The directories below which the agent of this guest mounts, if this program is its checker.
fn checked_roots() -> Option<Vec<PathBuf>> {
    let mut words = std::env::args_os().skip(1);
    let is_checker = words.next().is_some_and(|word| word == CHECKER);
    is_checker.then(|| words.map(PathBuf::from).collect())
}

/// Serves the host of this guest, for the demo: it shows what the agent has done.
fn check_for_host(roots: Vec<PathBuf>) -> Result<u8, Failure> {
    let signals = signals()?;
    runtime()?.block_on(async {
        let interrupt = Interrupt::listen(signals);
        let ended = async {
            interrupt.requested().await;
        };
        let endpoints = Endpoints::default().or_port(blockmount_checker::PORT);
        endpoints.serve(CheckerServer::new(roots), ended).await?;
        Ok(0)
    })
}

/// Starts logging to stderr: only what goes wrong, unless more was asked for. A server also says what it has met, which
/// nobody else tells its owner.
fn start_log(cli: &Cli) -> Result<(), Failure> {
    let is_server = matches!(cli.command, Cmd::Serve(_));
    let warns = is_server && cli.verbose == 0 && !cli.quiet;
    let filter = match cli.log.as_deref().or(warns.then_some("warn")) {
        None => LogFilter::verbose(cli.verbose),
        Some(text) => LogFilter::parse(text).map_err(Failure::usage)?,
    };
    if let Cmd::Serve(args) = &cli.command
        && args.logs_json()
    {
        return Ok(blockmount_agent::start_json_log(filter)?);
    }
    Ok(blockmount_agent::start_log(
        filter,
        terminal::is_colourful(),
    )?)
}
