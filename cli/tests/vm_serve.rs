//! `blockmount serve` with a virtual machine of its own: the lists of containerd's erofs snapshotter, performed in it; and with several.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../tests/common/merged_erofs.rs"]
mod merged_erofs;

use std::path::{Path, PathBuf};

use blockmount_checker::tree::Tree;
use common::foreign::ForeignMachine;
use common::machines::{in_guest, machine_in, machines_of};
use common::servers::{Client, Server, layer, mount, overlay, writable};
use common::{alone, get, image, in_kernel, run, run_id, signal, temp};
use merged_erofs::Merged;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A list, and what is in the tree that it makes: names, each with its content.
struct List {
    name: &'static str,
    mounts: Vec<Value>,
    files: Vec<(&'static str, String)>,
    is_writable: bool,
}

impl List {
    /// What has to be in it.
    fn tree(&self) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in &self.files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        Tree::read(dir.path(), &|| false, || ()).unwrap()
    }
}

fn erofs(dir: &TempDir, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let path = dir.path().join(format!("{name}.erofs"));
    image("erofs", &path, files);
    path
}

/// Each list as the snapshotter makes it.
fn lists(dir: &TempDir) -> Vec<List> {
    let base = erofs(dir, "base", &[("a", "base"), ("b", "base")]);
    let app = erofs(dir, "app", &[("b", "app")]);
    let text = |text: &str| text.to_owned();
    let upper = "X-containerd.mkdir.path={{ mount 0 }}/upper:0755";
    let of_upper = mount(
        "format/mkdir/bind",
        "{{ mount 0 }}/upper",
        &[upper, "rw", "rbind"],
    );
    let read_only = mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
    let lower = mount(
        "format/mkdir/overlay",
        "overlay",
        &["lowerdir={{ overlay 0 1 }}"],
    );
    vec![
        List {
            name: "active",
            mounts: vec![
                writable(dir.path().join("active.img")),
                layer(&app),
                layer(&base),
                overlay(2),
            ],
            files: vec![("a", text("base")), ("b", text("app"))],
            is_writable: true,
        },
        List {
            name: "without-parents",
            mounts: vec![writable(dir.path().join("alone.img")), of_upper],
            files: vec![],
            is_writable: true,
        },
        List {
            name: "view",
            mounts: vec![layer(&app), layer(&base), lower],
            files: vec![("a", text("base")), ("b", text("app"))],
            is_writable: false,
        },
        List {
            name: "one-layer",
            mounts: vec![layer(&base), read_only],
            files: vec![("a", text("base")), ("b", text("base"))],
            is_writable: false,
        },
        merged(dir),
        verified(dir),
    ]
}

/// Metadata of their own, and the content in other images.
fn merged(dir: &TempDir) -> List {
    let contents = ["1", "2"].map(|byte| byte.repeat(4096));
    let names = ["first", "second"];
    let images = [0, 1].map(|index| erofs(dir, names[index], &[(names[index], &contents[index])]));
    let files = [0, 1].map(|index| Merged {
        name: names[index],
        image: index,
        content: contents[index].as_bytes(),
    });
    let merged = dir.path().join("merged.erofs");
    merged_erofs::write(&merged, &[&images[0], &images[1]], &files, true);
    let devices = images.map(|image| format!("device={}", image.display()));
    let options = ["ro", "loop", &devices[0], &devices[1]];
    List {
        name: "merged",
        mounts: vec![mount("erofs", &merged, &options)],
        files: names.into_iter().zip(contents).collect(),
        is_writable: false,
    }
}

/// Sealed as `mkfs.erofs` of containerd's tools does it, here by our own program.
fn verified(dir: &TempDir) -> List {
    let sealed = erofs(dir, "sealed", &[("file", "sealed")]);
    run([Path::new("seal"), &sealed]).says(0, &[]);
    let metadata = format!("X-containerd.dmverity={}.dmverity", sealed.display());
    List {
        name: "verified",
        mounts: vec![mount("erofs", &sealed, &["ro", "loop", &metadata])],
        files: vec![("file", "sealed".to_owned())],
        is_writable: false,
    }
}

