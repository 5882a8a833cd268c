//! The state of a whole VM, into a file or to another QEMU.
//!
//! For a file: QEMU 7.2 can only migrate to a socket or a shell, and says that it has completed before the shell has. So it
//! gets a socket, and the file is written here: its last byte is known.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::fs::File;
use tokio::net::UnixListener;
use tokio::time::timeout;

use super::error::one_line;
use super::{Events, NONE, Qmp, QmpError};

const EVENT: &str = "MIGRATION";

/// How long a migration that has failed here is waited for to be called off there.
const CALL_OFF: Duration = Duration::from_secs(5);

impl Qmp {
    /// Saves the state of the VM to a file, which appears when it is complete, and returns its size in bytes. The
    /// VM is stopped afterwards. Beside the file there are a socket and what is written so far, for the time.
    ///
    /// # Errors
    ///
    /// [`QmpError::Failed`] if the state cannot be saved or written, with the reason; [`QmpError::TimedOut`] if that
    /// takes longer than `deadline`. There is no file then, the migration is called off, and the VM is as before.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves no file; QEMU's migration then fails.
    pub async fn migrate_to(&self, file: &Path, deadline: Duration) -> Result<u64, QmpError> {
        const COMMAND: &str = "migrate";
        self.or_call_off(within(COMMAND, deadline, self.save(COMMAND, file)))
            .await
    }

    /// Sends the state of the VM to a QEMU that listens at a Unix socket, and returns when that has it. The VM is stopped
    /// afterwards, and its disks are the other one's.
    ///
    /// # Errors
    ///
    /// [`QmpError::Failed`] if the other one does not take it, with the reason; [`QmpError::TimedOut`] if that takes longer than
    /// `deadline`. The migration is then called off, and the VM goes on.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves it open whether the VM has migrated: QEMU goes on migrating.
    pub async fn migrate_over(&self, socket: &Path, deadline: Duration) -> Result<(), QmpError> {
        const COMMAND: &str = "migrate";
        let migrating = async {
            let mut changes = self.migration_events().await?;
            let uri = json!({"uri": uri(socket, COMMAND)?});
            self.execute(COMMAND, uri).await?;
            self.completion(COMMAND, &mut changes).await
        };
        self.or_call_off(within(COMMAND, deadline, migrating)).await
    }

    /// Listens at a Unix socket for the state of another VM. QEMU was started with `-incoming defer`.
    ///
    /// # Errors
    ///
    /// [`QmpError::Refused`] if QEMU cannot listen there, or does not wait for a state.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves it open whether QEMU listens.
    pub async fn listen_for_state(&self, socket: &Path) -> Result<(), QmpError> {
        const COMMAND: &str = "migrate-incoming";
        let uri = json!({"uri": uri(socket, COMMAND)?});
        self.execute(COMMAND, uri).await.map(drop)
    }

    async fn or_call_off<T>(
        &self,
        migrating: impl Future<Output = Result<T, QmpError>>,
    ) -> Result<T, QmpError> {
        let outcome = migrating.await;
        if outcome.is_err() {
            // If it cannot even be called off, the first reason is still the one to tell.
            let _ = timeout(CALL_OFF, self.call_off()).await;
        }
        outcome
    }

    async fn save(&self, command: &'static str, file: &Path) -> Result<u64, QmpError> {
        let failed = |error: io::Error| {
            failed(
                command,
                format!("cannot write to {}: {error}", file.display()),
            )
        };
        let (partial, socket) = (
            Temporary::beside(file, "partial"),
            Temporary::beside(file, "socket"),
        );
        let listener = UnixListener::bind(&socket.0).map_err(failed)?;
        // Not in the background, where it could come after the end of this.
        let written = std::fs::File::create(&partial.0).map_err(failed)?;
        let mut written = File::from_std(written);
        let mut changes = self.migration_events().await?;
        self.execute(command, json!({"uri": uri(&socket.0, command)?}))
            .await?;
        let receive = async {
            let (mut stream, _) = listener.accept().await.map_err(failed)?;
            let bytes = tokio::io::copy(&mut stream, &mut written).await;
            written.sync_data().await.map_err(failed)?;
            bytes.map_err(failed)
        };
        let ((), bytes) = tokio::try_join!(self.completion(command, &mut changes), receive)?;
        std::fs::rename(&partial.0, file).map_err(failed)?;
        Ok(bytes)
    }

    /// Has QEMU stop migrating, and waits until it has.
    async fn call_off(&self) -> Result<(), QmpError> {
        let mut changes = self.events(EVENT);
        self.execute("migrate_cancel", NONE).await?;
        while !self.migration().await?.is_over() {
            changes.next(CALL_OFF).await?;
        }
        Ok(())
    }

    async fn migration_events(&self) -> Result<Events, QmpError> {
        let changes = self.events(EVENT);
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        self.execute("migrate-set-capabilities", events).await?;
        Ok(changes)
    }

    /// Waits until QEMU says how it ended; whoever calls bounds the wait.
    async fn completion(&self, command: &str, changes: &mut Events) -> Result<(), QmpError> {
        loop {
            let status = match changes.next(Duration::MAX).await {
                Ok(event) => event.data["status"].as_str().unwrap_or_default().to_owned(),
                // Few are missed by who waits for nothing else, but they might.
                Err(QmpError::Lagged { .. }) => self.migration().await?.status,
                Err(error) => return Err(error),
            };
            match status.as_str() {
                "completed" => return Ok(()),
                "failed" | "cancelled" => {
                    let reason =
                        self.migration().await?.error.unwrap_or_else(|| {
                            format!("it was {status}, and QEMU does not say why")
                        });
                    return Err(failed(command, one_line(&reason)));
                }
                _ => {}
            }
        }
    }

    async fn migration(&self) -> Result<Migration, QmpError> {
        self.query("query-migrate", NONE).await
    }
}

#[derive(Deserialize)]
struct Migration {
    #[serde(default)]
    status: String,
    #[serde(rename = "error-desc")]
    error: Option<String>,
}

impl Migration {
    fn is_over(&self) -> bool {
        // Without a status there never was one.
        matches!(
            self.status.as_str(),
            "" | "none" | "completed" | "failed" | "cancelled"
        )
    }
}

fn failed(command: &str, reason: String) -> QmpError {
    let command = command.to_owned();
    QmpError::Failed { command, reason }
}

async fn within<T>(
    command: &str,
    deadline: Duration,
    work: impl Future<Output = Result<T, QmpError>>,
) -> Result<T, QmpError> {
    let late = |_| {
        Err(QmpError::TimedOut {
            command: command.to_owned(),
            deadline,
            sent: true,
        })
    };
    timeout(deadline, work).await.unwrap_or_else(late)
}

fn uri(socket: &Path, command: &str) -> Result<String, QmpError> {
    let path = std::path::absolute(socket).ok();
    let path = path.as_deref().and_then(Path::to_str);
    let path = path.ok_or_else(|| QmpError::Unfit {
        command: command.to_owned(),
        reason: format!("{} is no path in UTF-8", socket.display()),
    })?;
    Ok(format!("unix:{path}"))
}

/// A path that is removed when it is no longer needed.
struct Temporary(PathBuf);

impl Temporary {
    /// Beside another, with a name that nobody else has.
    fn beside(file: &Path, what: &str) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut name = file.as_os_str().to_owned();
        name.push(format!(".{}-{number}.{what}", std::process::id()));
        Temporary(name.into())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may never have been made, or have another name by now.
        let _ = std::fs::remove_file(&self.0);
    }
}
