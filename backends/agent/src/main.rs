//! The program `blockmount-agent`: serves this guest to its host, as a process or as pid 1.
//!
//! An agent with a transport of one's own is this file with one line more:
//! `standard::agent().transport(Mine::default())`.

use std::process::ExitCode;

use blockmount_agent::{Program, standard};

fn main() -> ExitCode {
    Program::new("blockmount-agent", standard::agent()).main()
}
