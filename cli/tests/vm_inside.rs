//! Programs inside of a virtual machine, started by a debug agent: processes of containers, whose image of busybox has layers
//! of erofs and is activated through the service; and this program itself, with the device mapper of that machine.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::foreign::{ForeignMachine, is_in_guest, serve_in_guest};
use common::servers::{self, Client, Server};
use common::{alone, containers, hold, run, run_id, temp};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// An image with a hash tree.
fn sealed(dir: &TempDir) -> PathBuf {
    let layer = dir.path().join("layer.erofs");
    common::image("erofs", &layer, &[("file", "x")]);
    run([Path::new("seal"), &layer]).says(0, &[]);
    layer
}

/// What a process says that ends well.
#[track_caller]
fn said(machine: &ForeignMachine, root: &Path, words: &[&str]) -> String {
    let (status, stdout, stderr) = machine.run(root, words);
    assert_eq!((status, &*stderr), (0, ""), "{words:?}: {stdout}");
    stdout
}

/// One boot for all of it: under emulation that is most of the time.
#[test]
fn vm_programs_run_inside_of_a_machine() {
    if is_in_guest() {
        return serve_in_guest();
    }
    let _alone = alone();
    let dir = temp();
    let layer = sealed(&dir);
    let metadata = layer.with_extension("erofs.dmverity");
    let machine =
        ForeignMachine::start_with_debug_agent("vm_programs_run_inside_of_a_machine", |image| {
            let [layer, metadata] = [layer, metadata].map(|file| std::fs::read(file).unwrap());
            image
                .add_program(containers::BUSYBOX)
                .add_program("/usr/sbin/dmsetup")
                .modules_if_there(&["loop"])
                .file("/images/layer.erofs", layer)
                .file("/images/layer.erofs.dmverity", metadata)
        });
    // The words of a shell, a disk for images, and the directory of all runs.
    let busybox = "/programs/busybox";
    for script in [
        "mkdir -p /tmp/bin && /programs/busybox --install -s /tmp/bin",
        "mkdir -p /var/tmp /mnt && mount -t tmpfs none /var/tmp && /init cleanup",
    ] {
        let script = script.replace("mkdir", &format!("{busybox} mkdir"));
        shell(&machine, &script);
    }
    let before = machine.tables();
    two_containers_share_layers(&machine);
    machine.assert_as(&before);
    mapped_devices_of_a_killed_run_are_removed(&machine);
    machine.assert_as(&before);
}

fn two_containers_share_layers(machine: &ForeignMachine) {
    let dir = temp();
    let layers = containers::layers(&dir);
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
        said(machine, &one, &["/app/hello", "one"]),
        "app\nfrom one\n"
    );
    let absent = machine.run(&two, &["cat", "/app/written"]);
    assert!(
        absent.0 == 1 && absent.2.contains("No such file"),
        "{absent:?}"
    );
    assert_eq!(
        said(machine, &two, &["/app/hello", "two"]),
        "app\nfrom two\n"
    );
    assert_eq!(said(machine, &one, &["cat", "/app/written"]), "from one\n");
    let all = "app\nbin\ndev\netc\nproc\nsys\ntmp\n";
    assert_eq!(said(machine, &two, &["ls", "/"]), all);

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
}

