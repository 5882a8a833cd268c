//! The agent as pid 1 of a virtual machine: it comes up, serves, survives, and says why it cannot.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use blockmount::Mounter;
use blockmount_bridge::{BridgeGuest, GuestConnection};
use blockmount_debug_agent::kit::LONGEST;
use blockmount_debug_agent::kit::serving::ask;
use blockmount_qemu::{
    Accelerator, GuestImage, GuestImageBuilder, GuestKernel, GuestStream, Vm, VmBuilder,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// A guest whose `/init` is the agent, with these arguments for its agent.
fn image(arguments: &str) -> GuestImageBuilder {
    GuestImage::builder(GuestKernel::find().unwrap())
        .program(env!("CARGO_BIN_EXE_agent-under-test"))
        .file("/etc/blockmount/agent.args", arguments)
}

async fn machine(image: GuestImageBuilder) -> VmBuilder {
    Vm::builder(image.build().await.unwrap())
        // Where no state remembers that KVM does not work, each process would try it anew.
        .accelerator(Accelerator::Emulation)
        .directory("/var/tmp")
}

async fn start() -> Vm {
    let states = Path::new(env!("CARGO_TARGET_TMPDIR")).join("states");
    let image = image("")
        .add_program(env!("CARGO_BIN_EXE_blockmount-debug-agent"))
        .file(
            "/etc/blockmount/programs/debug-agent",
            "/programs/blockmount-debug-agent\n",
        );
    let machine = machine(image).await;
    machine.saved_states(states).start().await.unwrap()
}

/// A port of its own, whose name is unique: QEMU wants them to differ while both are there.
async fn connect(vm: &Vm, program: &str, n: u32) -> GuestStream {
    let name = format!("blockmount.{program}.{n}");
    vm.connect(&name, LONGEST).await.unwrap()
}

async fn speak(stream: GuestStream) -> BridgeGuest {
    let connection = GuestConnection::connect(stream).await.unwrap();
    let guest = BridgeGuest::new(connection);
    // It does what it is asked for: nothing, here.
    guest
        .unmount(Path::new("/run/mounts/nothing"))
        .await
        .unwrap();
    guest
}

async fn agent_pid(debug_agent: &mut GuestStream) -> Value {
    ask(debug_agent, json!("agent_pid")).await["pid"].clone()
}

/// Waits until another agent runs than the one that was there.
async fn restarted(debug_agent: &mut GuestStream, before: &Value) -> Value {
    let deadline = Instant::now() + LONGEST;
    loop {
        let pid = agent_pid(debug_agent).await;
        if pid.is_number() && pid != *before {
            return pid;
        }
        assert!(Instant::now() < deadline, "no agent is started again");
    }
}

#[tokio::test]
async fn vm_hosts_come_and_go_and_each_is_served() {
    let vm = start().await;
    for n in 0..20 {
        drop(speak(connect(&vm, "agent", n).await).await);
    }
    // Several at once, one of which says nothing and one nonsense.
    let _silent = connect(&vm, "agent", 100).await;
    let mut broken = connect(&vm, "agent", 101).await;
    broken.write_all(&[0; 3000]).await.unwrap();
    let first = speak(connect(&vm, "agent", 102).await).await;
    let second = speak(connect(&vm, "agent", 103).await).await;
    for guest in [first, second] {
        guest
            .unmount(Path::new("/run/mounts/nothing"))
            .await
            .unwrap();
    }
    vm.shut_down().await;
}

#[tokio::test]
async fn vm_a_host_that_has_said_nonsense_can_begin_again_on_the_same_port() {
    let vm = start().await;
    let mut stream = connect(&vm, "agent", 0).await;
    stream.write_all(&[0; 16]).await.unwrap();
    // What follows at once may be thrown away with it, so that a host asks until it is answered.
    let hello = br#"{"Hello":{"min":1,"max":1,"software":"a test"}}"#;
    let size = u32::try_from(12 + hello.len()).unwrap();
    let frame = [&size.to_le_bytes()[..], &7_u64.to_le_bytes(), hello].concat();
    let mut answer = [0; 12];
    for _ in 0..20 {
        stream.write_all(&frame).await.unwrap();
        let read = stream.read_exact(&mut answer);
        if timeout(Duration::from_secs(1), read).await.is_ok() {
            break;
        }
    }
    assert_eq!(
        answer[4..],
        7_u64.to_le_bytes(),
        "the answer has the number of the request"
    );
    vm.shut_down().await;
}

#[tokio::test]
async fn vm_a_killed_agent_is_started_again_and_the_debug_agent_tells() {
    let vm = start().await;
    let mut debug_agent = connect(&vm, "debug", 0).await;
    let first = agent_pid(&mut debug_agent).await;
    let mut lost = connect(&vm, "agent", 0).await;
    assert_eq!(
        ask(&mut debug_agent, json!("kill_agent")).await,
        json!({"pid": first})
    );
    let read = timeout(LONGEST, lost.read(&mut [0])).await.unwrap();
    assert_eq!(read.unwrap(), 0, "the host sees that the agent has gone");
    drop(lost);
    let mut last = restarted(&mut debug_agent, &first).await;
    drop(speak(connect(&vm, "agent", 1).await).await);
    // One that never lives long is started less and less often, but always again.
    for _ in 0..4 {
        assert_eq!(
            ask(&mut debug_agent, json!("kill_agent")).await,
            json!({"pid": last})
        );
        last = restarted(&mut debug_agent, &last).await;
    }
    drop(speak(connect(&vm, "agent", 2).await).await);
    assert!(
        vm.console().contains("the agent ended by signal 9"),
        "{}",
        vm.console()
    );
    vm.shut_down().await;
}

#[tokio::test]
async fn vm_the_debug_agent_tells_what_there_is_and_turns_the_machine_off() {
    let vm = start().await;
    let mut debug_agent = connect(&vm, "debug", 0).await;
    let tables = ask(&mut debug_agent, json!("tables")).await["tables"].clone();
    let mounts = tables["mounts"].as_array().unwrap();
    let points: Vec<&str> = mounts
        .iter()
        .map(|mount| mount["mount_point"].as_str().unwrap())
        .collect();
    assert_eq!(points, ["/", "/proc", "/sys", "/dev", "/run", "/tmp"]);
    assert_eq!(tables["scsi_devices"], json!([]));
    let path = "/run/mounts";
    let write = json!({"write": {"path": path, "content": "text"}});
    assert_eq!(ask(&mut debug_agent, write).await, json!("done"));
    assert_eq!(
        ask(&mut debug_agent, json!({"hold": {"path": path}})).await,
        json!("done")
    );
    assert_eq!(
        ask(&mut debug_agent, json!({"dax": {"path": path}})).await,
        json!({"dax": false})
    );
    let tree = ask(
        &mut debug_agent,
        json!({"tree": {"path": "/etc/blockmount"}}),
    )
    .await;
    let names = tree["tree"]["nodes"].as_array().unwrap();
    assert_eq!(names[0][0], "agent.args");
    assert_eq!(names[1][0], "modules");
    assert_eq!(names[3][0], "programs/debug-agent");
    let mount = |n: u32| {
        json!({"device": "null", "filesystem": "tmpfs", "target": format!("/run/layers/{n}"),
            "read_only": true, "data": "", "count": 3})
    };
    let request = json!({"bare_mount": {"mounts": [mount(0), mount(1)]}});
    let times = ask(&mut debug_agent, request).await;
    assert_eq!(times["bare_mounts"].as_array().unwrap().len(), 2, "{times}");
    assert_eq!(
        ask(&mut debug_agent, json!("tables")).await["tables"]["mounts"],
        tables["mounts"]
    );

    assert_eq!(
        ask(&mut debug_agent, json!("power_off")).await,
        json!("done")
    );
    timeout(LONGEST, vm.ended()).await.unwrap();
}

#[tokio::test]
async fn vm_a_machine_without_a_debug_agent_has_none() {
    let vm = machine(image("")).await.start().await.unwrap();
    let refused = vm.connect("blockmount.debug", Duration::from_secs(2)).await;
    assert!(refused.is_err());
    drop(speak(connect(&vm, "agent", 0).await).await);
    vm.shut_down().await;
}

#[tokio::test]
async fn vm_arguments_that_make_no_sense_turn_the_machine_off_and_the_console_says_why() {
    let started = Instant::now();
    let error = machine(image("--roof\n/run\n"))
        .await
        .start()
        .await
        .unwrap_err();
    let (mut text, mut cause) = (String::new(), Some(&error as &dyn std::error::Error));
    while let Some(error) = cause {
        text.push_str(&error.to_string());
        cause = error.source();
    }
    assert!(
        text.contains("--roof") && text.contains("agent.args"),
        "{text}"
    );
    assert!(
        started.elapsed() < LONGEST,
        "its host need not wait for the timeout"
    );
}
