//! The program `blockmount-debug-agent`: serves on virtio ports named `blockmount.debug`, or where it is told to.
//!
//! `--root DIR` (repeatable) names a directory below which the agent mounts, `--agent PATH` the agent's program, `/init` by
//! default; `--unix PATH` and the other endpoints of an agent are understood as well. With `--exercise JSON` it does an exercise
//! in place of serving, and says how many steps it has; with `--until N` as well it is killed at a step of it.

use std::error::Error;
use std::path::PathBuf;

use blockmount_agent::{Endpoints, ROOTS, termination};
use blockmount_debug_agent::exercise::Exercise;
use blockmount_debug_agent::{DebugServer, PORT};
use lexopt::{Arg, ValueExt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (mut endpoints, mut roots) = (Endpoints::default(), Vec::<PathBuf>::new());
    let mut agent = PathBuf::from("/init");
    let (mut exercise, mut until) = (None::<Exercise>, None);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        let Arg::Long(name) = argument else {
            return Err(argument.unexpected().into());
        };
        match &*name.to_owned() {
            "root" => roots.push(parser.value()?.into()),
            "agent" => agent = parser.value()?.into(),
            "exercise" => exercise = Some(serde_json::from_str(&parser.value()?.string()?)?),
            "until" => until = Some(parser.value()?.parse()?),
            name if endpoints.argument(name, &mut parser)? => {}
            name => return Err(Arg::Long(name).unexpected().into()),
        }
    }
    match (exercise, until) {
        (Some(exercise), Some(last)) => return Ok(exercise.run_until(last).await?),
        (Some(exercise), None) => {
            println!("{}", exercise.run().await?);
            return Ok(());
        }
        (None, _) => {}
    }
    if roots.is_empty() {
        roots = ROOTS.map(PathBuf::from).into();
    }
    let server = DebugServer::new(roots, agent);
    endpoints
        .or_port(PORT)
        .serve(server, termination()?)
        .await?;
    Ok(())
}
