//! One service for several machines with names, each of which is a set of loop devices here.

use std::collections::BTreeMap;
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use blockmount_containerd::Mount;
use blockmount_containerd::service::{Activate, Activations, Filter, Options, VM_LABEL, VmName};
use tonic::Code;

use crate::activations::{listed, refused, request, tree};
use crate::kit::{Machine, READY, layer, read};

/// How long an event may take on a machine that is busy.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A service for these, by their names.
async fn serve(vms: &[(&str, &Machine)]) -> Result<Activations, BackendError> {
    let with_options = vms.iter().map(|(name, vm)| (*name, *vm, vm.options()));
    serve_with(with_options.collect()).await
}

async fn serve_with(vms: Vec<(&str, &Machine, Options)>) -> Result<Activations, BackendError> {
    let mut left = Vec::new();
    for (name, vm, options) in vms {
        let name: VmName = name.parse().unwrap();
        left.push((name, vm.recovery().await, options));
    }
    Activations::recover_in_vms(left).await
}

fn labels(vm: &str) -> BTreeMap<String, String> {
    [(VM_LABEL.to_owned(), vm.to_owned())].into()
}

fn within(vm: &str, name: &str, mounts: &[Mount]) -> Activate {
    Activate {
        labels: labels(vm),
        ..request(name, mounts)
    }
}

fn vms_of(machine: &Machine) -> (Machine, Machine) {
    (machine.one_of_several("a"), machine.one_of_several("b"))
}

#[tokio::test]
async fn root_a_label_says_in_which_machine_a_list_is_activated() {
    let machine = Machine::new();
    let (a, b) = vms_of(&machine);
    let list = [layer(&machine.erofs("base", &[("a", "base")]))];
    let activations = serve(&[("b", &b), ("a", &a)]).await.unwrap();
    let unsaid = activations.activate(request("one", &list)).await;
    let message = refused(unsaid, Code::InvalidArgument);
    assert!(
        message.contains(VM_LABEL) && message.contains("there are: a, b"),
        "{message}"
    );
    let unknown = activations.activate(within("c\n", "one", &list)).await;
    let message = refused(unknown, Code::InvalidArgument);
    assert!(
        message.contains("c\\n") && message.contains("there are: a, b"),
        "{message}"
    );
    assert_eq!((a.left().1, b.left().1), (0, 0));

    let one = activations
        .activate(within("a", "one", &list))
        .await
        .unwrap();
    assert_eq!(one.labels, labels("a"));
    assert_eq!(read(tree(&one).join("a")), "base");
    assert_eq!((a.left().1, b.left().1), (1, 0));
    // A name is in one of them only.
    let taken = activations.activate(within("b", "one", &list)).await;
    refused(taken, Code::AlreadyExists);
    let two = activations
        .activate(within("b", "two", &list))
        .await
        .unwrap();
    assert_eq!((a.left().1, b.left().1), (1, 1));
    assert_eq!(listed(&activations), [one.clone(), two.clone()]);
    assert_eq!(activations.info("default", "two").unwrap(), two);
    let filter = Filter::parse([format!("labels.\"{VM_LABEL}\"==b")]).unwrap();
    assert_eq!(activations.list("default", &filter).unwrap(), [two]);
    let status = activations.inspect();
    let places = status.iter().map(|one| (&*one.name, one.vm.as_deref()));
    assert!(places.eq([("one", Some("a")), ("two", Some("b"))]));

    activations.deactivate("default", "one").await.unwrap();
    a.assert_all_clean();
    // It can be anywhere now.
    let one = activations
        .activate(within("b", "one", &list))
        .await
        .unwrap();
    assert_eq!((a.left().1, b.left().1), (0, 1));
    assert_eq!(one.labels, labels("b"));
    // One that is lost has mounts that nobody can use: they are not shared with more.
    let far = "b".parse().unwrap();
    activations.lose_vm(Some(&far), "it has ended");
    activations.lose_vm(Some(&far), "that is known");
    let lost = activations.activate(within("b", "three", &list)).await;
    let message = refused(lost, Code::Unavailable);
    assert_eq!(message, "the virtual machine b is lost: it has ended");
    activations
        .activate(within("a", "three", &list))
        .await
        .unwrap();
    activations.deactivate_all().await.unwrap();
    a.assert_all_clean();
    b.assert_all_clean();
}

