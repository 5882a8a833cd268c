//! Activations on loop devices: many at once, clients that go, restarts, names.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use blockmount::Recovery;
use blockmount_containerd::service::{Activate, Activations, Filter, Info, Options};
use blockmount_containerd::{Mount, plan};
use blockmount_journal::FileJournal;
use tonic::{Code, Status};

use crate::kit::{Machine, READY, layer, overlay, read, run, writable};

/// How long an event may take on a machine that is busy.
const TIMEOUT: Duration = Duration::from_secs(60);

impl Machine {
    pub(crate) fn options(&self) -> Options {
        Options::new(self.root(), self.at("activations"))
    }

    pub(crate) async fn recovery(&self) -> Recovery {
        let journal = FileJournal::open(self.at("journal")).unwrap();
        self.builder().await.recover(journal).await.unwrap()
    }

    async fn recover(&self, options: Options) -> Activations {
        let recovery = self.recovery().await;
        Activations::recover(recovery, options).await.unwrap()
    }

    pub(crate) async fn activations(&self) -> Activations {
        self.recover(self.options()).await
    }

    /// As [`assert_clean`](Self::assert_clean), and no record is left.
    pub(crate) fn assert_all_clean(&self) {
        let records = fs::read_dir(self.at("activations")).unwrap();
        assert_eq!(records.count(), 0);
        self.assert_clean();
    }
}

pub(crate) fn request(name: &str, mounts: &[Mount]) -> Activate {
    Activate {
        namespace: "default".to_owned(),
        name: name.to_owned(),
        mounts: mounts.to_vec(),
        ..Activate::default()
    }
}

pub(crate) fn tree(info: &Info) -> PathBuf {
    info.active.last().unwrap().mount_point.clone()
}

pub(crate) fn listed(activations: &Activations) -> Vec<Info> {
    activations.list("default", &Filter::default()).unwrap()
}

pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code) -> String {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    status.message().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_hundred_activations_at_once_share_their_layers() {
    let machine = Machine::new();
    let layers: Vec<Mount> = (0..8)
        .map(|n| layer(&machine.erofs(&format!("layer{n}"), &[("who", &n.to_string())])))
        .collect();
    let activations = machine.activations().await;
    let list = |n: usize| {
        let first = writable(&machine.at(&format!("rw{n}.img")));
        [vec![first], layers.clone(), vec![overlay(8)]].concat()
    };
    let requests = (0..100).map(|n| request(&n.to_string(), &list(n)));
    let activating = requests.map(|request| {
        tokio::spawn({
            let activations = activations.clone();
            async move { activations.activate(request).await.unwrap() }
        })
    });
    let mut infos = Vec::new();
    for activated in activating.collect::<Vec<_>>() {
        infos.push(activated.await.unwrap());
    }
    for info in &infos {
        let who = tree(info).join("who");
        assert_eq!(read(&who), "0");
        fs::write(who, &info.name).unwrap();
        // The words of the answer are about what is there.
        let lower: Vec<_> = info.active[1..9]
            .iter()
            .map(|layer| layer.mount_point.to_str().unwrap())
            .collect();
        let lower = format!("lowerdir={}", lower.join(":"));
        assert!(info.active[9].mount.options.contains(&lower), "{info:?}");
    }
    assert!(
        infos
            .iter()
            .all(|info| read(tree(info).join("who")) == info.name)
    );
    // 8 layers, 100 scratch disks and 100 trees.
    let (mounts, loops) = machine.left();
    assert_eq!((mounts.len(), loops), (208, 108));
    activations.deactivate_all().await.unwrap();
    assert_eq!(listed(&activations), []);
    machine.assert_all_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_client_that_goes_has_activated_nothing() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let activations = machine.activations().await;
    for micros in [0, 1, 500, 2_000, 5_000, 10_000, 20_000] {
        let image = machine.at("rw.img");
        let list = [writable(&image), layer(&base), overlay(1)];
        let activating = activations.activate(request("one", &list));
        let gone = tokio::time::timeout(Duration::from_micros(micros), activating).await;
        // Behind it in the order.
        let after = activations.deactivate("default", "one").await;
        match gone {
            Ok(activated) => {
                activated.unwrap();
                after.unwrap();
            }
            Err(_) => assert_eq!(refused(after, Code::NotFound), "there is no mount one"),
        }
        machine.assert_all_clean();
    }
}

#[tokio::test]
async fn root_a_name_has_one_activation_in_its_namespace() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let activations = machine.activations().await;
    let mut one = request("one", &[layer(&base)]);
    let labels = [("containerd.io/gc.bref.container", "c1"), ("x", "1")];
    one.labels = labels
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    let info = activations.activate(one.clone()).await.unwrap();
    assert_eq!((&info.labels, &info.name), (&one.labels, &one.name));
    assert_eq!(info.active[0].mount, layer(&base));
    refused(activations.activate(one.clone()).await, Code::AlreadyExists);
    let mut other = one.clone();
    other.namespace = "k8s.io".to_owned();
    other.temporary = true;
    let info = activations.activate(other).await.unwrap();
    let source = tree(&info).to_str().unwrap().to_owned();
    assert_eq!(info.system, [Mount::new("bind", source).option("rbind")]);
    for (namespace, name) in [("default", "two"), ("none", "one")] {
        refused(activations.info(namespace, name), Code::NotFound);
        refused(
            activations.deactivate(namespace, name).await,
            Code::NotFound,
        );
    }
    refused(activations.info("", "one"), Code::InvalidArgument);
    let by_label = Filter::parse([r#"labels."containerd.io/gc.bref.container"==c1"#]).unwrap();
    assert_eq!(activations.list("default", &by_label).unwrap().len(), 1);
    assert_eq!(activations.list("none", &by_label).unwrap(), []);

    let new = |value: &str| [("x".to_owned(), value.to_owned())].into();
    let fields = |fields: &[&str]| fields.iter().map(|field| (*field).to_owned()).collect();
    let updated = activations
        .update("default", "one", new("2"), fields(&["labels.x"]))
        .await
        .unwrap();
    assert_eq!(
        (updated.labels.len(), updated.labels["x"].as_str()),
        (2, "2")
    );
    let updated = activations
        .update("default", "one", new("3"), fields(&["labels"]))
        .await
        .unwrap();
    assert_eq!(updated.labels, new("3"));
    refused(
        activations
            .update("default", "one", new("4"), fields(&["name"]))
            .await,
        Code::InvalidArgument,
    );
    assert_eq!(activations.info("default", "one").unwrap(), updated);
    activations.deactivate_all().await.unwrap();
    machine.assert_all_clean();
}

#[tokio::test]
async fn root_what_is_in_use_stays_until_it_is_deactivated_again() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let activations = machine.activations().await;
    let list = [writable(&machine.at("rw.img")), layer(&base), overlay(1)];
    let info = activations.activate(request("one", &list)).await.unwrap();
    let user = File::open(tree(&info).join("a")).unwrap();
    refused(
        activations.deactivate("default", "one").await,
        Code::FailedPrecondition,
    );
    assert_eq!(listed(&activations), [info]);
    // The layers below it are shared on; what cannot be unmounted itself is not.
    let two = request("two", &[layer(&base)]);
    let info = activations.activate(two).await.unwrap();
    drop(user);
    activations.deactivate("default", "one").await.unwrap();
    let user = File::open(tree(&info).join("a")).unwrap();
    let three = request("three", &[layer(&base)]);
    refused(
        activations.deactivate("default", "two").await,
        Code::FailedPrecondition,
    );
    let message = refused(
        activations.activate(three.clone()).await,
        Code::FailedPrecondition,
    );
    assert!(message.contains("mount 0 of the list"), "{message}");
    drop(user);
    activations.activate(three).await.unwrap();
    activations.deactivate_all().await.unwrap();
    machine.assert_all_clean();
}

#[tokio::test]
async fn root_an_overlay_with_directories_of_this_host_is_left_to_the_caller_who_can_mount_it() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let paths = ["upper", "work", "tree"].map(|name| machine.at(name));
    for path in &paths {
        fs::create_dir(path).unwrap();
    }
    let [upper, work, target] = paths;
    let mixed = Mount::new("format/overlay", "overlay")
        .option(format!("upperdir={}", upper.display()))
        .option(format!("workdir={}", work.display()))
        .option("lowerdir={{ mount 0 }}");
    let list = [layer(&base), mixed];
    let elsewhere = plan(&list, &machine.root()).unwrap_err();
    assert!(elsewhere.reason.contains("is on the host"), "{elsewhere}");
    let activations = machine.recover(machine.options().here()).await;
    let info = activations.activate(request("one", &list)).await.unwrap();
    let [left] = &info.system[..] else {
        panic!("{info:?}")
    };
    assert_eq!((&*left.kind, info.active.len()), ("overlay", 1));
    let mut mount = Command::new("mount");
    mount.args(["-t", "overlay", "-o", &left.options.join(","), "overlay"]);
    run(mount.arg(&target));
    let seen = read(target.join("a"));
    let written = fs::write(target.join("b"), "new");
    run(Command::new("umount").arg(&target));
    written.unwrap();
    assert_eq!((seen, read(upper.join("b"))), ("base".into(), "new".into()));
    activations.deactivate("default", "one").await.unwrap();
    machine.assert_all_clean();
}

