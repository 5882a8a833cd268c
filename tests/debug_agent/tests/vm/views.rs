//! One volume at many places of a real guest.

use std::path::Path;

use blockmount::{
    BindMount, Binder, ErrorKind, IdMap, MountRequest, Presence, ViewOptions, ViewRequest,
};
use serde_json::{Value, json};

use crate::rig::Rig;

fn options(names: &[&str]) -> ViewOptions {
    ViewOptions::new(names.iter().copied()).unwrap()
}

fn write(path: &Path, text: &str) -> Value {
    json!({ "write": { "path": path, "content": text } })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u15_a_volume_is_writable_in_one_container_and_read_only_in_another() {
    let rig = Rig::start().await;
    let volume = rig.scratch("volume");
    let volume = rig.manager.add(&volume, &MountRequest::default()).await;
    let volume = volume.unwrap();
    let map: IdMap = "0:100000:65536".parse().unwrap();
    let at = |target: &str, options| ViewRequest::new(target, options);
    let mut views = Vec::new();
    for request in [
        at("/run/containers/1/data", options(&["nosuid"])),
        at("/run/containers/2/data", options(&["ro", "noexec"])),
        at("/run/containers/3/data", options(&[]).with_id_map(map)),
    ] {
        views.push(rig.manager.view(&volume, &request).await.unwrap());
    }
    // The views keep the mount.
    volume.release().await.unwrap();
    let [writer, reader, mapped] = [0, 1, 2].map(|n| views[n].target().join("file"));
    rig.ask(write(&writer, "written")).await;
    for file in [&writer, &reader, &mapped] {
        rig.assert_content(file, "written").await;
    }
    let refused = rig.ask_and_see(write(&reader, "other")).await;
    assert!(refused.get("failed").is_some(), "{refused}");
    // Nobody in the guest appears there, so nobody can write.
    let refused = rig
        .ask_and_see(write(&mapped.with_file_name("new"), "x"))
        .await;
    assert!(refused.get("failed").is_some(), "{refused}");
    // One directory of it, which must be there, and be no way out.
    let second = rig.scratch("second");
    let second = rig.manager.add(&second, &MountRequest::default()).await;
    let second = second.unwrap();
    let absent = options(&[]).with_subpath("absent").unwrap();
    let absent = at("/run/containers/4/data", absent);
    let error = rig.manager.view(&second, &absent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    second.release().await.unwrap();
    for view in views {
        view.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u15_an_agent_that_was_killed_knows_its_views() {
    let rig = Rig::start().await;
    let volume = rig.scratch("volume");
    let volume = rig.manager.add(&volume, &MountRequest::default()).await;
    let volume = volume.unwrap();
    let read_only = options(&["ro"]);
    let request = ViewRequest::new("/run/containers/1/data", read_only.clone());
    let view = rig.manager.view(&volume, &request).await.unwrap();
    rig.ask(json!("kill_agent")).await;
    let guest = rig.vm.guest("blockmount.agent.next").await.unwrap();
    for (options, presence) in [
        (read_only, Presence::Present(())),
        (options(&[]), Presence::Absent),
    ] {
        let bind = BindMount::new(volume.path(), view.target(), options);
        let found = Binder::adopt(&guest, &bind).await;
        assert_eq!(found.unwrap(), presence);
    }
    // It keeps the VM.
    drop(guest);
    volume.release().await.unwrap();
    view.release().await.unwrap();
    rig.end().await;
}
