//! `blockmount serve` as a service manager and a client see it.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::servers::{self, Client, Server, name, socket};
use crate::common::{self, in_kernel, run, signal, temp};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What a client that is not ours says.
#[track_caller]
fn client(dir: &TempDir, word: &[&str]) -> String {
    let containerd = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backends/containerd");
    let output = Command::new("/usr/bin/python3")
        .arg(containerd.join("tests/service/client.py"))
        .args([socket(dir), containerd.join("protocol/proto"), image(dir)])
        .arg(dir.path().join("rw.img"))
        .args(word)
        .env_remove("PYTHONPATH")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

fn image(dir: &TempDir) -> PathBuf {
    dir.path().join("base.erofs")
}

fn directory() -> TempDir {
    let dir = temp();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("a"), "base").unwrap();
    let mut mkfs = Command::new("mkfs.erofs");
    let made = mkfs.arg("--quiet").args([&image(&dir), &tree]).status();
    assert!(made.unwrap().success());
    dir
}

#[track_caller]
fn assert_nothing_left(dir: &TempDir) {
    let mark = dir.path().file_name().unwrap();
    assert_eq!(in_kernel(mark), Vec::<String>::new());
    assert!(!socket(dir).exists());
    assert_eq!(runs_of(dir), 0);
}

/// How many runs of the servers of one test there are.
fn runs_of(dir: &TempDir) -> usize {
    let runs = fs::read_dir("/run/blockmount").unwrap().flatten();
    let files = runs.map(|run| run.path().join("mount.json"));
    let of_test =
        |file: &PathBuf| fs::read_to_string(file).is_ok_and(|text| text.contains(&name(dir)));
    files.filter(of_test).count()
}

#[test]
fn root_a_server_outlives_kill_9_and_ends_with_nothing_left() {
    let _alone = common::alone();
    let dir = directory();
    let server = Server::ready(&dir, &[]);
    assert_eq!(client(&dir, &[]), "done\n");
    // Another at the same address, or of the same name, is refused.
    let second = run(["serve", "--address", socket(&dir).to_str().unwrap()]);
    assert!(second.stderr.contains("cannot listen at"), "{second}");
    let elsewhere = dir.path().join("elsewhere");
    let second = run([
        "serve",
        "--name",
        &name(&dir),
        "--address",
        elsewhere.to_str().unwrap(),
    ]);
    assert!(second.stderr.contains("is alive"), "{second}");
    assert!(!elsewhere.exists(), "a start that fails leaves no socket");

    let kept = client(&dir, &["activate"]);
    assert!(kept.contains("name: \"kept\""), "{kept}");
    server.kill();

    let cleanup = run(["cleanup", "--dry-run"]);
    let file = dir.path().join("serve.toml");
    let advice = format!(
        "blockmount serve --log-format json --name {} --config {}",
        name(&dir),
        file.display()
    );
    assert!(cleanup.stdout.contains(&advice), "{cleanup}");
    let resumed = run(["mount", "--resume", &name(&dir)]);
    assert!(
        resumed.stderr.contains("the activations of a server"),
        "{resumed}"
    );

    let server = Server::ready(&dir, &[]);
    assert_eq!(client(&dir, &["list"]), kept);
    signal(server.pid(), Signal::HUP);
    server.hears("RELOADING=1\nMONOTONIC_USEC=");
    server.hears("READY=1");
    // What is temporary ends with the server.
    let mut another = Client::of(&dir);
    let list = [servers::layer(image(&dir))];
    let temporary = json!({"name": "temporary", "mounts": list, "temporary": true});
    another.call("Activate", temporary);
    // So is what a client mounts by itself, over a layer and directories of this machine.
    let lower = "lowerdir={{ mount 0 }}";
    let mixed = servers::mount(
        "format/overlay",
        "overlay",
        &["upperdir=/u", "workdir=/w", lower],
    );
    let list = [servers::layer(image(&dir)), mixed];
    let temporary = json!({"name": "mixed", "mounts": list, "temporary": true});
    let left = &another.call("Activate", temporary)["info"]["system"];
    assert_eq!(left[0]["type"], "overlay", "{left}");
    drop(another);
    let answer = server.end();
    answer.says(0, &["1 activated, which stay"]);
    assert!(!socket(&dir).exists());

    let server = Server::ready(&dir, &[]);
    assert_eq!(client(&dir, &["deactivate"]), "\n");
    // What is in place of its socket now is not its own.
    fs::remove_file(socket(&dir)).unwrap();
    let another = UnixListener::bind(socket(&dir)).unwrap();
    server.end().says(0, &[]);
    fs::remove_file(socket(&dir)).unwrap();
    drop(another);
    assert_nothing_left(&dir);
}