/// One machine for all of them at once, and across a kill of the server, in whose time the test looks into the guest.
#[test]
fn vm_the_lists_of_the_erofs_snapshotter_are_performed_in_a_machine() {
    let _alone = alone();
    let dir = temp();
    let lists = lists(&dir);
    let words = ["--guest", "qemu"];
    let server = Server::ready(&dir, &words);
    let mut client = Client::of(&dir);
    let points: Vec<Vec<PathBuf>> = lists
        .iter()
        .map(|list| client.activate(list.name, &list.mounts))
        .collect();
    for (list, points) in lists.iter().zip(&points) {
        assert_eq!(points.len(), list.mounts.len(), "{}", list.name);
    }
    let wrong = mount("erofs", dir.path().join("none.erofs"), &["ro", "loop"]);
    let refused =
        client.ask(&json!({"call": "Activate", "request": {"name": "wrong", "mounts": [wrong]}}));
    assert_eq!(refused["code"], "FAILED_PRECONDITION", "{refused}");
    let all = client.call("List", json!({}));
    drop(client);
    // The layers of three lists are one disk each.
    let status = run(["status", "--json", "--name", &common::servers::name(&dir)]).json();
    let manager = &status["runs"][0]["manager"];
    let disks = manager["attachments"].as_array().unwrap();
    assert_eq!(disks.len(), 2 + 2 + 3 + 1, "{manager}");
    assert_eq!(
        status["runs"][0]["activations"].as_array().unwrap().len(),
        lists.len()
    );
    let said = server.kill();
    let id = run_id(&said).unwrap().to_owned();

    in_guest(&id, async |checker| {
        for (list, points) in lists.iter().zip(&points) {
            let tree = points.last().unwrap();
            let compared = list.tree().compare(&checker.tree(tree).await.unwrap());
            assert_eq!(compared.mismatches, Vec::<String>::new(), "{}", list.name);
            assert_eq!(compared.files, list.files.len() as u64, "{}", list.name);
            let written = checker.write(tree.join("written"), "x").await;
            assert_eq!(
                written.is_ok(),
                list.is_writable,
                "{}: {written:?}",
                list.name
            );
        }
        let tables = checker.tables().await.unwrap();
        assert_eq!(tables.dm_devices.len(), 1, "only one list is verified");
    });

    let server = Server::ready(&dir, &words);
    let mut client = Client::of(&dir);
    assert_eq!(client.call("List", json!({})), all);
    for list in &lists {
        client.deactivate(list.name);
    }
    drop(client);
    server.end().says(0, &[]);
    assert_eq!(machines_of(&id), Vec::<String>::new());
    assert!(!Path::new(&format!("/run/blockmount/{id}")).exists());
    // What was written is in the image that the snapshotter has.
    let kept = dir.path().join("active.img");
    assert!(kept.exists() && dir.path().join("alone.img").exists());
}

