//! What is done for whoever connects, over any stream.

use std::error::Error as StdError;
use std::future::Future;

use tokio::io::{AsyncRead, AsyncWrite};

/// What is done for a peer at the other end of a stream.
pub trait Service: Clone + Send + Sync + 'static {
    /// Serves one connection to its end. Nothing that comes over it is fatal to another.
    ///
    /// Cancel safe: dropping it ends the connection.
    fn serve<S>(&self, stream: S) -> impl Future<Output = Result<(), ServiceError>> + Send
    where
        S: AsyncRead + AsyncWrite + Unpin + Send;
}

/// Why a connection could not go on.
pub type ServiceError = Box<dyn StdError + Send + Sync>;
