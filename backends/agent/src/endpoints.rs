//! Where a service is offered: virtio ports, vsock, Unix sockets, serial lines.

use std::future::Future;
use std::path::{Path, PathBuf};

use lexopt::ValueExt;
use tokio::task::JoinSet;

use crate::error::Context;
use crate::service::Service;
use crate::token::Token;
use crate::{AgentError, Argument, ports, serial, unix, vsock};

/// The arguments that say where to serve.
pub(crate) const ARGUMENTS: [Argument; 6] = [
    Argument::new(
        "virtio-port",
        "NAME",
        "Serve on every virtio port named NAME or NAME.anything, as it is plugged in; repeatable",
    ),
    Argument::new(
        "vsock",
        "[PORT]",
        "Connect to this vsock port of the host, again and again (0x40000000 if no number is given)",
    ),
    Argument::new(
        "vsock-listen",
        "PORT",
        "Wait for the host on this vsock port; needs --vsock-token, since any process of the host can connect",
    ),
    Argument::new(
        "vsock-token",
        "FILE",
        "What the host writes first on each connection to --vsock-listen: the bytes of this file, from 16 to 4096, which \
         only its owner may read",
    ),
    Argument::new(
        "unix",
        "PATH",
        "Wait for connections on a Unix socket, which only this user may open; repeatable",
    ),
    Argument::new(
        "serial",
        "PATH",
        "Serve on a serial line; 16 zero bytes from the host end a connection; repeatable",
    ),
];

/// Where to serve.
#[derive(Debug, Clone, Default)]
pub struct Endpoints {
    virtio_ports: Vec<String>,
    vsock: Option<u32>,
    vsock_listen: Option<u32>,
    vsock_token: Option<PathBuf>,
    unix: Vec<PathBuf>,
    serial: Vec<PathBuf>,
}

impl Endpoints {
    /// Takes an argument of a command line, and its value from the parser. `false` if it is none of these.
    ///
    /// # Errors
    ///
    /// If the value is missing, or makes no sense.
    pub fn argument(
        &mut self,
        name: &str,
        parser: &mut lexopt::Parser,
    ) -> Result<bool, lexopt::Error> {
        match name {
            "virtio-port" => self.virtio_ports.push(parser.value()?.string()?),
            "vsock" => self.vsock = Some(optional_port(parser)?),
            "vsock-listen" => self.vsock_listen = Some(parser.value()?.parse_with(parse_port)?),
            "vsock-token" => self.vsock_token = Some(parser.value()?.into()),
            "unix" => self.unix.push(parser.value()?.into()),
            "serial" => self.serial.push(parser.value()?.into()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Refuses a port that would let in whoever connects.
    ///
    /// # Errors
    ///
    /// If one of `--vsock-listen` and `--vsock-token` is there without the other.
    pub fn validate(&self) -> Result<(), lexopt::Error> {
        match (self.vsock_listen, &self.vsock_token) {
            (Some(_), None) => Err("--vsock-listen needs --vsock-token FILE".into()),
            (None, Some(_)) => {
                Err("--vsock-token is for --vsock-listen, which is not given".into())
            }
            _ => Ok(()),
        }
    }

    /// These, or ports of this name if there are none.
    #[must_use]
    pub fn or_port(mut self, name: &str) -> Self {
        let none = self.virtio_ports.is_empty()
            && self.vsock.is_none()
            && self.vsock_listen.is_none()
            && self.unix.is_empty()
            && self.serial.is_empty();
        if none {
            self.virtio_ports.push(name.to_owned());
        }
        self
    }

    /// Serves on all of them until `ended` is ready.
    ///
    /// # Errors
    ///
    /// If one of them cannot be opened at all, or is lost for good; the others end too.
    pub async fn serve<S: Service>(
        self,
        service: S,
        ended: impl Future<Output = ()>,
    ) -> Result<(), AgentError> {
        self.validate().context(|| "cannot serve so".to_owned())?;
        let mut tasks = JoinSet::new();
        // What can fail at once comes first: no connection is served yet that a failure would interrupt.
        for path in self.unix {
            let socket = unix::Socket::bind(&path)?;
            tasks.spawn(unix::serve(socket, service.clone()));
        }
        if let Some(port) = self.vsock_listen {
            let token = Token::read(self.vsock_token.as_deref().unwrap_or(Path::new("")))?;
            let listener = vsock::bind(port)?;
            tasks.spawn(vsock::listen(listener, token, service.clone()));
        }
        if let Some(port) = self.vsock {
            tasks.spawn(vsock::dial(port, service.clone()));
        }
        for path in self.serial {
            tasks.spawn(serial::serve(path, service.clone()));
        }
        for name in self.virtio_ports {
            let service = service.clone();
            tasks.spawn(async move { ports::serve(&name, service).await });
        }
        let outcome = tokio::select! {
            () = ended => Ok(()),
            Some(ended) = tasks.join_next() => {
                ended.context(|| "an endpoint was lost".to_owned()).and_then(|ended| ended)
            }
        };
        // Listening ends, sockets are removed, connections are closed.
        tasks.shutdown().await;
        outcome
    }
}

/// The port that follows, if the next word is one and no argument.
fn optional_port(parser: &mut lexopt::Parser) -> Result<u32, lexopt::Error> {
    match parser.optional_value() {
        Some(value) => value.parse_with(parse_port),
        None => {
            let mut rest = parser.raw_args()?;
            let next = rest.peek().and_then(|word| word.to_str());
            match next.is_some_and(|word| !word.starts_with('-')) {
                true => rest.next().unwrap_or_default().parse_with(parse_port),
                false => parse_port(vsock::GCS_PORT).map_err(Into::into),
            }
        }
    }
}

/// A port number of vsock: decimal, or hexadecimal with `0x`.
fn parse_port(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    match number {
        // The highest means any port.
        Ok(port) if port != u32::MAX => Ok(port),
        _ => Err("a vsock port is a number below 4294967295, such as 0x40000000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_ports_are_decimal_or_hexadecimal() {
        assert_eq!(parse_port(vsock::GCS_PORT), Ok(1 << 30));
        assert_eq!(parse_port("1024"), Ok(1024));
        for text in ["", "x", "-1", "0x", "0xffffffff", "4294967296"] {
            assert!(parse_port(text).is_err(), "{text:?}");
        }
    }
}
