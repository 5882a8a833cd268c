//! The monitor of a real QEMU.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::path::Path;
use std::time::Duration;

use crate::common::{LONG, Qemu};
use blockmount::ErrorKind;
use blockmount_qemu::qmp::{Deadlines, NONE, Qmp, QmpError};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_events_and_the_end() {
    let mut qemu = Qemu::start(1);
    let qmp = qemu.qmp(Deadlines::default()).await;
    assert!(qmp.version().major >= 7, "{}", qmp.version());

    let status: Value = qmp.query("query-status", NONE).await.unwrap();
    assert_eq!(status["running"], false);
    // The longest answer that there is.
    let schema: Vec<Value> = qmp.query("query-qmp-schema", NONE).await.unwrap();
    assert!(schema.len() > 500);

    let error = qmp.execute("no-such-command", NONE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
    let error = qmp.execute("device_del", json!({"id": "none"})).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
    let error = qmp.execute("device_del", json!({"what": "none"})).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Other);
    let error = qmp.query::<Vec<String>>("query-status", NONE).await;
    assert!(matches!(error, Err(QmpError::Invalid { .. })), "{error:?}");

    let mut calls = JoinSet::new();
    for n in 0..500 {
        let qmp = qmp.clone();
        calls.spawn(async move {
            let id = format!("none{n}");
            let error = qmp.execute("device_del", json!({"id": id})).await;
            let said = error.unwrap_err().to_string();
            assert!(said.contains(&format!("'{id}'")), "{said}");
        });
    }
    calls.join_all().await;

    let (mut reset, mut shutdown) = (qmp.events("RESET"), qmp.events("SHUTDOWN"));
    qmp.execute("system_reset", NONE).await.unwrap();
    assert_eq!(reset.next(LONG).await.unwrap().data["guest"], false);

    qmp.execute("quit", NONE).await.unwrap();
    assert_eq!(
        shutdown.next(LONG).await.unwrap().data["reason"],
        "host-qmp-quit"
    );
    tokio::time::timeout(LONG, qmp.closed()).await.unwrap();
    let error = qmp.execute("query-status", NONE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitor_that_somebody_else_has_does_not_greet() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shared");
    let server = format!("unix:{},server=on,wait=off", path.display());
    let qemu = Qemu::start_with(0, &["-qmp", &server]);
    let first = Qmp::connect(UnixStream::connect(&path).await.unwrap())
        .await
        .unwrap();
    let deadlines = Deadlines {
        greeting: Duration::from_millis(300),
        ..Deadlines::default()
    };
    let second = UnixStream::connect(&path).await.unwrap();
    let error = Qmp::connect_with(second, deadlines).await.unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
    drop(first);
    let third = UnixStream::connect(&path).await.unwrap();
    Qmp::connect(third).await.unwrap();
    drop(qemu);
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> = entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_of_a_vm_goes_through_a_file() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    // A shell would do all kinds of things with it.
    let file = directory.path().join("a '$(reboot)'\" ,offset=1 \u{e4}");
    let mut one = Qemu::start(2);
    let from = one.qmp(Deadlines::default()).await;
    let bytes = from.migrate_to(&file, LONG).await.unwrap();
    assert_eq!(file.metadata().unwrap().len(), bytes);
    assert_eq!(names(directory.path()).len(), 1);
    let status: Value = from.query("query-status", NONE).await.unwrap();
    assert_eq!(status["status"], "postmigrate");

    // QEMU reads it by a name that a shell leaves alone.
    let other_directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let plain = other_directory.path().join("state");
    std::fs::hard_link(&file, &plain).unwrap();
    let load = json!({"uri": format!("exec:cat {}", plain.display())});
    for _ in 0..2 {
        let mut other = Qemu::start_with(2, &["-incoming", "defer"]);
        let to = other.qmp(Deadlines::default()).await;
        to.execute("migrate-incoming", &load).await.unwrap();
        loop {
            let status: Value = to.query("query-status", NONE).await.unwrap();
            if status["status"] != "inmigrate" {
                assert_eq!(status["status"], "prelaunch");
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    // Of a state that is cut short QEMU makes nothing.
    let mut other = Qemu::start_with(2, &["-incoming", "defer"]);
    let to = other.qmp(Deadlines::default()).await;
    std::fs::OpenOptions::new()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(bytes / 2)
        .unwrap();
    to.execute("migrate-incoming", &load).await.unwrap();
    tokio::time::timeout(LONG, to.closed()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_cannot_be_saved_leaves_no_file_and_the_vm_as_it_was() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = directory.path().join("state");
    let mut qemu = Qemu::start(1);
    let qmp = qemu.qmp(Deadlines::default()).await;

    let error = qmp
        .migrate_to(&directory.path().join("none/state"), LONG)
        .await;
    assert!(matches!(error, Err(QmpError::Failed { .. })), "{error:?}");
    let error = qmp.migrate_to(&file, Duration::ZERO).await;
    assert!(matches!(error, Err(QmpError::TimedOut { .. })), "{error:?}");
    // Slower than the deadline.
    let slow = json!({"max-bandwidth": 1_000, "downtime-limit": 0});
    qmp.execute("migrate-set-parameters", &slow).await.unwrap();
    let error = qmp.migrate_to(&file, Duration::from_millis(500)).await;
    assert!(matches!(error, Err(QmpError::TimedOut { .. })), "{error:?}");
    assert_eq!(names(directory.path()), Vec::<String>::new());
    // Somebody calls it off.
    let (error, ()) = tokio::join!(qmp.migrate_to(&file, LONG), async {
        let mut changes = qmp.events("MIGRATION");
        changes
            .find(LONG, |event| event.data["status"] == "active")
            .await
            .unwrap();
        qmp.execute("migrate_cancel", NONE).await.unwrap();
    });
    assert!(matches!(error, Err(QmpError::Failed { .. })), "{error:?}");
    let fast = json!({"max-bandwidth": 1_u64 << 40, "downtime-limit": 300});
    qmp.execute("migrate-set-parameters", &fast).await.unwrap();
    let status: Value = qmp.query("query-status", NONE).await.unwrap();
    assert_eq!(status["status"], "prelaunch");
    assert_eq!(names(directory.path()), Vec::<String>::new());
    qmp.migrate_to(&file, LONG).await.unwrap();
    qemu.kill();
    let error = qmp.migrate_to(&file, LONG).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
}
