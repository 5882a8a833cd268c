//! The program with a virtual machine: the demo, a mount that is held, and every way to end them.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use blockmount_debug_agent::kit::{self, aes_xts, luks};
use blockmount_qemu::Qmp;
use common::machines::{held_in_a_machine, held_in_a_machine_by, machines_of};
use common::{alone, assert_nothing_left, eventually, hold, image, run, run_id, temp};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;

#[test]
fn vm_a_bench_measures_hot_plugs_beside_bare_commands_and_leaves_nothing() {
    let dir = temp();
    let answer = run([
        "bench", "--guest", "qemu", "--json", "--disks", "1,3", "--rounds", "2",
    ]);
    answer.says(0, &[]);
    common::assert_measured(&answer, "qemu");
    assert_nothing_left(&answer, &dir);
}

#[test]
fn vm_a_demo_shows_both_transports_to_any_user_and_leaves_nothing() {
    // Not the root of this machine: nothing of it is done on this machine.
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(65_534), Some(65_534)).unwrap();
    std::fs::set_permissions(&home, std::fs::Permissions::from_mode(0o700)).unwrap();
    let words = [
        "--log",
        "error,blockmount::machine=info",
        "demo",
        "--guest",
        "qemu",
        "--transport",
        "auto",
        "--json",
    ];
    let mut command = common::as_nobody(dir.path(), words);
    command
        .env("HOME", &home)
        .env("XDG_RUNTIME_DIR", &home)
        .env_remove("XDG_CACHE_HOME");
    let answer = kit::run(command);
    answer.says(0, &[]);
    let json = answer.json();
    assert_eq!(json["guest"], "qemu");
    assert!(home.join(".cache/blockmount/states").is_dir(), "{answer}");
    let runs = std::fs::read_dir(home.join("blockmount")).unwrap();
    assert_eq!(runs.count(), 0, "{answer}");
    let disks = json["layers"].as_array().unwrap();
    let transports: BTreeSet<(&str, &str)> = disks
        .iter()
        .map(|disk| {
            (
                disk["role"].as_str().unwrap(),
                disk["transport"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        transports,
        BTreeSet::from([("layer", "vpmem"), ("scratch", "scsi")])
    );
    for count in [
        "distinct_images",
        "attaches",
        "detaches",
        "mounts",
        "unmounts",
    ] {
        assert_eq!(json[count], json["distinct_images"], "{count}: {answer}");
    }
    assert_eq!(json["digest_mismatches"], 0, "{answer}");
    assert_eq!(json["left_over"].as_array().unwrap().len(), 0, "{answer}");
    for (which, disks) in [("one", 1), ("many", 64)] {
        let speed = &json["speed"][which];
        assert_eq!(speed["disks"], disks, "{answer}");
        assert!(speed["ours_ms"].as_f64().unwrap() > 0.0, "{answer}");
        assert!(speed["floor_ms"].as_f64().unwrap() > 0.0, "{answer}");
    }
    assert!(json["files_checked"].as_u64().unwrap() > 100, "{answer}");
    assert!(answer.stderr.contains(home.to_str().unwrap()), "{answer}");
    let (_, after) = answer.stderr.split_once("home/blockmount/").unwrap();
    let id = &after[..16];
    assert!(
        !Path::new(&format!("/var/tmp/blockmount-{id}")).exists(),
        "{answer}"
    );
    assert_eq!(machines_of(id), Vec::<String>::new());
}

#[test]
fn vm_a_mount_is_held_until_a_signal() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    // In other formats as well, which QEMU reads.
    let mut layers = vec![layer.clone()];
    for (name, format) in [("other.vhd", "vpc"), ("other.vhdx", "vhdx")] {
        let other = dir.path().join(name);
        let mut convert = std::process::Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]);
        assert!(convert.arg(&layer).arg(&other).status().unwrap().success());
        layers.push(other);
    }
    let arguments = [
        "--guest",
        "qemu",
        "--transport",
        "auto",
        "--scratch",
        "8M",
        "--at",
        "/mnt/tree",
    ];
    let layers = layers
        .iter()
        .flat_map(|layer| ["--layer", layer.to_str().unwrap()]);
    let held = hold(arguments.into_iter().chain(layers)).unwrap_or_else(|answer| {
        panic!("{answer}");
    });
    assert_eq!(held.json["target"], "/mnt/tree");
    for (layer, transport) in [(0, "vpmem:"), (1, "scsi:"), (2, "scsi:")] {
        let seen = &held.json["layers"][layer];
        assert!(
            seen["locator"].as_str().unwrap().starts_with(transport),
            "{seen}"
        );
        assert_eq!(seen["filesystem"], "erofs");
    }
    // Nothing of it is on this machine.
    assert!(!Path::new("/mnt/tree").exists());
    let answer = held.end(Signal::INT);
    answer.says(0, &["SIGINT: releasing /mnt/tree", "nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(
        machines_of(run_id(&answer.stderr).unwrap()),
        Vec::<String>::new()
    );
}

