//! The agent of a guest with one transport more than the standard one: one line.

use std::process::ExitCode;

use blockmount_agent::{Program, standard};
use third_party_transport::VirtioBlk;

fn main() -> ExitCode {
    Program::new(
        "third-party-agent",
        standard::agent().transport(VirtioBlk::default()),
    )
    .main()
}