#[tokio::test]
async fn root_an_activation_stays_in_its_machine_whatever_its_labels_become() {
    let machine = Machine::new();
    let (a, b) = vms_of(&machine);
    let list = [layer(&machine.erofs("base", &[("a", "base")]))];
    let activations = serve(&[("a", &a), ("b", &b)]).await.unwrap();
    activations
        .activate(within("a", "one", &list))
        .await
        .unwrap();
    let update = async |labels, fields: &[&str]| {
        let fields = fields.iter().map(ToString::to_string).collect();
        activations.update("default", "one", labels, fields).await
    };
    let new: BTreeMap<_, _> = [("k".to_owned(), "v".to_owned())].into();
    let kept: BTreeMap<_, _> = new.clone().into_iter().chain(labels("a")).collect();
    assert_eq!(update(new, &[]).await.unwrap().labels, kept);
    assert_eq!(
        update(kept.clone(), &["labels"]).await.unwrap().labels,
        kept
    );
    let removed = update(BTreeMap::new(), &["labels.blockmount.vm"]).await;
    assert_eq!(removed.unwrap().labels, kept);
    refused(update(labels("b"), &[]).await, Code::InvalidArgument);
    let one = update(labels("b"), &["labels.blockmount.vm"]).await;
    refused(one, Code::InvalidArgument);
    assert_eq!(activations.info("default", "one").unwrap().labels, kept);
    activations.deactivate_all().await.unwrap();
    a.assert_all_clean();
}

#[tokio::test]
async fn root_the_only_machine_needs_no_label_and_a_guest_without_a_name_takes_none() {
    let machine = Machine::new();
    let (a, b) = vms_of(&machine);
    let list = [layer(&machine.erofs("base", &[("a", "base")]))];
    let named = serve(&[("a", &a)]).await.unwrap();
    let one = named.activate(request("one", &list)).await.unwrap();
    assert_eq!(one.labels, labels("a"));
    named.deactivate_all().await.unwrap();
    a.assert_all_clean();
    let nameless = b.activations().await;
    let message = refused(
        nameless.activate(within("b", "one", &list)).await,
        Code::InvalidArgument,
    );
    assert!(message.contains("no name"), "{message}");
    let one = nameless.activate(request("one", &list)).await.unwrap();
    assert_eq!(one.labels, BTreeMap::new());
    let late = nameless.update("default", "one", labels("b"), Vec::new());
    refused(late.await, Code::InvalidArgument);
    nameless.deactivate_all().await.unwrap();
    b.assert_all_clean();
}

/// Not a test: the process that the next ones kill.
#[tokio::test]
#[ignore = "the process that tests start and kill"]
async fn process_that_is_killed() {
    let machine = Machine::of_parent();
    let (a, b) = vms_of(&machine);
    let list = [layer(&machine.at("base.erofs"))];
    let activations = serve(&[("a", &a), ("b", &b)]).await.unwrap();
    for (vm, name) in [("a", "one"), ("b", "two"), ("a", "three")] {
        activations.activate(within(vm, name, &list)).await.unwrap();
    }
    println!("{READY}");
    std::future::pending().await
}

#[tokio::test]
async fn root_the_next_process_finds_each_activation_in_its_machine() {
    let machine = Machine::new();
    let (a, b) = vms_of(&machine);
    let list = [layer(&machine.erofs("base", &[("a", "base")]))];
    machine.kill_once_ready("vms::process_that_is_killed");
    assert_eq!((a.left().1, b.left().1), (1, 1));
    // What is in one of them only is released after a time.
    let grace = Duration::from_secs(1);
    let options = a.options().grace(grace);
    let vms = vec![("a", &a, options), ("b", &b, b.options())];
    let activations = serve_with(vms).await.unwrap();
    let found = listed(&activations);
    let found = found
        .iter()
        .map(|info| (&*info.name, &*info.labels[VM_LABEL]));
    assert!(found.eq([("one", "a"), ("three", "a"), ("two", "b")]));
    let released = async {
        while listed(&activations).len() > 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, released).await.unwrap();
    a.assert_all_clean();
    // What is new has nothing in common with what is there, but the layer.
    let new = activations.activate(within("b", "new", &list)).await;
    assert_eq!(read(tree(&new.unwrap()).join("a")), "base");
    activations.deactivate("default", "new").await.unwrap();
    let two = activations.info("default", "two").unwrap();
    assert_eq!(read(tree(&two).join("a")), "base");
    activations.deactivate("default", "two").await.unwrap();
    b.assert_all_clean();
}

/// Not a test: the process that the next one kills. It serves the machines one by one, so that a name is taken in both.
#[tokio::test]
#[ignore = "the process that tests start and kill"]
async fn process_that_takes_a_name_twice() {
    let machine = Machine::of_parent();
    let (a, b) = vms_of(&machine);
    let list = [layer(&machine.at("base.erofs"))];
    let mut all = Vec::new();
    for (name, vm) in [("a", &a), ("b", &b)] {
        let activations = serve(&[(name, vm)]).await.unwrap();
        activations.activate(request("one", &list)).await.unwrap();
        all.push(activations);
    }
    println!("{READY}");
    std::future::pending().await
}