/// The run of each virtual machine of a server, by its name.
fn runs(dir: &TempDir) -> Vec<(String, String, usize)> {
    let status = run(["status", "--json", "--name", &common::servers::name(dir)]).json();
    let runs = status["runs"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let runs = runs.map(|run| {
        let activations = run["activations"].as_array().unwrap();
        (text(&run["vm"]), text(&run["run"]), activations.len())
    });
    runs.collect()
}

#[test]
fn vm_a_server_that_is_killed_at_its_start_leaves_no_machine_to_the_next() {
    let _alone = alone();
    let dir = temp();
    let words = ["--guest", "qemu"];
    let server = Server::ready(&dir, &words);
    let (_, run, _) = runs(&dir).remove(0);
    let machine = machine_in(&run);
    // As long as nobody holds anything, this says so.
    std::fs::write(format!("/run/blockmount/{run}/unheld"), "").unwrap();
    server.kill();
    assert!(Path::new(&format!("/proc/{machine}/exe")).exists());
    let server = Server::ready(&dir, &words);
    assert!(!Path::new(&format!("/proc/{machine}/exe")).exists());
    let of_next = runs(&dir);
    assert!(of_next.len() == 1 && of_next[0].1 != run, "{of_next:?}");
    server.end().says(0, &[]);
    assert!(!Path::new(&format!("/var/tmp/blockmount-{run}")).exists());
    assert!(runs(&dir).is_empty());
}

/// This machine and a virtual one by their names, beside one that has ended, across a kill of the server and then one of the
/// virtual machine.
#[test]
fn vm_one_server_is_for_several_machines_by_their_names() {
    let _alone = alone();
    let dir = temp();
    let name = common::servers::name(&dir);
    let path = |name: &str| dir.path().join(name);
    let list = [layer(erofs(&dir, "base", &[("a", "base")]))];
    let tables = format!(
        "[vm.far]\nguest = \"qemu\"\n[vm.here]\nguest = \"local\"\n\
         [vm.gone]\nvm = \"qemu:{0}/qmp\"\nagent = \"unix:{0}/agent\"\n",
        dir.path().display()
    );
    let metrics = format!("unix:{}", path("metrics").display());
    let words = ["--metrics", &metrics];
    let mut server = Server::ready_with(&dir, &words, &tables);
    server.wait_for("the virtual machine gone has ended, and is left out");
    let mut client = Client::of(&dir);
    let unsaid = json!({"call": "Activate", "request": {"name": "one", "mounts": list}});
    let refused = client.ask(&unsaid);
    assert_eq!(refused["code"], "INVALID_ARGUMENT");
    let said = refused["details"].as_str().unwrap();
    assert!(said.contains("there are: far, here"), "{said}");

    let far = client.activate_in("far", "one", &list);
    let here = client.activate_in("here", "two", &list);
    client.activate_in("far", "three", &list);
    let scratch = [writable(path("rw.img"))];
    client.activate_in("far", "written", &scratch);
    let file = |points: &[PathBuf]| points.last().unwrap().join("a");
    assert_eq!(std::fs::read_to_string(file(&here)).unwrap(), "base");
    assert!(!file(&far).exists());
    let all = client.call("List", json!({}));
    drop(client);
    let before = runs(&dir);
    let [(vm, id, 3), (other, here_id, 1)] = &before[..] else {
        panic!("{before:?}")
    };
    assert_eq!((&**vm, &**other), ("far", "here"));
    let text = run(["status", "--name", &name]).stdout;
    let heads = ["far", "here"].map(|vm| format!("serve {name}, vm {vm}:"));
    let text = text.replace("\n  ", " ");
    assert!(heads.iter().all(|head| text.contains(head)), "{text}");
    let series = get(&path("metrics"), "/metrics");
    for series_of in [
        "activations{vm=\"far\",namespace=\"default\"} 3",
        "activations{vm=\"here\",namespace=\"default\"} 1",
        "slots{vm=\"far\",transport=\"scsi\",usage=\"occupied\"} 2",
        "step_duration_seconds_count{vm=\"here\",step=\"attach\"} 1",
        "vm_up{vm=\"far\"} 1",
    ] {
        assert!(series.contains(series_of), "{series_of}: {series}");
    }
    let page = get(&path("metrics"), "/");
    assert!(page.contains("<h2>VM far</h2>") && page.contains("<h2>VM here</h2>"));

    server.kill();
    let kept = run(["cleanup", "--dry-run"]);
    let advice = format!("blockmount serve --log-format json --name {name} --config ");
    assert_eq!(kept.stdout.matches(&advice).count(), 2, "{kept}");
    in_guest(id, async |checker| {
        let tree = checker.tree(far.last().unwrap()).await.unwrap();
        assert_eq!(tree.compare(&tree).files, 1);
    });
    let mut server = Server::ready_with(&dir, &words, &tables);
    let mut client = Client::of(&dir);
    assert_eq!(client.call("List", json!({})), all);
    assert_eq!(runs(&dir), before);
    client.deactivate("three");
    client.deactivate("two");
    assert_eq!(in_kernel(here_id), Vec::<String>::new());

    // The others are served for as long as one is there.
    signal(machine_in(id), Signal::KILL);
    server.wait_for("what is activated in the virtual machine far is lost");
    let series = get(&path("metrics"), "/metrics");
    assert!(series.contains("vm_up{vm=\"far\"} 0"), "{series}");
    assert!(get(&path("metrics"), "/").contains("<strong>lost</strong>"));
    let status = run(["status", "--json", "--name", &name]).json();
    let is_lost = |run: &Value| run["lost"].is_string();
    let lost: Vec<bool> = status["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(is_lost)
        .collect();
    assert_eq!(lost, [true, false]);
    let text = run(["status", "--name", &name]).stdout;
    assert_eq!(
        text.matches("\n  lost: ").count() + text.matches("\nlost: ").count(),
        1,
        "{text}"
    );
    signal(server.pid(), Signal::HUP);
    server.wait_for("far is lost, and is not replaced: 2 activated");
    client.activate_in("here", "three", &list);
    client.deactivate("three");
    // What it shared is not handed out any more.
    let request = json!({"name": "four", "mounts": list, "labels": {"blockmount.vm": "far"}});
    let refused = client.ask(&json!({"call": "Activate", "request": request}));
    assert_eq!(refused["code"], "UNAVAILABLE", "{refused}");
    // What was written there is lost with it, and then it is gone.
    let request = json!({"call": "Deactivate", "request": {"name": "written"}});
    for code in ["DATA_LOSS", "NOT_FOUND"] {
        let refused = client.ask(&request);
        assert_eq!(refused["code"], code, "{refused}");
    }
    let lost = client.call("Info", json!({"name": "one"}));
    assert_eq!(lost["info"]["labels"], json!({"blockmount.vm": "far"}));
    drop(client);
    server.end().says(0, &["1 activated, which stay"]);
    // Nothing is left of the one in which nothing is activated.
    let directory = |id: &str| PathBuf::from(format!("/run/blockmount/{id}"));
    assert!(!directory(here_id).exists() && directory(id).exists());
    // The next server has another one in the place of what is lost, and says so.
    let mut server = Server::ready_with(&dir, &words, &tables);
    let said = server.wait_for("the virtual machine far of the earlier server has ended");
    assert!(said.contains("is lost: default/one;"), "{said}");
    assert!(!directory(id).exists());
    let mut client = Client::of(&dir);
    assert_eq!(client.call("List", json!({})), json!([]));
    client.activate_in("far", "one", &list);
    client.deactivate("one");
    let now = runs(&dir);
    an_image_is_written_to_in_one_place(&mut client, &dir, machine_in(&now[0].1));
    // Nothing is lost with it, and another one is there for who asks.
    signal(machine_in(&now[0].1), Signal::KILL);
    server.wait_for("far is lost, in which nothing is activated");
    signal(server.pid(), Signal::HUP);
    server.wait_for("far is served from now on");
    assert!(!directory(&now[0].1).exists());
    client.activate_in("far", "one", &list);
    client.deactivate("one");
    let then = runs(&dir);
    // One that has died is no reason to leave something at the end.
    signal(machine_in(&then[0].1), Signal::KILL);
    server.wait_for("far is lost, in which nothing is activated");
    drop(client);
    server.end().says(0, &[]);
    let ids = now.iter().chain(&then).map(|(_, id, _)| id);
    for id in ids.chain([id, here_id]) {
        assert_eq!(machines_of(id), Vec::<String>::new());
        assert!(!directory(id).exists());
    }
}

/// Whichever comes first has it, and the other is told who has.
fn an_image_is_written_to_in_one_place(client: &mut Client, dir: &TempDir, machine: u32) {
    let image = dir.path().join("volume.img");
    let directory = "X-containerd.mkdir.path={{ mount 0 }}/upper:0755";
    let tree = mount(
        "format/mkdir/bind",
        "{{ mount 0 }}/upper",
        &[directory, "rw", "rbind"],
    );
    let list = [writable(&image), tree];
    let machine = format!("process {machine} (qemu-system-");
    for (first, second, holder) in [("far", "here", &*machine), ("here", "far", "/dev/loop")] {
        client.activate_in(first, "first", &list);
        assert_in_use(client, second, &list, &image, holder);
        client.deactivate("first");
        client.activate_in(second, "second", &list);
        client.deactivate("second");
    }
}

/// A list with an image that is written to is refused in a machine, since somebody else has the image.
fn assert_in_use(client: &mut Client, vm: &str, list: &[Value], image: &Path, holder: &str) {
    let request = json!({"name": "refused", "mounts": list, "labels": {"blockmount.vm": vm}});
    let refused = client.ask(&json!({"call": "Activate", "request": request}));
    assert_eq!(refused["code"], "FAILED_PRECONDITION", "{refused}");
    let said = refused["details"].as_str().unwrap();
    let in_use = format!("{} is in use by {holder}", image.display());
    assert!(said.contains(&in_use), "{said}");
}

#[test]
fn vm_one_server_is_for_two_machines_of_others_and_leaves_one_out_when_it_is_told() {
    let _alone = alone();
    let dir = temp();
    let mut machines = [(); 2].map(|()| ForeignMachine::start());
    let before = machines.each_ref().map(ForeignMachine::tables);
    let table = |name: &str, machine: &ForeignMachine| {
        let (monitor, agent) = (machine.at("qmp"), machine.at("agent"));
        let (monitor, agent) = (monitor.display(), agent.display());
        format!("[vm.{name}]\nvm = \"qemu:{monitor}\"\nagent = \"unix:{agent}\"\n")
    };
    let [east, west] = ["east", "west"];
    let tables = [table(east, &machines[0]), table(west, &machines[1])].concat();
    let server = Server::ready_with(&dir, &[], &tables);
    let mut client = Client::of(&dir);
    let base = layer(erofs(&dir, "base", &[("a", "base")]));
    let image = dir.path().join("rw.img");
    let scratch = writable(&image);
    let active = [scratch, base.clone(), overlay(1)];
    let points = [
        client.activate_in(east, "one", &active),
        client.activate_in(west, "two", &[base]),
    ];
    let holder = format!("process {} (qemu-system-", machines[0].pid());
    assert_in_use(&mut client, west, &active, &image, &holder);
    let all = client.call("List", json!({}));
    drop(client);
    let held = |(vm, _, count): (String, String, usize)| (vm, count);
    let held: Vec<_> = runs(&dir).into_iter().map(held).collect();
    assert_eq!(held, [(east.to_owned(), 1), (west.to_owned(), 1)]);
    server.kill();
    for (machine, points) in machines.iter().zip(&points) {
        let tree = points.last().unwrap();
        let (names, _) = machine.ask(async |checker| checker.names(tree, 9).await.unwrap());
        assert_eq!(names, ["a"]);
    }

    let mut server = Server::ready_with(&dir, &[], &tables);
    let mut client = Client::of(&dir);
    assert_eq!(client.call("List", json!({})), all);
    client.deactivate("two");
    machines[1].assert_guest_as(&before[1]);
    let file = dir.path().join("serve.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace(&table(west, &machines[1]), "");
    std::fs::write(&file, text).unwrap();
    signal(server.pid(), Signal::HUP);
    server.wait_for("machine west is not served any more");
    machines[1].assert_as(&before[1]);
    assert!(machines[1].is_alive());
    // The last one that it is for.
    signal(machines[0].pid(), Signal::KILL);
    let said = server.wait();
    said.says(
        1,
        &["what is activated in the virtual machine east is lost"],
    );
    let tables = [&table(east, &machines[0]), "[vm.here]\nguest = \"local\"\n"].concat();
    let mut server = Server::ready_with(&dir, &[], &tables);
    server.wait_for("east has ended, and is left out, with what was activated in it (default/one)");
    server.end().says(0, &[]);
    // Nobody can tell that its machine does not come back.
    run(["cleanup", "--resumable"]).says(0, &[]);
    assert!(runs(&dir).is_empty());
}
