//! The program in a virtual machine that somebody else has started, with disks of its own that nobody may touch.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::foreign::{ForeignMachine, layer};
use common::servers::{Client, Server, layer as mount_of, overlay, writable};
use common::{alone, assert_nothing_left, clean_up, hold, run, run_id, signal, temp};
use rustix::process::Signal;
use serde_json::json;

/// One boot for all of it: under emulation that is most of the time.
#[test]
fn vm_a_machine_of_somebody_else_is_used_and_left_as_it_was() {
    let _alone = alone();
    let mut machine = ForeignMachine::start();
    let before = machine.tables();
    let disks = BTreeSet::from([
        "SCSI device 0:0:0:0".to_owned(),
        "SCSI device 0:0:0:2".to_owned(),
    ]);
    assert!(before.is_superset(&disks), "{before:?}");
    a_mount_is_held_and_released(&machine);
    machine.assert_as(&before);
    what_a_killed_mount_leaves_is_cleaned_up(&machine);
    machine.assert_as(&before);
    a_mount_with_a_name_is_resumed(&machine);
    machine.assert_as(&before);
    a_server_comes_back(&machine);
    machine.assert_as(&before);
    a_further_signal_leaves_it_while_it_hangs(&mut machine);
    machine.assert_as(&before);
    the_demo_compares_what_is_in_it(&machine);
    machine.assert_as(&before);
    nonsense_is_refused(&machine);
    machine.assert_as(&before);
    assert!(machine.is_alive());
    it_ends_under_a_mount(&machine);
}

impl ForeignMachine {
    /// A mount of layers in it.
    fn mount<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let words = words.into_iter().map(str::to_owned);
        self.words().into_iter().chain(words).collect()
    }
}

fn a_mount_is_held_and_released(machine: &ForeignMachine) {
    let dir = temp();
    let [app, base] = ["app", "base"].map(|name| layer(dir.path(), name));
    let words = [
        "--at",
        "/mnt/tree",
        "--scratch",
        "8M",
        "--layer",
        &app,
        "--layer",
        &base,
    ];
    let held = hold(machine.mount(words)).unwrap_or_else(|answer| panic!("{answer}"));
    // Nobody in its guest says what a mount is of. LUNs 0 and 2 are others'.
    let disks = held.json["layers"]
        .as_array()
        .unwrap()
        .iter()
        .chain([&held.json["scratch"]]);
    let disks: Vec<_> = disks.collect();
    assert!(
        disks
            .iter()
            .all(|disk| disk["filesystem"].is_null() && disk["device"].is_null())
    );
    let locators = disks
        .iter()
        .map(|disk| disk["locator"].as_str().unwrap().to_owned());
    let locators: BTreeSet<String> = locators.collect();
    assert_eq!(
        locators,
        BTreeSet::from(["scsi:0/1", "scsi:0/3", "scsi:0/4"].map(str::to_owned))
    );
    machine.ask(async |checker| {
        let (mut names, _) = checker.names("/mnt/tree", 9).await.unwrap();
        names.retain(|name| name != "lost+found");
        assert_eq!(names, ["file"]);
    });
    let status = run(["status", "--json"]).json();
    let runs = status["runs"].as_array().unwrap();
    let ours = runs
        .iter()
        .find(|run| run["process"] == held.pid())
        .unwrap();
    assert_eq!(
        (&ours["guest"], &ours["at"]),
        (&json!("foreign"), &json!("/mnt/tree"))
    );
    assert_eq!(ours["manager"]["attachments"].as_array().unwrap().len(), 3);
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
}

fn what_a_killed_mount_leaves_is_cleaned_up(machine: &ForeignMachine) {
    let dir = temp();
    let image = layer(dir.path(), "killed");
    let words = ["--at", "/mnt/tree", "--layer", &image];
    let held = hold(machine.mount(words)).unwrap_or_else(|answer| panic!("{answer}"));
    let said = held.kill();
    assert!(
        machine
            .tables()
            .iter()
            .any(|line| line.ends_with(" at /mnt/tree"))
    );
    let shown = run(["cleanup", "--dry-run"]);
    shown.says(0, &[]);
    assert!(shown.stdout.contains("in a machine"), "{shown}");
    let cleaned = clean_up(&[]);
    cleaned.says(0, &[]);
    let items = &cleaned.json()["items"];
    let in_machine = items
        .as_array()
        .unwrap()
        .iter()
        .find(|item| item["what"] == "in_machine");
    assert_eq!(in_machine.unwrap()["outcome"], "removed", "{cleaned}");
    let id = run_id(&said).unwrap();
    assert!(!Path::new(&format!("/run/blockmount/{id}")).exists());
}

fn a_mount_with_a_name_is_resumed(machine: &ForeignMachine) {
    let dir = temp();
    let image = layer(dir.path(), "named");
    let name = dir
        .path()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .replace('.', "");
    let words = [
        "--at",
        "/mnt/tree",
        "--scratch",
        "8M",
        "--layer",
        &image,
        "--name",
        &name,
    ];
    let held = hold(machine.mount(words)).unwrap_or_else(|answer| panic!("{answer}"));
    let places = common::machines::places(&held);
    held.kill();
    machine.ask(async |checker| checker.write("/mnt/tree/written", "x").await.unwrap());
    let status = run(["status", "--json", "--name", &name]).json();
    let resume = status["ended"][0]["resume"].as_str().unwrap().to_owned();
    assert!(
        resume.ends_with(&format!("mount --resume {name}")),
        "{resume}"
    );
    // Kept, in the machine too.
    clean_up(&[]).says(0, &[]);
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    assert_eq!(common::machines::places(&held), places);
    machine.ask(async |checker| {
        let (names, _) = checker.names("/mnt/tree", 9).await.unwrap();
        assert!(names.contains(&"written".to_owned()), "{names:?}");
    });
    let answer = held.end(Signal::INT);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
}

