//! Containers for real in a virtual machine: an image of busybox whose layers are erofs, activated in it through the service,
//! with processes in its trees that a debug agent starts.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::foreign::{ForeignMachine, is_in_guest, serve_in_guest};
use common::servers::{self, Client, Server};
use common::{alone, containers, run, temp};
use serde_json::json;

/// What a process says that ends well.
#[track_caller]
fn said(machine: &ForeignMachine, root: &Path, words: &[&str]) -> String {
    let (status, stdout, stderr) = machine.run(root, words);
    assert_eq!((status, &*stderr), (0, ""), "{words:?}: {stdout}");
    stdout
}

#[test]
fn vm_two_containers_run_in_a_machine_over_layers_that_they_share() {
    if is_in_guest() {
        return serve_in_guest();
    }
    let _alone = alone();
    let dir = temp();
    let layers = containers::layers(&dir);
    let this = "vm_two_containers_run_in_a_machine_over_layers_that_they_share";
    let machine = ForeignMachine::start_with_debug_agent(this, |image| image);
    let before = machine.tables();
    let words = machine.words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let server = Server::ready(&dir, &words);
    let mut client = Client::of(&dir);
    let [one, two] =
        ["one", "two"].map(|name| containers::activate(&dir, &mut client, name, &layers));

    // Two layers, which both have, and a scratch for each.
    let status = run(["status", "--json", "--name", &servers::name(&dir)]).json();
    let manager = &status["runs"][0]["manager"];
    let disks = manager["attachments"].as_array().unwrap();
    assert_eq!(disks.len(), 2 + 2, "{manager}");
    let tables = machine.tables();
    let new = tables.difference(&before);
    let new = new.filter(|line| line.starts_with("SCSI device"));
    assert_eq!(new.count(), 2 + 2, "{tables:?}");

    // Each sees the topmost layer, the root of its own tree, and what it has written itself.
    assert_eq!(
        said(&machine, &one, &["/app/hello", "one"]),
        "app\nfrom one\n"
    );
    let absent = machine.run(&two, &["cat", "/app/written"]);
    assert!(
        absent.0 == 1 && absent.2.contains("No such file"),
        "{absent:?}"
    );
    assert_eq!(
        said(&machine, &two, &["/app/hello", "two"]),
        "app\nfrom two\n"
    );
    assert_eq!(said(&machine, &one, &["cat", "/app/written"]), "from one\n");
    let all = "app\nbin\ndev\netc\nproc\nsys\ntmp\n";
    assert_eq!(said(&machine, &two, &["ls", "/"]), all);

    // What somebody has open keeps one tree, and not the other.
    let held = one.join("app/written");
    machine.debug(json!({"hold": {"path": held}}));
    client.deactivate("two");
    let busy = client.ask(&json!({"call": "Deactivate", "request": {"name": "one"}}));
    assert_eq!(busy["code"], "FAILED_PRECONDITION", "{busy}");
    let pending = run(["status", "--name", &servers::name(&dir)]);
    assert!(pending.stdout.contains("pending"), "{pending}");
    machine.debug(json!({"release": {"path": held}}));
    client.deactivate("one");
    machine.assert_guest_as(&before);
    drop(client);
    server.end().says(0, &[]);
    machine.assert_as(&before);
}
