//! One mount, seen at many places.

use crate::common::{calls, clean, layer, ro, rw, scratch, vm};
use blockmount::testing::{Gate, VmStep};
use blockmount::{
    ErrorKind, Expose, Manager, MountOptions, MountRequest, StackRequest, Step, ViewOptions,
    ViewRequest,
};

fn options<const N: usize>(options: [&str; N]) -> ViewOptions {
    ViewOptions::new(options).unwrap()
}

fn at<const N: usize>(target: &str, names: [&str; N]) -> ViewRequest {
    ViewRequest::new(target, options(names))
}

#[tokio::test(start_paused = true)]
async fn u15_one_volume_is_seen_in_several_ways_at_once() {
    let (vm, manager) = vm();
    let volume = manager.add(&scratch(0), &rw()).await.unwrap();
    let writer = manager.view(&volume, &at("/c1/data", [])).await.unwrap();
    let reader = at("/c2/data", ["ro", "noexec"]);
    let reader = manager.view(&volume, &reader).await.unwrap();
    let part = ViewRequest::new("/c3/logs", options([]).with_subpath("logs").unwrap());
    let part = manager.view(&volume, &part).await.unwrap();
    assert_eq!(calls(&vm, [VmStep::Mount, VmStep::Bind]), [1, 3]);
    assert_eq!(reader.mount(), Some(volume.point()));
    assert_eq!(reader.source(), volume.path());
    assert!(reader.options().is_read_only() && !writer.options().is_read_only());
    // The views keep the mount, also when whoever made them has released it.
    volume.release().await.unwrap();
    assert_eq!(vm.calls(VmStep::Unmount), 0);
    for view in [writer, reader, part] {
        assert_eq!(vm.calls(VmStep::Unmount), 0);
        view.release().await.unwrap();
    }
    assert_eq!(
        calls(&vm, [VmStep::Unbind, VmStep::Unmount, VmStep::Detach]),
        [3, 1, 1]
    );
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn u15_equal_requests_share_a_view_and_others_conflict() {
    let (vm, manager) = vm();
    let volume = manager.add(&scratch(0), &rw()).await.unwrap();
    let other = manager.add(&layer(1), &ro()).await.unwrap();
    let request = at("/c1/data", ["ro"]);
    let one = manager.view(&volume, &request).await.unwrap();
    let two = manager.view(&volume, &request).await.unwrap();
    assert_eq!(vm.calls(VmStep::Bind), 1);
    for (mount, request) in [
        (&volume, at("/c1/data", [])),
        (&other, request.clone()),
        (&volume, at("/c1/data/below", ["ro"])),
        (&volume, at("/c1", ["ro"])),
    ] {
        let error = manager.view(mount, &request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert_eq!(error.step(), Step::Bind, "{error}");
    }
    // Nor can anything else be there.
    let disk = manager.add(&layer(2), &ro().at("/c1/data")).await;
    assert_eq!(disk.unwrap_err().kind(), ErrorKind::Conflict);
    let stack = StackRequest::new("/c1/data").layer(layer(2), ro());
    let stack = manager.stack(&stack).await;
    assert_eq!(stack.unwrap_err().kind(), ErrorKind::Conflict);
    one.release().await.unwrap();
    assert_eq!(vm.calls(VmStep::Unbind), 0);
    two.release().await.unwrap();
    assert_eq!(vm.calls(VmStep::Unbind), 1);
    let again = manager.view(&other, &at("/c1/data", [])).await.unwrap();
    for released in [again.release().await, volume.release().await] {
        released.unwrap();
    }
    other.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn u15_a_view_in_use_keeps_everything_below_it() {
    let (vm, manager) = vm();
    let volume = manager.add(&scratch(0), &rw()).await.unwrap();
    let view = manager.view(&volume, &at("/c1", [])).await.unwrap();
    volume.release().await.unwrap();
    vm.gate_next(VmStep::Unbind, 1, Gate::Err(ErrorKind::Busy));
    let busy = view.release().await.unwrap_err();
    assert_eq!((busy.kind(), vm.left().len()), (ErrorKind::Busy, 3));
    busy.retry().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn u15_a_view_that_cannot_be_made_leaves_its_mount_as_it_was() {
    for (gate, kind) in [
        (Gate::Err(ErrorKind::NotFound), ErrorKind::NotFound),
        (Gate::Uncertain { happened: true }, ErrorKind::Uncertain),
        (Gate::Uncertain { happened: false }, ErrorKind::Uncertain),
        (Gate::Panic { happened: true }, ErrorKind::Uncertain),
    ] {
        let (vm, manager) = vm();
        let volume = manager.add(&scratch(0), &rw()).await.unwrap();
        let before = vm.left();
        vm.gate_next(VmStep::Bind, 1, gate);
        let error = manager.view(&volume, &at("/c1", [])).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(vm.left(), before);
        let view = manager.view(&volume, &at("/c1", [])).await.unwrap();
        view.release().await.unwrap();
        volume.release().await.unwrap();
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn u15_a_caller_that_gives_up_leaves_no_view() {
    let (vm, manager) = vm();
    let volume = manager.add(&scratch(0), &rw()).await.unwrap();
    vm.delay(VmStep::Bind, std::time::Duration::from_secs(1));
    crate::common::begin(manager.view(&volume, &at("/c1", []))).await;
    volume.release().await.unwrap();
    clean(&vm, &manager).await;
    assert_eq!(vm.calls(VmStep::Bind), vm.calls(VmStep::Unbind));
}

#[tokio::test(start_paused = true)]
async fn u15_views_need_a_filesystem_and_a_binder() {
    let (vm, manager) = vm();
    let exposed = MountOptions::builder().expose(Expose::BlockDevice).build();
    let exposed = MountRequest::new(exposed.unwrap());
    let device = manager.add(&scratch(0), &exposed).await.unwrap();
    let error = manager.view(&device, &at("/c1", [])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    device.release().await.unwrap();
    let without = Manager::builder()
        .transport(vm.clone())
        .unplugger(vm.clone())
        .mounter(vm.clone())
        .build();
    let volume = without.add(&scratch(0), &rw()).await.unwrap();
    let error = without.view(&volume, &at("/c1", [])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable);
    volume.release().await.unwrap();
    clean(&vm, &without).await;
}

#[tokio::test(start_paused = true)]
async fn u15_a_tree_of_a_stack_is_seen_at_several_places() {
    let (vm, manager) = vm();
    let request = StackRequest::new("/tree").layer(layer(0), ro());
    let request = request.scratch(scratch(1), rw());
    let stack = manager.stack(&request).await.unwrap();
    let reader = at("/c1/tree", ["ro", "nosuid"]);
    let reader = manager.view(&stack, &reader).await.unwrap();
    let part = ViewRequest::new("/c2/etc", options([]).with_subpath("etc").unwrap());
    let part = manager.view(&stack, &part).await.unwrap();
    assert_eq!((reader.source(), reader.mount()), (stack.target(), None));
    let gone = ViewRequest::new("/c3", options([]).with_subpath("missing").unwrap());
    let error = manager.view(&stack, &gone).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    // A view of one of its layers is another's, and as good.
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    let below = manager.view(&mount, &at("/c4", [])).await.unwrap();
    mount.release().await.unwrap();
    // The views keep the tree, and all that is below it.
    stack.release().await.unwrap();
    assert_eq!(calls(&vm, [VmStep::Separate, VmStep::Unmount]), [0, 0]);
    let again = manager.stack(&request).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Conflict);
    part.release().await.unwrap();
    below.release().await.unwrap();
    assert_eq!(calls(&vm, [VmStep::Unbind, VmStep::Separate]), [2, 0]);
    vm.gate_next(VmStep::Unbind, 1, Gate::Err(ErrorKind::Busy));
    let before = vm.left();
    let busy = reader.release().await.unwrap_err();
    assert_eq!((busy.kind(), vm.left()), (ErrorKind::Busy, before));
    busy.retry().await.unwrap();
    assert_eq!(calls(&vm, [VmStep::Separate, VmStep::Detach]), [1, 2]);
    clean(&vm, &manager).await;
}