/// A program that mounts in the guest itself, on loop devices, and is killed there, beside others that are not.
fn mapped_devices_of_a_killed_run_are_removed(machine: &ForeignMachine) {
    let before = mapped(machine);
    // The agent's, for a mount of this machine.
    let dir = temp();
    let image = sealed(&dir);
    let [image, metadata] = [&image, &image.with_extension("erofs.dmverity")];
    let [image, metadata] = [image, metadata].map(|file| file.to_str().unwrap());
    let words = [
        "--at",
        "/mnt/agents",
        "--layer",
        image,
        "--verity",
        metadata,
    ];
    let words = words.into_iter().map(str::to_owned);
    let agents = hold(machine.words().into_iter().chain(words));
    let agents = agents.unwrap_or_else(|answer| panic!("{answer}"));
    // A run that is alive, one of which nothing is known here, and somebody else's.
    let verity = "--layer /images/layer.erofs --verity /images/layer.erofs.dmverity";
    let living = hold_inside(machine, &format!("--at /mnt/living {verity}"));
    let unknown = "BLKMNT-crypt-9.1@blockmount:0123456789abcdef";
    let create = "dmsetup create --noudevsync";
    shell(
        machine,
        &format!("{create} --notable -u {unknown} blockmount-crypt-9.1"),
    );
    shell(
        machine,
        &format!("{create} --table '0 8 error' blockmount-crypt-theirs"),
    );
    let others = mapped(machine);
    assert_eq!(others.len(), before.len() + 4, "{others:?}");
    let files = loop_files(machine);
    let tables = machine.tables();

    // What checks the layer, what encrypts the scratch, and what has its tags.
    let encrypted = "--scratch 64M --encrypt --integrity";
    let killed = hold_inside(machine, &format!("--at /mnt/killed {verity} {encrypted}"));
    let id = killed.run.clone();
    shell(machine, "echo x > /mnt/killed/written");
    assert_eq!(mapped(machine).len(), others.len() + 3);
    kill_inside(machine, killed, "KILL");
    // Another that it was killed in the middle of, which has no table yet.
    let begun = format!("BLKMNT-crypt-9.2@blockmount:{id}");
    shell(
        machine,
        &format!("{create} --notable -u {begun} blockmount-crypt-9.2"),
    );
    assert_eq!(mapped(machine).len(), others.len() + 4);

    let shown = shell(machine, "/init cleanup --dry-run");
    assert_eq!(
        shown.matches("found     mapped device").count(),
        4,
        "{shown}"
    );
    assert_eq!(mapped(machine).len(), others.len() + 4);
    let cleaned: Value = serde_json::from_str(&shell(machine, "/init cleanup --json")).unwrap();
    let items = cleaned["items"].as_array().unwrap();
    let outcomes = |of: &str| -> Vec<&Value> {
        let items = items.iter().filter(|item| item["run"] == of);
        let of_run = items.filter(|item| item["what"] == "mapped_device");
        of_run.map(|item| &item["outcome"]).collect()
    };
    assert_eq!(outcomes(&id), ["removed"; 4], "{cleaned}");
    let elsewhere = outcomes("0123456789abcdef");
    assert!(
        elsewhere.len() == 1 && elsewhere[0]["elsewhere"].is_string(),
        "{cleaned}"
    );
    assert_eq!(mapped(machine), others);
    assert_eq!(loop_files(machine), files);
    machine.assert_guest_as(&tables);
    let left = format!("ls -d /run/blockmount/{id} /var/tmp/blockmount-{id} 2>&1 || true");
    assert_eq!(shell(machine, &left).matches("No such file").count(), 2);

    // Who is alive has lost nothing, and takes it out itself.
    assert_eq!(
        shell(machine, "cat /mnt/living/file /mnt/agents/file"),
        "xx"
    );
    kill_inside(machine, living, "TERM");
    for name in ["blockmount-crypt-9.1", "blockmount-crypt-theirs"] {
        shell(machine, &format!("dmsetup remove --noudevsync {name}"));
    }
    agents.end(Signal::TERM).says(0, &["nothing is left"]);
    assert_eq!(mapped(machine), before);
}

/// A mount by a program inside of the guest.
struct Inside {
    run: String,
    pid: String,
}

/// Starts one, and waits until it holds.
fn hold_inside(machine: &ForeignMachine, words: &str) -> Inside {
    let script = format!(
        "rm -f /tmp/said; /init --log error,blockmount::machine=info mount --json {words} > /tmp/said 2>&1 & pid=$!; \
         until grep -q '^}}' /tmp/said; do kill -0 $pid || {{ cat /tmp/said; exit 1; }}; sleep 1; done; \
         echo pid=$pid; cat /tmp/said"
    );
    let said = shell(machine, &script);
    let after = |text: &str| said.split_once(text).unwrap_or_else(|| panic!("{said}")).1;
    let pid = after("pid=").lines().next().unwrap().to_owned();
    let run = run_id(&said).unwrap_or_else(|| panic!("{said}")).to_owned();
    Inside { run, pid }
}

/// Sends it a signal, and waits until it has ended.
fn kill_inside(machine: &ForeignMachine, Inside { pid, .. }: Inside, signal: &str) {
    let alive = format!("test -e /proc/{pid}/exe");
    shell(
        machine,
        &format!("kill -{signal} {pid}; while {alive}; do sleep 1; done"),
    );
}

/// The mapped devices, with and without a table.
fn mapped(machine: &ForeignMachine) -> BTreeSet<String> {
    let listed = shell(machine, "dmsetup info -c --noheadings -o name,uuid");
    let lines = listed.lines().filter(|line| line.contains(':'));
    lines.map(str::to_owned).collect()
}

/// The files behind loop devices.
fn loop_files(machine: &ForeignMachine) -> String {
    shell(
        machine,
        "cat /sys/block/loop*/loop/backing_file 2>&1 || true",
    )
}

/// What a script says in the root of the guest.
#[track_caller]
fn shell(machine: &ForeignMachine, script: &str) -> String {
    let script = format!("PATH=/tmp/bin:/programs; {script}");
    let words = ["/programs/busybox", "sh", "-ec", &script];
    let (status, stdout, stderr) = machine.run(Path::new("/"), &words);
    assert_eq!(status, 0, "{script}: {stdout}{stderr}");
    stdout
}