/// Not a test: the process that the next ones kill.
#[tokio::test]
#[ignore = "the process that tests start and kill"]
async fn process_that_is_killed() {
    let machine = Machine::of_parent();
    let activations = machine.activations().await;
    let base = layer(&machine.at("base.erofs"));
    let list = |name: &str| [writable(&machine.at(name)), base.clone(), overlay(1)];
    let one = request("one", &list("1.img"));
    let one = activations.activate(one).await.unwrap();
    fs::write(tree(&one).join("file"), "kept").unwrap();
    let two = request("two", std::slice::from_ref(&base));
    activations.activate(two).await.unwrap();
    let temporary = Activate {
        temporary: true,
        ..request("three", &list("3.img"))
    };
    activations.activate(temporary).await.unwrap();
    println!("{READY}");
    std::future::pending().await
}

const PROCESS: &str = "activations::process_that_is_killed";

#[tokio::test]
async fn root_the_next_process_has_what_a_killed_one_had_activated() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    machine.kill_once_ready(PROCESS);
    let activations = machine.activations().await;
    let [one, two] = <[Info; 2]>::try_from(listed(&activations)).unwrap();
    assert_eq!((one.name.as_str(), two.name.as_str()), ("one", "two"));
    assert_eq!(read(tree(&one).join("file")), "kept");
    assert_eq!(two.active[0].mount, layer(&base));
    let again = activations.activate(request("one", &[layer(&base)])).await;
    refused(again, Code::AlreadyExists);
    let new = activations
        .activate(request("three", &[layer(&base)]))
        .await;
    assert_eq!(tree(&new.unwrap()), tree(&two));
    activations.deactivate_all().await.unwrap();
    machine.assert_all_clean();
}

#[tokio::test]
async fn root_an_activation_that_has_lost_a_mount_is_no_activation_any_more() {
    let machine = Machine::new();
    machine.erofs("base", &[("a", "base")]);
    machine.kill_once_ready(PROCESS);
    let (mounts, _) = machine.left();
    let overlay = mounts.iter().find(|point| point.ends_with("0/2")).unwrap();
    rustix::mount::unmount(overlay, rustix::mount::UnmountFlags::empty()).unwrap();
    let activations = machine.activations().await;
    let two = &listed(&activations)[..];
    assert_eq!(two.len(), 1);
    assert_eq!(two[0].name, "two");
    activations.deactivate("default", "two").await.unwrap();
    machine.assert_all_clean();
}

#[tokio::test]
async fn root_what_no_client_asks_for_is_released_after_the_grace_period() {
    let machine = Machine::new();
    machine.erofs("base", &[("a", "base")]);
    machine.kill_once_ready(PROCESS);
    let grace = Duration::from_secs(1);
    let activations = machine.recover(machine.options().grace(grace)).await;
    let asked = activations.info("default", "two").unwrap();
    assert_eq!(listed(&activations).len(), 2);
    let released = async {
        while listed(&activations).len() > 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, released).await.unwrap();
    assert_eq!(listed(&activations), [asked]);
    activations.deactivate("default", "two").await.unwrap();
    machine.assert_all_clean();
}

