//! Where a service is offered: virtio ports, vsock, Unix sockets, serial lines.

use std::error::Error as StdError;
use std::future::Future;
use std::path::PathBuf;

use clap::Args;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;

use super::{ports, serial, unix, vsock};
use crate::failure::{Context, Failure};
use crate::interrupt::Interrupt;

/// What is done for whoever is at the other end of a stream.
pub(crate) trait Service: Clone + Send + Sync + 'static {
    /// Serves one connection to its end. Nothing that comes over it is fatal to another.
    ///
    /// Cancel safe: dropping it ends the connection.
    fn serve<S>(&self, stream: S) -> impl Future<Output = Result<(), Broken>> + Send
    where
        S: AsyncRead + AsyncWrite + Unpin + Send;
}

/// Why a connection could not go on.
pub(crate) type Broken = Box<dyn StdError + Send + Sync>;

/// An error as the log takes it: with all that caused it.
pub(super) fn as_error(broken: &Broken) -> &(dyn StdError + 'static) {
    &**broken
}

/// Where to serve.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Endpoints {
    /// Serve on every virtio port named NAME or NAME.anything, as it is plugged in; repeatable
    #[arg(long = "virtio-port", value_name = "NAME")]
    pub(crate) virtio_ports: Vec<String>,

    /// Connect to this vsock port of the host, again and again (1073741824 if no number is given)
    #[arg(long, value_name = "PORT", value_parser = parse_port, num_args = 0..=1, default_missing_value = vsock::GCS_PORT)]
    pub(crate) vsock: Option<u32>,

    /// Wait for the host on this vsock port
    #[arg(long, value_name = "PORT", value_parser = parse_port)]
    pub(crate) vsock_listen: Option<u32>,

    /// Wait for connections on a Unix socket, which only this user may open; repeatable
    #[arg(long = "unix", value_name = "PATH")]
    pub(crate) unix: Vec<PathBuf>,

    /// Serve on a serial line; 16 zero bytes from the host end a connection; repeatable
    #[arg(long = "serial", value_name = "PATH")]
    pub(crate) serial: Vec<PathBuf>,
}

impl Endpoints {
    /// These, or ports of this name if there are none.
    #[must_use]
    pub(crate) fn or_port(mut self, name: &str) -> Self {
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

    /// Serves on all of them until a signal comes.
    ///
    /// # Errors
    ///
    /// If one of them cannot be opened at all, or is lost for good; the others end too.
    pub(crate) async fn serve<S: Service>(
        self,
        service: S,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let mut tasks = JoinSet::new();
        // What can fail at once comes first: nobody is served yet whom that would interrupt.
        for path in self.unix {
            let socket = unix::Socket::bind(&path)?;
            tasks.spawn(unix::serve(socket, service.clone()));
        }
        if let Some(port) = self.vsock_listen {
            let listener = vsock::bind(port)?;
            tasks.spawn(vsock::listen(listener, service.clone()));
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
            signal = interrupt.requested() => {
                tracing::info!(signal, "ending");
                Ok(())
            }
            Some(ended) = tasks.join_next() => {
                ended.context(|| "an endpoint was lost".to_owned()).and_then(|ended| ended)
            }
        };
        // Listening ends, sockets are removed, connections are closed.
        tasks.shutdown().await;
        outcome
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