#[test]
fn root_users_that_are_allowed_can_connect_and_others_are_told_that_they_are_not() {
    let _others = common::by_name();
    let dir = directory();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
    let server = Server::ready(&dir, &[]);
    let mode = || socket(&dir).metadata().unwrap().permissions().mode() & 0o777;
    let ask = |user| Client::of_user(&dir, user).ask(&json!({"call": "List"}));
    assert_eq!(mode(), 0o666);
    assert_eq!(ask(65_534), json!({"answer": []}));
    let refused = ask(65_533);
    assert_eq!(refused["code"], "PERMISSION_DENIED", "{refused}");
    let details = refused["details"].as_str().unwrap();
    assert!(details.contains("of user 65533 may not"), "{refused}");
    // However often it comes back, the log has room for others.
    let connect = "import socket, sys\nfor _ in range(500): socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
    let mut refused = Command::new("setpriv");
    refused.args([
        "--reuid",
        "65533",
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
        connect,
    ]);
    assert!(refused.arg(socket(&dir)).status().unwrap().success());

    let file = dir.path().join("serve.toml");
    for (users, expected, code) in [
        ("[0]", 0o600, "UNAVAILABLE"),
        ("[1, 65533]", 0o666, "PERMISSION_DENIED"),
    ] {
        let text = format!("address = {:?}\nallow-users = {users}\n", socket(&dir));
        fs::write(&file, text).unwrap();
        signal(server.pid(), Signal::HUP);
        server.hears("RELOADING=1\nMONOTONIC_USEC=");
        server.hears("READY=1");
        assert_eq!(mode(), expected);
        let refused = ask(65_534);
        assert_eq!(refused["code"], code, "{refused}");
    }
    let answer = server.end();
    answer.says(0, &["of user 65533 may not"]);
    let said = answer.stderr.matches("a process is refused").count();
    assert!(said < 50, "said {said} times of more than 500");
    assert_nothing_left(&dir);
}

/// Has a server read its file again, with these tables in it, and tells what it says about that.
fn reload(dir: &TempDir, server: &mut Server, tables: &str, words: &str) -> String {
    let file = dir.path().join("serve.toml");
    let text = fs::read_to_string(&file).unwrap();
    // Where it listens, and whom it lets in.
    let head: Vec<&str> = text.lines().take(2).collect();
    fs::write(&file, format!("{}\n{tables}", head.join("\n"))).unwrap();
    signal(server.pid(), Signal::HUP);
    let said = server.wait_for(words);
    server.hears("RELOADING=1\nMONOTONIC_USEC=");
    server.hears("READY=1");
    said
}

