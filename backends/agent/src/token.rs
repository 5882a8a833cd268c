//! A secret that the host shows first: on vsock, any process of the host may connect.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::time::timeout;

use crate::AgentError;
use crate::error::Context;
use crate::service::{Service, ServiceError};

/// A shorter one could be guessed, in bytes.
const SHORTEST: usize = 16;
/// A longer one is no token but some other file, in bytes.
const LONGEST: usize = 4_096;
/// How long a host may take to show it.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The bytes that a host writes first on each connection.
#[derive(Clone)]
pub(super) struct Token(Arc<[u8]>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// Reads it from a file that nobody else can read or write. Blocks.
    pub(super) fn read(path: &Path) -> Result<Self, AgentError> {
        let what = || format!("cannot use the token in {}", path.display());
        // A pipe without a writer would keep us waiting; the kernel ignores the flag for files.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(path);
        let file = file.context(what)?;
        let found = file.metadata().context(what)?;
        let refuse = |why: &str| Err(io::Error::other(why)).context(what);
        if !found.is_file() || found.mode() & 0o077 != 0 {
            return refuse("it has to be a file that only its owner can read: chmod 600 FILE");
        }
        let mut bytes = Vec::new();
        let mut start = file.take(LONGEST as u64 + 1);
        start.read_to_end(&mut bytes).context(what)?;
        match bytes.len() {
            SHORTEST..=LONGEST => Ok(Token(bytes.into())),
            _ => refuse("it has to have from 16 to 4096 bytes"),
        }
    }

    /// Whether the other end shows it. A connection for which this was dropped is of no more use.
    async fn is_shown_by(&self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
        let mut shown = vec![0; self.0.len()];
        timeout(TIMEOUT, stream.read_exact(&mut shown)).await??;
        // Each byte is looked at, so that the time tells nothing.
        let differences = self
            .0
            .iter()
            .zip(&shown)
            .map(|(ours, theirs)| ours ^ theirs);
        Ok(differences.fold(0, |all, one| all | one) == 0)
    }
}

/// A service for those who show the token first.
#[derive(Debug, Clone)]
pub(super) struct Guarded<S> {
    pub(super) service: S,
    pub(super) token: Token,
}

impl<S: Service> Service for Guarded<S> {
    async fn serve<T>(&self, mut stream: T) -> Result<(), ServiceError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send,
    {
        match self.token.is_shown_by(&mut stream).await {
            Ok(true) => self.service.serve(stream).await,
            Ok(false) => Err("it has shown another token".into()),
            Err(error) => Err(format!("it has not shown the token: {error}").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// Answers that it was reached.
    #[derive(Debug, Clone)]
    struct Reached;

    impl Service for Reached {
        async fn serve<T>(&self, mut stream: T) -> Result<(), ServiceError>
        where
            T: AsyncRead + AsyncWrite + Unpin + Send,
        {
            Ok(stream.write_all(b"reached").await?)
        }
    }

    fn token(bytes: &[u8], mode: u32) -> Result<Token, AgentError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        Token::read(&path)
    }

    #[test]
    fn x14_a_token_is_private_and_long_enough() {
        token(&[7; 16], 0o600).unwrap();
        for (length, mode) in [(15, 0o600), (LONGEST + 1, 0o600), (32, 0o640), (32, 0o604)] {
            assert!(token(&vec![7; length], mode).is_err(), "{length} {mode:o}");
        }
        assert!(Token::read(Path::new("/dev/null")).is_err());
        assert!(!format!("{:?}", token(&[7; 16], 0o600).unwrap()).contains('7'));
    }

    #[tokio::test]
    async fn x14_only_who_shows_the_token_reaches_the_agent() {
        let guarded = Guarded {
            service: Reached,
            token: token(b"0123456789abcdef", 0o600).unwrap(),
        };
        for (shown, is_served) in [
            (&b"0123456789abcdef"[..], true),
            (b"0123456789abcdeF", false),
            (b"0123456789abcde", false),
            (b"", false),
        ] {
            let (ours, mut theirs) = tokio::io::duplex(64);
            theirs.write_all(shown).await.unwrap();
            theirs.shutdown().await.unwrap();
            let served = guarded.serve(ours).await;
            assert_eq!(served.is_ok(), is_served, "{shown:?}: {served:?}");
            let mut answer = String::new();
            theirs.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer == "reached", is_served, "{shown:?}");
        }
    }
}
