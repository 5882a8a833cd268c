//! The debug agent as an ordinary process, asked in its protocol as it is documented.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use blockmount_debug_agent::kit::serving::{Serving, ask};
use blockmount_debug_agent::kit::{eventually, temp};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const AGENT: &str = env!("CARGO_BIN_EXE_agent-under-test");
const DEBUG_AGENT: &str = env!("CARGO_BIN_EXE_blockmount-debug-agent");
const LONG: Duration = Duration::from_secs(300);

fn debug_agent() -> Serving {
    Serving::start(DEBUG_AGENT, temp(), &["--agent", AGENT])
}

#[tokio::test]
async fn root_the_debug_agent_survives_the_agent_and_knows_it() {
    let debug_agent = debug_agent();
    let mut stream = debug_agent.connect().await;
    assert_eq!(
        ask(&mut stream, json!("agent_pid")).await,
        json!({"pid": null})
    );
    let none = ask(&mut stream, json!("kill_agent")).await;
    assert!(
        none["failed"].as_str().unwrap().contains("no agent"),
        "{none}"
    );

    let agent = Serving::agent(AGENT, temp());
    let pid = json!({"pid": agent.pid()});
    assert_eq!(ask(&mut stream, json!("agent_pid")).await, pid);
    assert_eq!(ask(&mut stream, json!("kill_agent")).await, pid);
    let (answer, _dir) = agent.end(Signal::KILL);
    assert_eq!(answer.code, None, "it was killed: {answer}");
    assert_eq!(
        ask(&mut stream, json!("agent_pid")).await,
        json!({"pid": null})
    );
    let (answer, dir) = debug_agent.end(Signal::TERM);
    answer.says(0, &[]);
    assert!(!dir.path().join("socket").exists());
}

#[tokio::test]
async fn root_files_tables_and_bare_mounts() {
    let root = temp();
    std::fs::create_dir_all(root.path().join("a/b")).unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let debug_agent = Serving::start(DEBUG_AGENT, temp(), &["--root", &at("")]);
    let mut stream = debug_agent.connect().await;
    let done = json!("done");
    let write = json!({"write": {"path": at("a/f"), "content": "text"}});
    assert_eq!(ask(&mut stream, write).await, done);
    let tree = ask(&mut stream, json!({"tree": {"path": at("")}})).await;
    let digest = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1";
    let nodes = json!([["a", "directory"], ["a/b", "directory"], ["a/f", {"file": digest}]]);
    assert_eq!(tree["tree"]["nodes"], nodes);

    let tables = ask(&mut stream, json!("tables")).await;
    let directories = [at(""), at("a"), at("a/b")];
    let found = tables["tables"]["directories"].as_array().unwrap();
    let trimmed = |text: &str| text.trim_end_matches('/').to_owned();
    let found: Vec<String> = found.iter().map(|d| trimmed(d.as_str().unwrap())).collect();
    assert_eq!(found, directories.map(|d| trimmed(&d)));

    let mount = json!({"device": "null", "filesystem": "tmpfs", "target": at("m/n"), "read_only": false,
        "data": "size=1m", "count": 4});
    let times = ask(&mut stream, json!({"bare_mount": {"mounts": [mount]}})).await;
    assert_eq!(
        times["bare_mounts"][0]["mount"].as_array().unwrap().len(),
        4,
        "{times}"
    );
    assert!(!root.path().join("m").exists());
    assert_eq!(
        ask(&mut stream, json!({"remove": {"path": at("a/f")}})).await,
        done
    );
    let busy = ask(&mut stream, json!({"remove": {"path": at("a")}})).await;
    assert!(
        busy["failed"].as_str().unwrap().contains("not empty"),
        "{busy}"
    );
}

#[tokio::test]
async fn root_a_message_that_is_too_long_ends_its_connection_only() {
    let debug_agent = debug_agent();
    let mut other = debug_agent.connect().await;
    let mut stream = debug_agent.connect().await;
    stream.write_u32_le((64 << 20) + 1).await.unwrap();
    assert_eq!(
        timeout(LONG, stream.read(&mut [0])).await.unwrap().unwrap(),
        0
    );
    assert!(
        ask(&mut other, json!("tables"))
            .await
            .get("tables")
            .is_some()
    );
}

