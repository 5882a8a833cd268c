//! The connections of a listener: a bounded number at once, none of which is fatal to another.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::error::one_line;
use crate::service::Service;

/// How many connections a listener serves at once; more wait until one ends. A host has one or two.
const CONNECTIONS: usize = 64;
/// After an accept that failed, as it does where descriptors run out: nothing tells when there are more.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves what `accept` gives, for ever. Cancel safe: dropping it closes the connections.
pub(super) async fn serve_all<S, C, F>(endpoint: impl Display, service: S, accept: impl Fn() -> F)
where
    S: Service,
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = io::Result<C>>,
{
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok(stream) => {
                    debug!(%endpoint, "a connection");
                    let service = service.clone();
                    let endpoint = endpoint.to_string();
                    connections.spawn(async move {
                        if let Err(error) = service.serve(stream).await {
                            warn!(endpoint, error = %one_line(&*error), "a connection was given up");
                        }
                    });
                }
                Err(error) => {
                    warn!(%endpoint, %error, "cannot accept a connection");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}
