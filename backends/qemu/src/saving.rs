//! Writing the state of a VM to a file.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::net::UnixListener;
use tokio::time::timeout;

use crate::qmp::Event;
use crate::{Qmp, Vm, VmError};

/// How long saving may take. It is a copy of the guest's memory, without the pages that are empty.
const PATIENCE: Duration = Duration::from_secs(60);

/// Migrates a VM into a file, which has to be there. The VM runs no more after that.
///
/// QEMU sends the state over a socket, and it is written here: so the file is whole when the stream has ended, which
/// of a program that QEMU starts to write it could not be said.
pub(crate) async fn save(vm: &Vm, file: &Path) -> Result<(), VmError> {
    // A port is no part of what the next VM starts with.
    vm.ports().settled().await?;
    let what = || VmError::new("cannot save the state of a VM");
    match timeout(PATIENCE, send(vm, file)).await {
        Ok(saved) => saved.map_err(|error| what().because(error)),
        Err(elapsed) => Err(what().because(elapsed)),
    }
}

async fn send(vm: &Vm, file: &Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let socket = vm.directory().join("state");
    let listener = UnixListener::bind(&socket)?;
    let mut file = tokio::fs::OpenOptions::new().write(true).open(file).await?;
    let write = async {
        let (mut stream, _) = listener.accept().await?;
        tokio::io::copy(&mut stream, &mut file).await?;
        file.sync_all().await
    };
    let uri = format!("unix:{}", socket.to_string_lossy());
    let migrate = migrate(vm.qmp(), &uri);
    // A migration that fails closes its stream, or never opens it.
    let (written, migrated) = tokio::join!(timeout(PATIENCE, write), migrate);
    migrated?;
    Ok(written??)
}

async fn migrate(qmp: &Qmp, uri: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let events = json!([{ "capability": "events", "state": true }]);
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": events }),
    )
    .await?;
    // It goes to a file, and need not spare a network.
    qmp.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1_u64 << 40 }),
    )
    .await?;
    let mut changes = qmp.events("MIGRATION");
    qmp.execute("migrate", json!({ "uri": uri })).await?;
    let is_over = |event: &Event| {
        let status = event.data["status"].as_str().unwrap_or_default();
        matches!(status, "completed" | "failed" | "cancelled")
    };
    let last = changes.find(PATIENCE, is_over).await?;
    match last.data["status"] == "completed" {
        true => Ok(()),
        false => Err(format!("QEMU says that it has {}", last.data["status"]).into()),
    }
}