#[tokio::test]
async fn root_what_was_left_to_the_next_process_takes_no_calls() {
    let machine = Machine::new();
    let activations = machine.activations().await;
    let base = machine.erofs("base", &[("a", "base")]);
    let list = [writable(&machine.at("rw.img")), layer(&base), overlay(1)];
    let temporary = Activate {
        temporary: true,
        ..request("zero", &list)
    };
    activations.activate(temporary).await.unwrap();
    // What is temporary is not left.
    assert_eq!(activations.leave().await, []);
    machine.assert_all_clean();
    let late = activations.activate(request("one", &[layer(&base)])).await;
    refused(late, Code::Unavailable);
    machine.assert_all_clean();
}

#[tokio::test]
async fn root_bad_input_is_refused_and_leaves_nothing() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let activations = machine.activations().await;
    let format = |option: String| {
        vec![
            layer(&base),
            Mount::new("format/overlay", "overlay").option(option),
        ]
    };
    for (list, code, said) in [
        (Vec::new(), Code::Unimplemented, "nothing in the list"),
        (
            vec![Mount::new("tmpfs", "tmpfs")],
            Code::Unimplemented,
            "nothing in the list",
        ),
        (
            format("{{ mount 0 }}".repeat(90_000)),
            Code::InvalidArgument,
            "mount 1 of the list",
        ),
        (
            format("lowerdir={{ mount 1 }}".to_owned()),
            Code::InvalidArgument,
            "names mount 1",
        ),
        (
            format("lowerdir={{ mount 99999999999999999999 }}".to_owned()),
            Code::InvalidArgument,
            "no number",
        ),
        (
            vec![layer(&base).option("a\nb")],
            Code::InvalidArgument,
            "control character",
        ),
        (
            vec![layer(&base); 10_000],
            Code::InvalidArgument,
            "10000 mounts",
        ),
        (
            vec![layer(&base).option("x".repeat(2 << 20))],
            Code::InvalidArgument,
            "bytes",
        ),
        (
            vec![layer(&machine.at("none"))],
            Code::FailedPrecondition,
            "mount 0",
        ),
        (
            vec![layer(&machine.at(""))],
            Code::InvalidArgument,
            "mount 0",
        ),
    ] {
        let message = refused(activations.activate(request("one", &list)).await, code);
        assert!(message.contains(said), "{message}");
        assert!(
            message.len() < 8 << 10 && !message.contains('\n'),
            "{message}"
        );
        machine.assert_all_clean();
    }
    let long = "x".repeat(5000);
    for (namespace, name) in [
        ("", "a"),
        ("a/b", "a"),
        ("a", ""),
        ("a", "a\nb"),
        ("a", &long),
    ] {
        let request = Activate {
            namespace: namespace.to_owned(),
            ..request(name, &[layer(&base)])
        };
        refused(activations.activate(request).await, Code::InvalidArgument);
    }
    let labels = [(long.clone(), String::new())].into();
    let request = Activate {
        labels,
        ..request("one", &[layer(&base)])
    };
    refused(activations.activate(request).await, Code::InvalidArgument);
    machine.assert_all_clean();
}

#[tokio::test]
async fn root_labels_that_are_too_many_are_refused_before_a_restart_would_lose_them() {
    let machine = Machine::new();
    let base = machine.erofs("base", &[("a", "base")]);
    let activations = machine.activations().await;
    activations
        .activate(request("one", &[layer(&base)]))
        .await
        .unwrap();
    let of = |from: usize| -> BTreeMap<String, String> {
        let label = |n| (format!("n{n}"), "x".repeat(4000));
        (from..from + 200).map(label).collect()
    };
    let fields = |labels: &BTreeMap<String, String>| -> Vec<String> {
        labels.keys().map(|key| format!("labels.{key}")).collect()
    };
    let first = of(0);
    let updated = activations.update("default", "one", first.clone(), fields(&first));
    assert_eq!(updated.await.unwrap().labels, first);
    let second = of(200);
    let added = activations.update("default", "one", second.clone(), fields(&second));
    let message = refused(added.await, Code::InvalidArgument);
    assert!(message.contains("1,048,576 bytes together"), "{message}");
    let info = activations.info("default", "one").unwrap();
    assert_eq!(info.labels, first);
    activations.deactivate("default", "one").await.unwrap();
    machine.assert_all_clean();
}
