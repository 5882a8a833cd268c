//! The program `blockmount-debug-agent`: serves on virtio ports named `blockmount.debug`, or where it is told to.
//!
//! `--root DIR` (repeatable) names a directory below which the agent mounts, `--agent PATH` the agent's program, `/init` by
//! default; `--unix PATH` and the other endpoints of an agent are understood as well.

use std::error::Error;
use std::path::PathBuf;

use blockmount_agent::{Endpoints, ROOTS, termination};
use blockmount_debug_agent::{DebugServer, PORT};
use lexopt::Arg;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (mut endpoints, mut roots) = (Endpoints::default(), Vec::<PathBuf>::new());
    let mut agent = PathBuf::from("/init");
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        let Arg::Long(name) = argument else {
            return Err(argument.unexpected().into());
        };
        match &*name.to_owned() {
            "root" => roots.push(parser.value()?.into()),
            "agent" => agent = parser.value()?.into(),
            name if endpoints.argument(name, &mut parser)? => {}
            name => return Err(Arg::Long(name).unexpected().into()),
        }
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
