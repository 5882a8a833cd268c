//! A host that begins anew with a guest that goes on, and a guest that is restored while time has passed.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockmount::{
    LayerCombiner, MountOptions, MountRequest, Mounter, Overlay, Presence, StackRequest,
};
use serde_json::json;

use crate::rig::{self, Rig, read_only};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_new_runtime_is_told_what_the_agent_has_mounted() {
    let rig = Rig::start().await;
    let layer = rig.layer("base");
    let request = StackRequest::new("/run/containers/0")
        .layer(layer.clone(), read_only())
        .scratch(rig.scratch("scratch"), MountRequest::default());
    let stack = rig.manager.stack(&request).await.unwrap();
    let mount = rig.manager.add(&layer, &read_only()).await.unwrap();
    let layers: Vec<&Path> = stack.layers().iter().map(|layer| layer.path()).collect();
    let overlay = Overlay::new(layers, stack.target());
    let options = read_only().options().clone();
    let other = MountOptions::builder().read_only().option("nodev").build();
    let other = other.unwrap();
    // The agent is the one that mounted, then one that knows it from its journal.
    for killed in [false, true] {
        if killed {
            rig.ask(json!("kill_agent")).await;
        }
        // Each has a line of its own.
        let port = format!("blockmount.agent.{killed}");
        let guest = rig.vm.guest(&port).await.unwrap();
        let (device, target) = (mount.locator(), mount.path());
        let found = Mounter::adopt(&guest, device, target, &options).await;
        assert_eq!(found.unwrap(), Presence::Present(()), "killed: {killed}");
        let found = Mounter::adopt(&guest, device, target, &other).await;
        assert_eq!(found.unwrap(), Presence::Absent);
        let absent = Path::new("/run/mounts/never");
        let found = Mounter::adopt(&guest, device, absent, &options).await;
        assert_eq!(found.unwrap(), Presence::Absent);
        let found = LayerCombiner::adopt(&guest, &overlay).await;
        assert_eq!(found.unwrap(), Presence::Present(()));
    }
    // The tree is the same, and what the new runtime knows of is undone by it.
    rig.assert_content(&stack.target().join("id"), "base").await;
    let guest = rig.vm.guest("blockmount.agent.last").await.unwrap();
    guest.separate(stack.target()).await.unwrap();
    let found = LayerCombiner::adopt(&guest, &overlay).await;
    assert_eq!(found.unwrap(), Presence::Absent);
    // It keeps the VM.
    drop(guest);
    stack.release().await.unwrap();
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u08_a_restored_guest_has_the_clock_of_its_host() {
    // The state is at least this old: without help the guest's clock is as far behind.
    let age = Duration::from_secs(5);
    rig::start().await.shut_down().await;
    tokio::time::sleep(age).await;
    let rig = Rig::start().await;
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let clock = rig.ask(json!("clock")).await["clock"].as_u64().unwrap();
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let guest = Duration::from_millis(clock);
    let allowed = Duration::from_secs(2);
    assert!(
        before - allowed < guest && guest < after + allowed,
        "{guest:?} is not between {before:?} and {after:?}"
    );
    rig.end().await;
}