#[test]
fn vm_a_killed_program_takes_its_machine_along_and_cleanup_removes_the_rest() {
    let _alone = alone();
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let arguments = ["--guest", "qemu", "--at", "/mnt/tree", "--layer"];
    let arguments = arguments.map(str::to_owned).into_iter();
    let mut held = hold(arguments.chain([layer.display().to_string()])).unwrap_or_else(|answer| {
        panic!("{answer}");
    });
    let said = held.wait_for("run started");
    let id = run_id(&said).unwrap();
    assert_eq!(machines_of(id).len(), 1);
    common::signal(held.pid(), Signal::KILL);
    eventually("the end of the machine", || machines_of(id).is_empty());
    let left = [
        format!("/run/blockmount/{id}"),
        format!("/var/tmp/blockmount-{id}"),
    ];
    assert!(left.iter().all(|directory| Path::new(directory).exists()));
    run(["cleanup"]).says(0, &[]);
    assert!(!left.iter().any(|directory| Path::new(directory).exists()));
}

#[test]
fn vm_u06_a_mount_ends_with_an_error_when_its_machine_dies() {
    let dir = temp();
    let (held, id, qemu) = held_in_a_machine(&dir);
    let started = Instant::now();
    common::signal(qemu, Signal::KILL);
    let answer = held.wait();
    assert!(started.elapsed() < Duration::from_secs(60), "{answer}");
    answer.says(1, &["the VM is gone", "SIGKILL", "did not live"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

/// The line to the agent is cut from the side of QEMU, and no new one can be laid: the directory of their sockets has gone.
#[test]
fn vm_u06_a_mount_ends_with_an_error_when_its_agent_is_lost_for_good() {
    let dir = temp();
    let monitor = dir.path().join("second-monitor");
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\nPATH=${{PATH#*:}}\nexec qemu-system-x86_64 \"$@\" -qmp unix:{},server=on,wait=off\n",
        monitor.display()
    );
    let qemu = bin.join("qemu-system-x86_64");
    std::fs::write(&qemu, script).unwrap();
    std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let (held, id, _) = held_in_a_machine_by(&dir, |command| {
        command.env("PATH", path);
    });
    let work = format!("/var/tmp/blockmount-{id}");
    let machine = std::fs::read_dir(&work)
        .unwrap()
        .map(|entry| entry.unwrap());
    let mut machine = machine.filter(|entry| entry.file_type().unwrap().is_dir());
    let sockets = machine.next().unwrap().path();
    std::fs::rename(&sockets, dir.path().join("away")).unwrap();
    let started = Instant::now();
    cut_line(&monitor, "blockmount.agent");
    let answer = held.wait();
    // It is known as soon as the line cannot be laid again.
    assert!(started.elapsed() < Duration::from_secs(60), "{answer}");
    answer.says(1, &["cannot be reached again", "releasing /mnt/tree"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

/// Takes the port of a name out of a guest.
fn cut_line(monitor: &Path, name: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::connect(monitor).await.unwrap();
        let qmp = Qmp::connect(stream).await.unwrap();
        let devices = "/machine/peripheral";
        let all = qmp.execute("qom-list", json!({"path": devices})).await;
        for device in all.unwrap().as_array().unwrap() {
            let id = &device["name"];
            let path = format!("{devices}/{}", id.as_str().unwrap());
            let property = json!({"path": path, "property": "name"});
            if qmp
                .execute("qom-get", property)
                .await
                .is_ok_and(|found| found == name)
            {
                qmp.execute("device_del", json!({"id": id})).await.unwrap();
                return;
            }
        }
        panic!("no port is called {name}");
    });
}

#[test]
fn vm_a_ctrl_c_at_the_terminal_is_not_for_the_machine() {
    let dir = temp();
    let (held, id, _) = held_in_a_machine(&dir);
    let group = Pid::from_raw(held.pid().cast_signed()).unwrap();
    kill_process_group(group, Signal::INT).unwrap();
    let answer = held.wait();
    answer.says(0, &["SIGINT: releasing"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

#[test]
fn vm_x06_the_second_signal_gives_up_on_a_machine_that_hangs() {
    let dir = temp();
    let (held, id, qemu) = held_in_a_machine(&dir);
    common::signal(qemu, Signal::STOP);
    common::signal(held.pid(), Signal::TERM);
    std::thread::sleep(Duration::from_millis(500));
    let started = Instant::now();
    let answer = held.end(Signal::TERM);
    // It takes some milliseconds; without the second signal it would be the 90 seconds of a request.
    let took = started.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}: {answer}");
    answer.says(1, &["giving up on the guest", "second signal"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(machines_of(&id), Vec::<String>::new());
}

#[test]
fn vm_a_layer_with_a_hash_tree_is_checked_by_the_guest() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.to_str().unwrap();
    run(["seal", layer]).says(0, &[]);
    let metadata = format!("{layer}.dmverity");
    let words = [
        "--guest",
        "qemu",
        "--at",
        "/mnt/tree",
        "--layer",
        layer,
        "--verity",
    ];
    let arguments = |verity: &str| {
        words
            .map(str::to_owned)
            .into_iter()
            .chain([verity.to_owned()])
    };
    for transport in ["scsi", "vpmem"] {
        let more = ["--transport", transport].map(str::to_owned);
        let held = hold(arguments(&metadata).chain(more));
        let held = held.unwrap_or_else(|answer| panic!("{answer}"));
        let seen = &held.json["layers"][0];
        assert!(
            seen["device"].as_str().unwrap().starts_with("/dev/dm-"),
            "{seen}"
        );
        assert!(
            seen["locator"].as_str().unwrap().starts_with(transport),
            "{seen}"
        );
        let answer = held.end(Signal::TERM);
        answer.says(0, &["nothing is left"]);
    }
    // With the tree in an image of its own.
    let plain = dir.path().join("plain.erofs");
    image("erofs", &plain, &[("file", "x")]);
    let (plain, tree) = (plain.to_str().unwrap(), dir.path().join("plain.tree"));
    let tree = tree.to_str().unwrap();
    let sealed = run(["seal", "--json", "--tree", tree, plain]);
    sealed.says(0, &[]);
    let sealed: serde_json::Value = serde_json::from_str(&sealed.stdout).unwrap();
    let root = format!("root={},offset=0", sealed["root_digest"].as_str().unwrap());
    let words = [
        "--guest",
        "qemu",
        "--at",
        "/mnt/tree",
        "--layer",
        plain,
        "--verity",
        &root,
        "--verity-tree",
        tree,
    ];
    let held = hold(words.map(str::to_owned)).unwrap_or_else(|answer| panic!("{answer}"));
    let device = held.json["layers"][0]["device"].as_str().unwrap();
    assert!(device.starts_with("/dev/dm-"), "{device}");
    held.end(Signal::TERM).says(0, &["nothing is left"]);
    // The digest of another image.
    let text = std::fs::read_to_string(&metadata).unwrap();
    let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
    let table = format!("root={},offset={}", "ab".repeat(32), parsed["hashoffset"]);
    let answer = hold(arguments(&table)).map(|_| ()).unwrap_err();
    answer.says(1, &["root digest abab", "layer.erofs"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn vm_a_scratch_is_encrypted_when_it_was_asked_for() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.to_str().unwrap();
    let words = [
        "--guest",
        "qemu",
        "--at",
        "/mnt/tree",
        "--scratch",
        "64M",
        "--encrypt",
        "--layer",
        layer,
    ];
    // With tags, there are two mapped devices.
    for (more, device) in [
        (None, "/dev/dm-0"),
        (Some("--integrity"), "/dev/dm-1"),
        (Some("--integrity=aegis128"), "/dev/dm-1"),
    ] {
        let held = hold(words.into_iter().chain(more));
        let held = held.unwrap_or_else(|answer| panic!("{answer}"));
        let scratch = &held.json["scratch"];
        assert_eq!(scratch["device"], device, "{scratch}");
        assert_eq!(scratch["filesystem"], "ext4");
        let answer = held.end(Signal::TERM);
        answer.says(0, &["nothing is left"]);
        assert_nothing_left(&answer, &dir);
    }
    run(["mount", "--encrypt", "--layer", layer, "--at", "/mnt/x"]).says(2, &["--scratch"]);
}

/// The keys are in files of this machine, and a guest has them under other names.
#[test]
fn vm_a_volume_of_luks2_and_an_image_with_a_key_are_layers() {
    let dir = temp();
    let plain = dir.path().join("plain.erofs");
    image("erofs", &plain, &[("file", "x")]);
    let content = std::fs::read(&plain).unwrap();
    let [volume, keyed, passphrase, key] =
        ["volume", "keyed", "passphrase", "key"].map(|name| dir.path().join(name));
    luks::volume_with(&volume, &content);
    let bytes: Vec<u8> = (0..64).collect();
    std::fs::write(&keyed, aes_xts::encrypted(&content, &bytes, 4096)).unwrap();
    std::fs::write(&passphrase, luks::PASSPHRASE).unwrap();
    std::fs::write(&key, &bytes).unwrap();
    let [volume, keyed] = [&volume, &keyed].map(|path| path.to_str().unwrap());
    let [passphrase, key] = [&passphrase, &key].map(|path| format!("file={}", path.display()));
    let words = |how: &str, from: &str, image: &str| {
        let words = [
            "--guest",
            "qemu",
            "--at",
            "/mnt/tree",
            "--layer",
            image,
            how,
            from,
        ];
        words.map(str::to_owned)
    };
    let both = words("--luks", &passphrase, volume).into_iter();
    let both = both.chain(["--layer", keyed, "--key", &key].map(str::to_owned));
    let held = hold(both).unwrap_or_else(|answer| panic!("{answer}"));
    for layer in [0, 1] {
        let seen = &held.json["layers"][layer];
        let device = seen["device"].as_str().unwrap();
        assert!(device.starts_with("/dev/dm-"), "{seen}");
        assert_eq!(seen["filesystem"], "erofs");
    }
    held.end(Signal::TERM).says(0, &["nothing is left"]);
    // Another passphrase, none in the guest's keyring, and an image that is no volume.
    for (words, why) in [
        (words("--luks", &key, volume), "does not open the volume"),
        (words("--luks", "volumes:data", volume), "no such key"),
        (words("--luks", &passphrase, keyed), "no volume of LUKS2"),
    ] {
        let answer = hold(words).map(|_| ()).unwrap_err();
        answer.says(1, &[why]);
        assert_nothing_left(&answer, &dir);
    }
    let absent = run(["mount"].into_iter().map(str::to_owned).chain(words(
        "--luks",
        "file=/no/such/key",
        volume,
    )));
    absent.says(1, &["/no/such/key"]);
}

#[test]
fn root_u17_what_a_machine_cannot_have_is_refused_before_it_is_started() {
    let dir = temp();
    let layer = dir.path().join("layer.erofs");
    image("erofs", &layer, &[("file", "x")]);
    let layer = layer.to_str().unwrap();
    let answer = run(["demo", "--transport", "vpmem", "--layer", layer]);
    answer.says(2, &["no --transport to choose", "--guest qemu"]);
    let outside = [
        "mount", "--guest", "qemu", "--at", "/etc/x", "--layer", layer,
    ];
    let answer = run(outside);
    answer.says(2, &["mounts nothing at /etc/x", "/mnt"]);
    assert_eq!(run_id(&answer.stderr), None, "{answer}");
    assert_nothing_left(&answer, &dir);
}

/// The packed device of persistent memory is a file in `/var/tmp`.
#[test]
fn vm_u19_a_layer_for_which_its_transport_has_no_space_goes_to_the_next_and_the_table_says_why() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let layer = dir.path().join("layer.ext4");
    image("ext4", &layer, &[("file", "x")]);
    // Sparse here, and copied as a whole.
    let file = std::fs::File::options().write(true).open(&layer).unwrap();
    file.set_len(400 << 20).unwrap();
    let arguments = [
        "--guest",
        "qemu",
        "--transport",
        "auto",
        "--at",
        "/mnt/tree",
        "--layer",
        layer.to_str().unwrap(),
    ];
    let small = "mount -t tmpfs -o size=300m small /var/tmp";
    let command = common::after_mounting(small, arguments.map(str::to_owned).into());
    let held = common::hold_by(command).unwrap_or_else(|answer| panic!("{answer}"));
    let layer = held.json["layers"][0].clone();
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert!(
        layer["locator"].as_str().unwrap().starts_with("scsi:"),
        "{layer}"
    );
    let why = layer["passed_on"].as_str().unwrap();
    assert!(why.contains("there is no space for it"), "{why}");
    assert!(common::in_kernel(dir.path().file_name().unwrap()).is_empty());
}
