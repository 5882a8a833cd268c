//! The `blockmount` program: mounts stacks of disk images, and cleans up after itself.

mod args;
mod check;
mod child;
mod cleanup;
mod demo;
mod failure;
mod guest;
mod image_sources;
mod images;
mod inspect;
mod interrupt;
mod kernel;
mod machine;
mod mount;
mod recorder;
mod report;
mod run;
mod seal;
mod speed;
mod stacking;
mod terminal;
mod test_images;
mod verity;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use blockmount_agent::{Endpoints, Program, standard};
use blockmount_checker::CheckerServer;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{CheckerArgs, Cli, Cmd};
use failure::{Context, Failure};
use interrupt::Interrupt;
use terminal::say;

fn main() -> ExitCode {
    if Program::is_init() {
        agent().init();
    }
    let cli = Cli::parse();
    if let Cmd::Agent(args) = cli.command {
        return agent().run(args.words(cli.verbose, cli.log));
    }
    let result = start_log(&cli).and_then(|()| execute(cli.command));
    match result {
        Ok(status) => status.into(),
        Err(failure) => {
            say(format_args!("{failure}"));
            failure.status().into()
        }
    }
}

/// The agent, which this program is for a guest.
fn agent() -> Program {
    Program::new("blockmount", standard::agent()).subcommand("agent")
}

fn execute(command: Cmd) -> Result<u8, Failure> {
    // Reading a superblock needs no runtime, and ends by itself.
    if let Cmd::Inspect(args) = command {
        return inspect::run(args);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context(|| "cannot start the runtime".to_owned())?;
    runtime.block_on(async {
        let interrupt = Interrupt::listen().context(|| "cannot listen to signals".to_owned())?;
        match command {
            Cmd::Agent(_) => unreachable!("the agent is started before"),
            Cmd::Demo(args) => demo::run(args, interrupt).await,
            Cmd::Mount(args) => mount::run(args, interrupt).await,
            Cmd::Seal(args) => seal::run(args, interrupt).await,
            Cmd::Cleanup(args) => cleanup::run(args, interrupt).await,
            Cmd::Inspect(args) => inspect::run(args),
            Cmd::Checker(args) => check_for_host(args, &interrupt).await,
        }
    })
}

/// Serves the host of this guest, for the demo: it shows what the agent has done.
async fn check_for_host(args: CheckerArgs, interrupt: &Interrupt) -> Result<u8, Failure> {
    let server = CheckerServer::new(args.roots);
    let ended = async {
        interrupt.requested().await;
    };
    let endpoints = Endpoints::default().or_port(blockmount_checker::PORT);
    endpoints.serve(server, ended).await?;
    Ok(0)
}

/// Whether somebody looks at stderr who likes colours. The console of a guest ends up in a file.
fn is_colourful() -> bool {
    let declined = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stderr().is_terminal() && !declined && std::process::id() != 1
}

/// Starts logging to stderr: only what goes wrong, unless more was asked for.
fn start_log(cli: &Cli) -> Result<(), Failure> {
    let default = match cli.verbose {
        0 => "error",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = cli.log.as_deref().unwrap_or(default);
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Failure::usage(format!("--log {filter:?} is no log filter"))
            .because(error)
            .advise("use levels, such as --log debug, or --log blockmount_linux=trace,info")
    })?;
    // A log that cannot be written is no reason to panic while disks are attached.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(is_colourful())
        .log_internal_errors(false)
        .init();
    Ok(())
}
