//! The transport from end to end: QEMU, the guest's kernel, an agent of its own.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockmount::testing::AttachIdentified as _;
use blockmount::{Disk, Manager, MountOptions, MountRequest, Presence, Transport};
use blockmount_debug_agent::kit;
use blockmount_debug_agent::kit::images;
use blockmount_qemu::{Accelerator, GuestImage, GuestKernel, GuestStream, MODULES, Vm};
use serde_json::{Value, json};
use third_party_transport::VirtioBlkTransport;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PORTS: u8 = 3;
/// Where the ports are on the root bus: beside everything that the VM has anyway.
const FIRST_SLOT: u8 = 0x1c;
const OPENING: Duration = Duration::from_secs(30);

async fn start() -> Vm {
    let mut arguments = vec!["--root".to_owned(), "/run/mounts".to_owned()];
    for port in 0..PORTS {
        let address = format!("0000:00:{:02x}.0", FIRST_SLOT + port);
        arguments.extend(["--vblk-port".to_owned(), address]);
    }
    let image = GuestImage::builder(GuestKernel::find().unwrap())
        .program(env!("CARGO_BIN_EXE_third-party-agent"))
        .add_program(env!("CARGO_BIN_EXE_debug-agent"))
        .modules(MODULES.into_iter().chain(["virtio_blk"]))
        .file("/etc/blockmount/agent.args", arguments.join("\n") + "\n")
        .file(
            "/etc/blockmount/programs/debug-agent",
            "/programs/debug-agent\n--root\n/run/mounts\n",
        )
        .build()
        .await
        .unwrap();
    let mut vm = Vm::builder(image)
        .accelerator(Accelerator::Emulation)
        .controllers(1);
    for port in 0..PORTS {
        let slot = FIRST_SLOT + port;
        vm = vm.device(format!(
            "pcie-root-port,id=blk{port},chassis={},slot={slot},addr={slot:#x}",
            64 + port
        ));
    }
    vm.start().await.unwrap()
}

async fn ask(debug_agent: &mut GuestStream, question: Value) -> Value {
    let bytes = serde_json::to_vec(&question).unwrap();
    debug_agent.write_u32_le(bytes.len() as u32).await.unwrap();
    debug_agent.write_all(&bytes).await.unwrap();
    let length = debug_agent.read_u32_le().await.unwrap();
    let mut answer = vec![0; length as usize];
    debug_agent.read_exact(&mut answer).await.unwrap();
    serde_json::from_slice(&answer).unwrap()
}

/// All that QEMU and the guest's kernel list.
async fn state(vm: &Vm, debug_agent: &mut GuestStream) -> BTreeMap<&'static str, String> {
    let mut state = BTreeMap::from([(
        "guest",
        ask(debug_agent, json!("tables")).await["tables"].to_string(),
    )]);
    for (command, arguments) in [
        ("query-block", json!({})),
        ("query-named-block-nodes", json!({})),
        ("qom-list", json!({ "path": "/machine/peripheral" })),
    ] {
        let answer = vm.qmp().execute(command, arguments).await.unwrap();
        let mut lines: Vec<String> = answer
            .as_array()
            .unwrap()
            .iter()
            .map(Value::to_string)
            .collect();
        lines.sort();
        state.insert(command, lines.join("\n"));
    }
    state
}

#[tokio::test(flavor = "multi_thread")]
async fn vm_a_transport_of_a_stranger_works_from_end_to_end() {
    let dir = kit::temp();
    let vm = start().await;
    let mut debug_agent = vm.connect("blockmount.debug", OPENING).await.unwrap();
    let ports: Vec<String> = (0..PORTS).map(|port| format!("blk{port}")).collect();
    let transport = Arc::new(VirtioBlkTransport::new(vm.qmp().clone(), ports).unwrap());
    let guest = vm.guest("blockmount.agent").await.unwrap();
    let manager = Manager::builder()
        .transport(transport.clone())
        .unplugger(guest.clone())
        .mounter(guest.clone())
        .combiner(guest)
        .mount_root("/run/mounts")
        .build();
    let before = state(&vm, &mut debug_agent).await;
    let layer = |text: &str| {
        let path = dir.path().join(format!("{text}.erofs"));
        images::image("erofs", &path, &[("id", text)]);
        Disk::virtual_disk(path).read_only()
    };
    let request = MountRequest::new(MountOptions::read_only());
    // Twice, so that each port has had another disk.
    for round in 0..2 {
        let disks: Vec<Disk> = (0..PORTS)
            .map(|port| layer(&format!("{round}-{port}")))
            .collect();
        let mut mounts = Vec::new();
        for disk in &disks {
            mounts.push(manager.add(disk, &request).await.unwrap());
        }
        // Another holder shares; a disk more finds no port.
        let shared = manager.add(&disks[0], &request).await.unwrap();
        assert_eq!(shared.path(), mounts[0].path());
        let full = manager
            .add(&layer("one-too-many"), &request)
            .await
            .unwrap_err();
        assert_eq!(full.kind(), blockmount::ErrorKind::Full);
        for (mount, disk) in mounts.iter().zip(&disks) {
            let nodes = content(&mut debug_agent, mount.path()).await;
            let expected = disk.source().file_stem().unwrap().to_str().unwrap();
            assert_eq!(nodes, digest(expected), "{}", mount.locator());
        }
        shared.release().await.unwrap();
        for mount in mounts {
            mount.release().await.unwrap();
        }
        assert!(manager.drain().await.is_clean());
        assert_eq!(state(&vm, &mut debug_agent).await, before);
    }
    let disks = [layer("first"), layer("second"), layer("third")];
    a_second_transport_finds_what_is_there(&vm, &transport, &disks).await;
    assert_eq!(state(&vm, &mut debug_agent).await, before);
    vm.shut_down().await;
}

/// As after a restart of the runtime: one disk is remembered, and another one is not.
async fn a_second_transport_finds_what_is_there(
    vm: &Vm,
    first: &VirtioBlkTransport,
    disks: &[Disk; 3],
) {
    let remembered = first.attach_identified(&disks[0]).await.unwrap();
    first.attach_identified(&disks[1]).await.unwrap();
    let ports: Vec<String> = (0..PORTS).map(|port| format!("blk{port}")).collect();
    let second = VirtioBlkTransport::new(vm.qmp().clone(), ports).unwrap();
    let id = second.identify(&disks[0]).await.unwrap();
    let found = second.adopt(&disks[0], &id, Some(&remembered)).await;
    assert_eq!(found.unwrap(), Presence::Present(remembered));
    let third = second.identify(&disks[2]).await.unwrap();
    let found = second.adopt(&disks[2], &third, None).await.unwrap();
    assert_eq!(found, Presence::Absent);
    let locator = second.attach_identified(&disks[2]).await.unwrap();
    assert_eq!(locator.as_str(), "vblk:2", "port 1 is foreign");
    for disk in disks {
        second.detach(disk).await.unwrap();
    }
    first.detach(&disks[1]).await.unwrap();
}

/// The digest of the file `id` in a directory of the guest.
async fn content(debug_agent: &mut GuestStream, path: &Path) -> String {
    let answer = ask(debug_agent, json!({ "tree": { "path": path } })).await;
    let nodes = answer["tree"]["nodes"].as_array().unwrap();
    let id = nodes.iter().find(|node| node[0] == "id").unwrap();
    id[1]["file"].as_str().unwrap().to_owned()
}

fn digest(text: &str) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(text);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