#[test]
fn root_machines_come_and_go_when_the_file_is_read_again() {
    let _others = common::by_name();
    let dir = directory();
    let metrics = dir.path().join("metrics");
    let words = ["--metrics", &format!("unix:{}", metrics.display())];
    let mut server = Server::ready_with(&dir, &words, "[vm.one]\n");
    let list = [servers::layer(image(&dir))];
    let mut client = Client::of(&dir);
    client.activate("first", &list);
    let both = "[vm.one]\n[vm.two]\n";
    reload(&dir, &mut server, both, "machine two is served from now on");
    client.activate_in("two", "second", &list);
    let renamed = format!("name = \"other\"\n{both}");
    reload(&dir, &mut server, &renamed, "says of name has changed");
    let vms = |dir: &TempDir| -> Vec<String> {
        let status = run(["status", "--json", "--name", &name(dir)]).json();
        let runs = status["runs"].as_array().unwrap().iter();
        runs.map(|run| run["vm"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(vms(&dir), ["one", "two"]);
    let series = common::get(&metrics, "/metrics");
    for vm in ["one", "two"] {
        let activated = format!("activations{{vm=\"{vm}\",namespace=\"default\"}} 1");
        assert!(series.contains(&activated), "{series}");
    }

    // One that is in use takes nothing more, and goes when it is free, unless the file names it again before.
    let stays = "machine one is not in the file any more, takes nothing more";
    let said = reload(&dir, &mut server, "[vm.two]\n", stays);
    assert!(said.contains("1 activated"), "{said}");
    client.call("Info", json!({"name": "first"}));
    let more = json!({"name": "more", "mounts": list, "labels": {"blockmount.vm": "one"}});
    let refused = client.ask(&json!({"call": "Activate", "request": more}));
    assert_eq!(refused["code"], "UNAVAILABLE", "{refused}");
    reload(&dir, &mut server, both, "were read again");
    client.activate_in("one", "more", &list);
    reload(&dir, &mut server, "[vm.two]\n", "2 activated");
    client.deactivate("first");
    client.deactivate("more");
    server.wait_for("machine one is not served any more");
    let changed = "[vm.two]\nguest = \"local\"\n";
    reload(&dir, &mut server, changed, "machine two has changed");
    assert_eq!(vms(&dir), ["two"]);
    assert!(!common::get(&metrics, "/metrics").contains("vm=\"one\""));
    for (tables, words) in [
        ("[vm.\"a/b\"]\n", "nothing is changed"),
        ("guest = \"local\"\n", "names no virtual machines now"),
        (
            "[vm.two]\n[vm.far]\nvm = \"qemu:/absent\"\nagent = \"unix:/absent\"\n",
            "far is not taken in",
        ),
    ] {
        reload(&dir, &mut server, tables, words);
    }
    // Metrics are answered while a machine is waited for that does not answer.
    let monitor = dir.path().join("qmp");
    let listener = UnixListener::bind(&monitor).unwrap();
    let stuck = format!(
        "[vm.two]\n[vm.stuck]\nvm = \"qemu:{}\"\nagent = \"unix:/absent\"\n",
        monitor.display()
    );
    let metrics_at = metrics.clone();
    let asking = std::thread::spawn(move || {
        // It is asked for from the moment on at which it is waited for.
        let connected = listener.accept().unwrap();
        common::get(&metrics_at, "/metrics");
        drop(connected);
    });
    let said = reload(&dir, &mut server, &stuck, "stuck is not taken in");
    asking.join().unwrap();
    assert!(!said.contains("has not answered"), "{said}");
    // The last one is replaced, and never nobody is left.
    client.deactivate("second");
    reload(
        &dir,
        &mut server,
        "[vm.three]\n",
        "machine two is not served any more",
    );
    client.activate("third", &list);
    assert_eq!(vms(&dir), ["three"]);
    drop(client);
    server.kill();
    let server = Server::ready_with(&dir, &words, "[vm.three]\n");
    let mut client = Client::of(&dir);
    client.deactivate("third");
    drop(client);
    server.end().says(0, &[]);
    assert_nothing_left(&dir);
}

#[test]
fn root_a_server_takes_the_socket_of_its_service_manager() {
    let _others = common::by_name();
    let dir = directory();
    let listen = format!("--listen={}", socket(&dir).display());
    let by_manager = ["systemd-socket-activate", "-E", "NOTIFY_SOCKET", &listen];
    let server = Server::start(&dir, &by_manager, &[]);
    common::eventually("a socket", || socket(&dir).exists());
    assert_eq!(client(&dir, &["list"]), "\n");
    server.hears("READY=1");
    server.end().says(0, &[]);
    // It is the manager's to remove.
    fs::remove_file(socket(&dir)).unwrap();
    assert_nothing_left(&dir);
}

/// A hundred containers at once over the same eight layers.
#[test]
fn root_many_activations_at_once_share_their_layers() {
    let _others = common::by_name();
    let dir = directory();
    let server = Server::ready(&dir, &[]);
    let layers = (0..8).map(|number| {
        let copy = dir.path().join(format!("layer-{number}.erofs"));
        fs::copy(image(&dir), &copy).unwrap();
        servers::layer(copy)
    });
    let mut list: Vec<Value> = layers.collect();
    list.push(servers::mount(
        "format/overlay",
        "overlay",
        &["lowerdir={{ overlay 0 7 }}"],
    ));
    let names: Vec<String> = (0..100).map(|number| format!("c{number}")).collect();
    let mut client = Client::of(&dir);
    let calls = names
        .iter()
        .map(|name| json!({"call": "Activate", "request": {"name": name, "mounts": list}}));
    let answers = client.ask(&json!({"all": calls.collect::<Vec<_>>()}));
    let trees = answers["all"].as_array().unwrap().iter().map(|answer| {
        let active = answer["answer"]["info"]["active"].as_array();
        let active = active.unwrap_or_else(|| panic!("{answer}"));
        active.last().unwrap()["mountPoint"].as_str().unwrap()
    });
    let trees: BTreeSet<&str> = trees.collect();
    assert_eq!(trees.len(), 100);
    assert!(
        trees
            .iter()
            .all(|tree| fs::read_to_string(Path::new(tree).join("a")).unwrap() == "base")
    );
    let status = run(["status", "--json", "--name", &name(&dir)]).json();
    let manager = &status["runs"][0]["manager"];
    let count = |what: &str| manager[what].as_array().unwrap().len();
    assert_eq!(
        (count("attachments"), count("mounts"), count("stacks")),
        (8, 8, 100)
    );
    let attach = manager["steps"]
        .as_array()
        .unwrap()
        .iter()
        .find(|step| step["step"] == "Attach");
    assert_eq!(attach.unwrap()["succeeded"], 8);
    let calls = names
        .iter()
        .map(|name| json!({"call": "Deactivate", "request": {"name": name}}));
    let answers = client.ask(&json!({"all": calls.collect::<Vec<_>>()}));
    assert!(
        answers["all"]
            .as_array()
            .unwrap()
            .iter()
            .all(|answer| answer.get("answer").is_some())
    );
    drop(client);
    server.end().says(0, &[]);
    assert_nothing_left(&dir);
}

/// How much a process has: descriptors, threads, and kilobytes of memory.
fn held_by(process: u32) -> (usize, usize, u64) {
    let count = |what: &str| {
        fs::read_dir(format!("/proc/{process}/{what}"))
            .unwrap()
            .count()
    };
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let resident = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kilobytes = resident.split_whitespace().nth(1).unwrap();
    (count("fd"), count("task"), kilobytes.parse().unwrap())
}

/// `BLOCKMOUNT_CYCLES` says how often; 10,000 is a quarter of an hour.
#[test]
fn root_a_server_does_not_grow_with_what_it_has_done() {
    let _others = common::by_name();
    let dir = directory();
    let server = Server::ready(&dir, &[]);
    let cycles = std::env::var("BLOCKMOUNT_CYCLES").map_or(60, |cycles| cycles.parse().unwrap());
    let list = [
        servers::layer(image(&dir)),
        servers::mount("format/overlay", "overlay", &["lowerdir={{ mount 0 }}"]),
    ];
    let mut client = Client::of(&dir);
    let mut cycle = || {
        client.activate("one", &list);
        client.deactivate("one");
    };
    // What is kept for the next time is there after some.
    (0..20).for_each(|_| cycle());
    let (files, threads, memory) = held_by(server.pid());
    (0..cycles).for_each(|_| cycle());
    let (files_then, threads_then, memory_then) = held_by(server.pid());
    assert!(
        files_then <= files,
        "{files_then} descriptors, and {files} before"
    );
    // Threads that have blocked are kept for a while.
    assert!(
        threads_then <= threads + 4,
        "{threads_then} threads, and {threads} before"
    );
    assert!(
        memory_then <= memory + 8 * 1024,
        "{memory_then} kilobytes, and {memory} before"
    );
    drop(client);
    server.end().says(0, &[]);
    assert_nothing_left(&dir);
}

#[test]
fn root_a_file_of_a_server_that_makes_no_sense_is_named() {
    let dir = temp();
    let file = dir.path().join("serve.toml");
    for (text, words) in [
        ("wonder = 1", "unknown field `wonder`"),
        ("grace = \"soon\"", "grace in"),
        ("guest = \"moon\"", "guest in"),
        ("name = \"\"", "holder's name"),
        ("vm = 1", "has tables such as [vm.NAME]"),
        ("[vm]", "it names no virtual machine"),
        ("[vm.\"a/b\"]", "up to 76 letters"),
        ("[vm.a]\nwonder = 1", "unknown field `wonder`"),
        ("[vm.a]\nagent = \"tcp:1\"", "vm.a.agent in"),
        ("guest = \"qemu\"\n[vm.a]", "belongs into its table"),
    ] {
        fs::write(&file, text).unwrap();
        let answer = run(["serve", "--config", file.to_str().unwrap()]);
        assert!(answer.stderr.contains(words), "{answer}");
        answer.says(2, &["serve.toml"]);
    }
}

#[test]
fn root_guests_that_cannot_be_together_are_refused() {
    let dir = temp();
    let file = dir.path().join("serve.toml");
    let same = "vm = \"qemu:/q\"\nagent = \"unix:/a\"";
    for (text, more, words) in [
        ("[vm.a]\nvm = \"qemu:/q\"", &[][..], "[vm.a] makes no sense"),
        (
            &format!("[vm.a]\n{same}\n[vm.b]\n{same}"),
            &[],
            "[vm.a] and [vm.b] are the same",
        ),
        (
            "[vm.a]",
            &["--guest", "qemu"],
            "the command line is about one guest",
        ),
        (
            "[vm.a]",
            &["--transport", "scsi"],
            "the command line is about one guest",
        ),
    ] {
        fs::write(&file, text).unwrap();
        let words_of = ["serve", "--config", file.to_str().unwrap()];
        let answer = run(words_of.iter().chain(more));
        answer.says(2, &[words]);
    }
}

#[test]
fn root_a_machine_that_does_not_answer_is_an_error_and_the_others_are_undone() {
    let _alone = common::alone();
    let dir = temp();
    let monitor = dir.path().join("qmp");
    let listener = UnixListener::bind(&monitor).unwrap();
    // Somebody is there, and no QEMU that talks to us.
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let file = dir.path().join("serve.toml");
    let busy = format!("vm = \"qemu:{}\"\nagent = \"unix:/a\"", monitor.display());
    fs::write(&file, format!("[vm.busy]\n{busy}\n[vm.here]\n")).unwrap();
    let (name, at) = (name(&dir), socket(&dir));
    let words = ["serve", "--name", &name, "--address", at.to_str().unwrap()];
    let answer = run(words
        .into_iter()
        .chain(["--config", file.to_str().unwrap()]));
    answer.says(1, &["vm busy: cannot reach the virtual machine"]);
    assert_eq!(runs_of(&dir), 0);
}
