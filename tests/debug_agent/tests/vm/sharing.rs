//! One disk for several containers, and disks that come and go at random.

use blockmount::{Disk, MountRequest, StackRequest};
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::rig::{Rig, read_only};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_two_containers_share_their_layers_and_not_what_they_write() {
    let rig = Rig::start().await;
    let layers = [rig.layer("top"), rig.layer("base")];
    let scratches = [rig.scratch("one"), rig.scratch("two")];
    let requests = [0, 1].map(|n| {
        layers
            .iter()
            .fold(
                StackRequest::new(format!("/run/containers/{n}")),
                |request, layer| request.layer(layer.clone(), read_only()),
            )
            .scratch(scratches[n].clone(), MountRequest::default())
    });
    let (one, two) = tokio::join!(
        rig.manager.stack(&requests[0]),
        rig.manager.stack(&requests[1])
    );
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.layers(), two.layers());
    assert_eq!(
        rig.tables().await["scsi_devices"].as_array().unwrap().len(),
        4
    );
    let new =
        |root: &std::path::Path| json!({ "write": { "path": root.join("id"), "content": "one" } });
    rig.ask(new(one.target())).await;
    rig.assert_content(&one.target().join("id"), "one").await;
    rig.assert_content(&two.target().join("id"), "top").await;
    one.release().await.unwrap();
    // The second has all it had.
    rig.assert_content(&two.target().join("id"), "top").await;
    assert_eq!(
        rig.tables().await["scsi_devices"].as_array().unwrap().len(),
        3
    );
    two.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_200_cycles_from_16_tasks_leave_everything_as_it_was() {
    const TASKS: u64 = 16;
    const CYCLES: usize = 200;
    let rig = Rig::start().await;
    let disks: Vec<Disk> = (0..12).map(|n| rig.layer(&format!("layer-{n}"))).collect();
    let work = (0..TASKS).map(|task| {
        let (rig, disks) = (&rig, &disks);
        async move {
            let mut random = StdRng::seed_from_u64(task);
            let (mut held, request) = (Vec::new(), read_only());
            for _ in 0..CYCLES / TASKS as usize + 1 {
                if held.len() < 4 && random.random_bool(0.6) {
                    let n = random.random_range(0..disks.len());
                    let mount = rig.manager.add(&disks[n], &request).await.unwrap();
                    rig.assert_content(&mount.path().join("id"), &format!("layer-{n}"))
                        .await;
                    held.push(mount);
                } else if !held.is_empty() {
                    let mount = held.swap_remove(random.random_range(0..held.len()));
                    mount.release().await.unwrap();
                }
            }
            for mount in held {
                mount.release().await.unwrap();
            }
        }
    });
    join_all(work).await;
    rig.end().await;
}
