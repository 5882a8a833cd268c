//! A virtual machine that somebody else has started, on the command line and in files.

use std::path::PathBuf;

use clap::Args;

use crate::failure::Failure;
use crate::guest::{ForeignVm, GuestKind, Socket, parse_monitor};

#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub(crate) struct VmArgs {
    /// Use a virtual machine that somebody else has started, by the socket of its QMP monitor; nothing else in it is touched, and it goes on
    #[arg(long, value_name = "qemu:SOCKET", value_parser = parse_monitor)]
    pub(crate) vm: Option<PathBuf>,

    /// Where the agent in that machine is reached
    #[arg(long, value_name = "unix:PATH|vsock:CID:PORT")]
    pub(crate) agent: Option<Socket>,

    /// What that agent is shown first: the file that it has as its --vsock-token
    #[arg(long, value_name = "FILE")]
    pub(crate) agent_token: Option<PathBuf>,

    /// A SCSI controller of that machine, by its id, in the order in which the agent was told of them; repeatable [default: scsi0]
    #[arg(long = "controller", value_name = "ID")]
    pub(crate) controllers: Vec<String>,
}

impl VmArgs {
    /// Which guest it is, beside what --guest says.
    pub(crate) fn guest(&self, guest: Option<GuestKind>) -> GuestKind {
        match self.vm {
            Some(_) => GuestKind::Foreign,
            None => guest.unwrap_or_default(),
        }
    }

    /// The machine, if there is one, in whole.
    pub(crate) fn foreign(&self, guest: Option<GuestKind>) -> Result<Option<ForeignVm>, Failure> {
        let refuse = |what: &str, advice: &str| Err(Failure::usage(what).advise(advice));
        let (monitor, agent) = match (&self.vm, &self.agent) {
            (Some(_), _) if guest.is_some() => {
                return refuse(
                    "--vm names a virtual machine, and --guest another place",
                    "leave one of them out",
                );
            }
            (Some(monitor), Some(agent)) => (monitor.clone(), agent.clone()),
            (Some(_), None) => {
                return refuse(
                    "a --vm has an agent in its guest that has to be reached",
                    "add --agent unix:PATH or --agent vsock:CID:PORT",
                );
            }
            (None, None) if self.agent_token.is_none() && self.controllers.is_empty() => {
                return Ok(None);
            }
            (None, _) => {
                return refuse(
                    "--agent, --agent-token and --controller are about a virtual machine that others have started",
                    "add --vm qemu:SOCKET, the socket of its monitor",
                );
            }
        };
        let token = self.agent_token.as_ref().map(std::path::absolute);
        let token = token
            .transpose()
            .map_err(|error| Failure::usage("--agent-token is no path").because(error))?;
        Ok(Some(ForeignVm {
            token,
            ..ForeignVm::new(monitor, agent, self.controllers.clone())
        }))
    }

    /// These, and what else a file says.
    pub(crate) fn or(&mut self, file: VmArgs) {
        self.vm = self.vm.take().or(file.vm);
        self.agent = self.agent.take().or(file.agent);
        self.agent_token = self.agent_token.take().or(file.agent_token);
        if self.controllers.is_empty() {
            self.controllers = file.controllers;
        }
    }
}
