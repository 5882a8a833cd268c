//! Sockets between a virtual machine and its host.

use std::io;
use std::time::Duration;

use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tracing::{debug, info, warn};

use crate::AgentError;
use crate::connections::serve_all;
use crate::error::{Context, one_line};
use crate::service::Service;
use crate::token::{Guarded, Token};

/// Where a host of Hyper-V waits for the agent of its guest (`LinuxGcsVsockPort`).
pub(super) const GCS_PORT: &str = "0x40000000";
/// Between two attempts to reach the host, as agents of Hyper-V do: nothing tells when it listens.
const AGAIN: Duration = Duration::from_millis(100);

/// Serves the host at its port, again after each connection, for ever.
pub(super) async fn dial<S: Service>(port: u32, service: S) -> Result<(), AgentError> {
    let host = VsockAddr::new(VMADDR_CID_HOST, port);
    let mut last = None;
    loop {
        match VsockStream::connect(host).await {
            Ok(stream) => {
                last = None;
                debug!(port, "connected to the host");
                if let Err(error) = service.serve(stream).await {
                    warn!(port, error = %one_line(&*error), "a connection was given up");
                }
            }
            // Said once, not ten times a second.
            Err(error) if last.replace(error.kind()) != Some(error.kind()) => {
                info!(port, %error, "cannot reach the host yet");
            }
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Listens on a port of this machine.
pub(super) fn bind(port: u32) -> Result<VsockListener, AgentError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .context(|| format!("cannot listen on vsock port {port}"))
}

/// Serves the host when it connects and has shown the token, for ever. Only the host is served.
pub(super) async fn listen<S: Service>(
    listener: VsockListener,
    token: Token,
    service: S,
) -> Result<(), AgentError> {
    let service = Guarded { service, token };
    let accept = async || -> io::Result<VsockStream> {
        loop {
            let (stream, peer) = listener.accept().await?;
            if peer.cid() == VMADDR_CID_HOST {
                return Ok(stream);
            }
            // Any process of this machine can reach the port over the loopback.
            warn!(%peer, "refused a connection that is not the host's");
        }
    };
    serve_all("vsock", service, accept).await;
    Ok(())
}