#[tokio::test]
async fn root_one_name_in_two_machines_is_refused_and_both_stay() {
    let machine = Machine::new();
    let (a, b) = vms_of(&machine);
    machine.erofs("base", &[("a", "base")]);
    machine.kill_once_ready("vms::process_that_takes_a_name_twice");
    let both = serve(&[("a", &a), ("b", &b)]).await.unwrap_err();
    assert_eq!(both.kind(), ErrorKind::Conflict, "{both}");
    assert!(both.to_string().contains("machines a and b"), "{both}");
    assert_eq!((a.left().1, b.left().1), (1, 1));
    for (name, vm) in [("a", &a), ("b", &b)] {
        let activations = serve(&[(name, vm)]).await.unwrap();
        assert_eq!(listed(&activations).len(), 1);
        activations.deactivate_all().await.unwrap();
        vm.assert_all_clean();
    }
}

#[test]
fn names_of_machines_are_words() {
    for name in ["a", "vm-1", "node.local_2"] {
        assert_eq!(name.parse::<VmName>().unwrap().to_string(), name);
    }
    let long = "x".repeat(77);
    for name in ["", "a/b", "a b", "-a", "a..b", &long] {
        assert!(name.parse::<VmName>().is_err(), "{name:?}");
    }
}

#[tokio::test]
async fn root_a_machine_comes_and_goes_while_the_service_goes_on() {
    let machine = Machine::new();
    let (a, b) = vms_of(&machine);
    let list = [layer(&machine.erofs("base", &[("a", "base")]))];
    machine.kill_once_ready("vms::process_that_is_killed");
    let activations = serve(&[("a", &a)]).await.unwrap();
    let names = |activations: &Activations| -> Vec<String> {
        let found = listed(activations).into_iter();
        found.map(|info| info.name).collect()
    };
    let of_b: VmName = "b".parse().unwrap();
    // An earlier process has something of this name in the one that is to come.
    activations
        .activate(within("a", "two", &list))
        .await
        .unwrap();
    let added = activations.add_vm(of_b.clone(), b.recovery().await, b.options());
    let error = added.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("machines a and b"), "{error}");
    assert_eq!(b.left().1, 1);
    activations.deactivate("default", "two").await.unwrap();
    assert_eq!(names(&activations), ["one", "three"]);
    let added = activations.add_vm(of_b.clone(), b.recovery().await, b.options());
    added.await.unwrap();
    assert_eq!(names(&activations), ["one", "three", "two"]);
    let c = machine.one_of_several("c");
    let again = activations.add_vm(of_b.clone(), c.recovery().await, c.options());
    let error = again.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    activations
        .activate(within("b", "four", &list))
        .await
        .unwrap();

    let error = activations.remove_vm(&of_b).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("2 activated"), "{error}");
    let unknown = activations.remove_vm(&"c".parse().unwrap());
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::NotFound);
    // One that is to go takes nothing more, and goes with the last that is in it.
    activations.retire_only(std::slice::from_ref(&of_b));
    let retired = activations.activate(within("b", "five", &list)).await;
    let message = refused(retired, Code::Unavailable);
    assert!(message.contains("b takes nothing more"), "{message}");
    activations.retire_only(&[]);
    let five = activations.activate(within("b", "five", &list));
    five.await.unwrap();
    activations.retire_only(std::slice::from_ref(&of_b));
    let waiting = activations.clone();
    let vacated = tokio::spawn(async move { waiting.vacated().await });
    for name in ["two", "four"] {
        activations.deactivate("default", name).await.unwrap();
    }
    assert!(!vacated.is_finished());
    activations.deactivate("default", "five").await.unwrap();
    let vacated = tokio::time::timeout(TIMEOUT, vacated);
    assert_eq!(vacated.await.unwrap().unwrap(), of_b);
    b.assert_all_clean();
    let gone = activations.activate(within("b", "five", &list)).await;
    let message = refused(gone, Code::InvalidArgument);
    assert!(message.contains("there are: a"), "{message}");
    activations.deactivate_all().await.unwrap();
    let last = activations.remove_vm(&"a".parse().unwrap());
    assert_eq!(last.unwrap_err().kind(), ErrorKind::Invalid);
    a.assert_all_clean();

    // One guest without a name is all that its service is for.
    let d = machine.one_of_several("d");
    let nameless = d.activations().await;
    let added = nameless.add_vm(of_b, c.recovery().await, c.options());
    assert_eq!(added.await.unwrap_err().kind(), ErrorKind::Conflict);
}