fn a_server_comes_back(machine: &ForeignMachine) {
    let dir = temp();
    let image = layer(dir.path(), "served");
    let words = machine.words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let server = Server::ready(&dir, &words);
    let list = [
        writable(dir.path().join("rw.img")),
        mount_of(&image),
        overlay(1),
    ];
    let points = Client::of(&dir).activate("web", &list);
    server.kill();
    let tree = points.last().unwrap();
    machine.ask(async |checker| {
        let (names, _) = checker.names(tree, 9).await.unwrap();
        assert_eq!(names, ["file"]);
    });
    // Elsewhere is not where it was activated.
    let other = Server::start(&dir, &[], &["--guest", "local"]).wait();
    other.says(1, &["is elsewhere", "--vm"]);
    let server = Server::ready(&dir, &words);
    let mut client = Client::of(&dir);
    assert_eq!(client.call("List", json!({})).as_array().unwrap().len(), 1);
    client.deactivate("web");
    drop(client);
    server.end().says(0, &[]);
}

fn the_demo_compares_what_is_in_it(machine: &ForeignMachine) {
    let dir = temp();
    let [app, base] = ["app", "base"].map(|name| layer(dir.path(), name));
    let checker = format!("unix:{}", machine.at("checker").display());
    let words = [
        "demo",
        "--json",
        "--checker",
        &checker,
        "--layer",
        &app,
        "--layer",
        &base,
    ];
    let answer = run(words.into_iter().map(str::to_owned).chain(machine.words()));
    answer.says(0, &[]);
    let json = answer.json();
    assert_eq!(
        (&json["guest"], &json["digest_mismatches"]),
        (&json!("foreign"), &json!(0)),
        "{answer}"
    );
    assert!(
        json["files_checked"].as_u64().unwrap() > 0 && json["speed"].is_null(),
        "{answer}"
    );
    assert_eq!(json["left_over"], json!([]), "{answer}");
    assert_nothing_left(&answer, &dir);
}

fn nonsense_is_refused(machine: &ForeignMachine) {
    let dir = temp();
    let image = layer(dir.path(), "refused");
    let at = ["--at", "/mnt/tree", "--layer", &*image];
    let answer = |words: &[&str]| {
        let all = machine.mount(at.into_iter().chain(words.iter().copied()));
        run(["mount".to_owned()].into_iter().chain(all))
    };
    let other = answer(&["--controller", "scsi9"]);
    other.says(1, &["no SCSI controller with the id scsi9", "scsi0, scsi1"]);
    answer(&["--transport", "vpmem"]).says(2, &["on SCSI alone"]);
    answer(&["--guest", "local"]).says(2, &["--vm names a virtual machine"]);
    answer(&["--keep-vm", "--name", "x"]).says(2, &["of this program's own"]);
    let alone = ["mount", "--agent", "unix:/x"].into_iter().chain(at);
    run(alone).says(2, &["add --vm"]);
    let demo = run(["demo".to_owned()].into_iter().chain(machine.words()));
    demo.says(2, &["add --checker"]);
    // Where the agent does not mount, it says so, and nothing stays.
    let outside = machine.mount(["--at", "/etc/tree", "--layer", &*image]);
    let outside = run(["mount".to_owned()].into_iter().chain(outside));
    outside.says(1, &["/etc/tree"]);
    let absent = format!("qemu:{}", machine.at("absent").display());
    let words = ["mount", "--vm", &absent, "--agent", "unix:/x"]
        .into_iter()
        .chain(at);
    run(words).says(1, &["cannot reach the virtual machine", "-qmp"]);
    assert_nothing_left(&outside, &dir);
}

fn it_ends_under_a_mount(machine: &ForeignMachine) {
    let dir = temp();
    let image = layer(dir.path(), "last");
    let words = machine.mount(["--at", "/mnt/tree", "--layer", &*image]);
    let held = hold(words).unwrap_or_else(|answer| panic!("{answer}"));
    signal(machine.pid(), Signal::KILL);
    let answer = held.wait();
    answer.says(1, &["the VM is gone", "did not live"]);
    assert_nothing_left(&answer, &dir);
}

/// A user who has given up on a guest that hangs leaves it, and a clean-up takes out what is there once it goes on.
fn a_further_signal_leaves_it_while_it_hangs(machine: &mut ForeignMachine) {
    let dir = temp();
    let image = layer(dir.path(), "hanging");
    let words = machine.mount(["--at", "/mnt/tree", "--layer", &*image]);
    let held = hold(words).unwrap_or_else(|answer| panic!("{answer}"));
    signal(machine.pid(), Signal::STOP);
    signal(held.pid(), Signal::TERM);
    // What comes within a moment of the first is the first.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let answer = held.end(Signal::TERM);
    answer.says(1, &["giving up on the guest", "blockmount cleanup"]);
    signal(machine.pid(), Signal::CONT);
    assert!(machine.is_alive());
    clean_up(&[]).says(0, &[]);
}