#[tokio::test]
async fn root_this_machine_is_not_turned_off() {
    let debug_agent = debug_agent();
    let mut stream = debug_agent.connect().await;
    let answer = ask(&mut stream, json!("power_off")).await;
    assert!(
        answer["failed"].as_str().unwrap().contains("pid 1"),
        "{answer}"
    );
}

/// The processes that have a root.
fn processes_in(root: &Path) -> usize {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let roots = processes.filter_map(|process| fs::read_link(process.path().join("root")).ok());
    roots.filter(|of| of == root).count()
}

#[tokio::test]
async fn root_a_program_runs_in_a_root_to_its_end_or_its_deadline() {
    let root = temp();
    fs::create_dir(root.path().join("bin")).unwrap();
    fs::copy("/bin/busybox", root.path().join("bin/sh")).unwrap();
    fs::write(root.path().join("file"), "").unwrap();
    let debug_agent = debug_agent();
    let mut stream = debug_agent.connect().await;
    let mut run = async |root: &Path, words: &[&str], deadline: u32| {
        let run = json!({"root": root, "words": words, "deadline": deadline});
        ask(&mut stream, json!({ "run": run })).await
    };
    let ended = |status: Value, signal: Value, stdout: &str, stderr: &str| json!({"ended": {"status": status, "signal": signal, "stdout": stdout, "stderr": stderr, "left_out": 0}});
    let script = "echo /*; pwd; echo other >&2; exit 3";
    let answer = run(root.path(), &["sh", "-c", script], 60).await;
    let expected = ended(json!(3), Value::Null, "/bin /file\n/\n", "other\n");
    assert_eq!(answer, expected);
    let answer = run(root.path(), &["/bin/sh", "-c", "kill -9 $$"], 60).await;
    assert_eq!(answer, ended(Value::Null, json!(9), "", ""));
    // Who says more than is kept is not held up.
    let much = "i=0; while [ $i -lt 2000 ]; do echo 0123456789012345678901234567890123456789012345678; i=$((i+1)); done";
    let answer = run(root.path(), &["/bin/sh", "-c", much], 60).await;
    let said = answer["ended"]["stdout"].as_str().unwrap();
    assert_eq!(
        (
            said.len(),
            &answer["ended"]["left_out"],
            &answer["ended"]["status"]
        ),
        (65_536, &json!(100_000 - 65_536), &json!(0))
    );

    let forever = "echo begun; (while :; do :; done) & while :; do :; done";
    let answer = run(root.path(), &["/bin/sh", "-c", forever], 1).await;
    let failed = answer["failed"].as_str().unwrap_or_default();
    assert!(
        failed.contains("did not end within 1s and was killed") && failed.contains("begun"),
        "{answer}"
    );
    eventually("the end of what was killed", || {
        processes_in(root.path()) == 0
    });
    for (root, words, why) in [
        (root.path(), &["/bin/absent"][..], "/bin/absent"),
        (root.path(), &["/bin/ls\0"], "nul byte"),
        (root.path(), &[], "no program"),
        (&root.path().join("file"), &["/bin/sh"], "no such root"),
        (&root.path().join("absent"), &["/bin/sh"], "no such root"),
    ] {
        let answer = run(root, words, 60).await;
        let failed = answer["failed"].as_str().unwrap_or_default();
        assert!(failed.contains(why), "{answer}");
    }
}

#[tokio::test]
async fn root_a_program_is_killed_when_nobody_waits_for_it_any_more() {
    let root = temp();
    fs::create_dir(root.path().join("bin")).unwrap();
    fs::copy("/bin/busybox", root.path().join("bin/sh")).unwrap();
    let debug_agent = debug_agent();
    let mut stream = debug_agent.connect().await;
    let run = json!({"run": {"root": root.path(), "words": ["/bin/sh", "-c", "while :; do :; done"], "deadline": 600}});
    let text = run.to_string();
    stream.write_u32_le(text.len() as u32).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    eventually("its start", || processes_in(root.path()) == 1);
    debug_agent.end(Signal::TERM).0.says(0, &[]);
    eventually("its end", || processes_in(root.path()) == 0);
}
