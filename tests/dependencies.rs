//! The rule of who may depend on whom, read from cargo itself:
//! `cli -> qemu, hcs -> bridge -> blockmount`, `agent, loopback -> scsi, vpmem (guest halves) -> linux -> blockmount`, and the core
//! knows no operating system.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What each crate of ours may use of ours, apart from tests.
const RULE: [(&str, &[&str]); 19] = [
    ("blockmount", &[]),
    ("blockmount-tests", &[]),
    ("blockmount-journal", &["blockmount"]),
    ("blockmount-source", &["blockmount"]),
    (
        "blockmount-containerd",
        &["blockmount", "blockmount-verity"],
    ),
    ("blockmount-linux", &["blockmount"]),
    ("blockmount-verity", &["blockmount"]),
    ("blockmount-scsi", &["blockmount", "blockmount-linux"]),
    ("blockmount-vpmem", &["blockmount", "blockmount-linux"]),
    (
        "blockmount-bridge",
        &["blockmount", "blockmount-scsi", "blockmount-vpmem"],
    ),
    (
        "blockmount-loopback",
        &[
            "blockmount",
            "blockmount-linux",
            "blockmount-scsi",
            "blockmount-source",
        ],
    ),
    (
        "blockmount-qemu",
        &[
            "blockmount",
            "blockmount-bridge",
            "blockmount-scsi",
            "blockmount-source",
            "blockmount-vpmem",
        ],
    ),
    (
        "blockmount-hcs",
        &[
            "blockmount",
            "blockmount-bridge",
            "blockmount-scsi",
            "blockmount-vpmem",
        ],
    ),
    (
        "blockmount-agent",
        &[
            "blockmount",
            "blockmount-bridge",
            "blockmount-linux",
            "blockmount-loopback",
            "blockmount-scsi",
            "blockmount-vpmem",
        ],
    ),
    (
        "blockmount-checker",
        &["blockmount-agent", "blockmount-linux"],
    ),
    // In tests only: no other crate may use it but in its tests.
    (
        "blockmount-debug-agent",
        &[
            "blockmount",
            "blockmount-agent",
            "blockmount-bridge",
            "blockmount-checker",
            "blockmount-linux",
        ],
    ),
    // Every parser of foreign bytes.
    (
        "blockmount-fuzz-targets",
        &[
            "blockmount",
            "blockmount-bridge",
            "blockmount-hcs",
            "blockmount-linux",
            "blockmount-qemu",
            "blockmount-scsi",
            "blockmount-verity",
            "blockmount-vpmem",
        ],
    ),
    // A test as well: a transport as a stranger would write one.
    (
        "third-party-transport",
        &[
            "blockmount",
            "blockmount-agent",
            "blockmount-debug-agent",
            "blockmount-linux",
            "blockmount-qemu",
        ],
    ),
    (
        "blockmount-cli",
        &[
            "blockmount",
            "blockmount-agent",
            "blockmount-bridge",
            "blockmount-checker",
            "blockmount-containerd",
            "blockmount-journal",
            "blockmount-linux",
            "blockmount-loopback",
            "blockmount-qemu",
            "blockmount-scsi",
            "blockmount-verity",
            "blockmount-vpmem",
        ],
    ),
];

/// All that the core stands on.
const CORE: [&str; 11] = [
    "async-trait",
    "dashmap",
    "foldhash",
    "futures-util",
    "hashbrown",
    "parking_lot",
    "serde",
    "thiserror",
    "tokio",
    "tracing",
    "triomphe",
];

/// The dependencies of each crate of the workspace, apart from those of tests and benches.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let packages = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().unwrap().iter();
            let shipped = all.filter(|dependency| dependency["kind"] != "dev");
            (
                text(&package["name"]),
                shipped
                    .map(|dependency| text(&dependency["name"]))
                    .collect(),
            )
        });
    packages.collect()
}

#[test]
fn dependencies_point_one_way() {
    let found = dependencies();
    let named: BTreeSet<&str> = RULE.iter().map(|(name, _)| *name).collect();
    let crates: BTreeSet<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(
        crates, named,
        "each crate of the workspace has its place in the rule"
    );
    for (name, allowed) in RULE {
        let ours = found[name]
            .iter()
            .filter(|dependency| dependency.starts_with("blockmount"));
        for dependency in ours {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{name} must not use {dependency}"
            );
        }
    }
}

#[test]
fn the_core_knows_no_operating_system() {
    let core: Vec<String> = dependencies()
        .remove("blockmount")
        .unwrap()
        .into_iter()
        .collect();
    assert_eq!(core, CORE);
}

/// All crates that a package is built from with these features.
fn tree(package: &str, features: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--edges=normal",
            "--prefix=none",
            "--format={p}",
        ])
        .args(["--package", package, "--no-default-features"])
        .args(
            features
                .iter()
                .map(|feature| format!("--features={feature}")),
        )
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let names = lines.lines().filter_map(|line| line.split(' ').next());
    names.map(str::to_owned).collect()
}

#[test]
fn a_host_half_needs_no_linux_engine_and_a_guest_half_no_hypervisor() {
    for package in ["blockmount-scsi", "blockmount-vpmem"] {
        let bare = tree(package, &[]);
        assert!(!bare.contains("blockmount-linux"), "{package}: {bare:?}");
        let host = tree(package, &["host"]);
        assert!(!host.contains("blockmount-linux"), "{package}: {host:?}");
        let guest = tree(package, &["guest"]);
        assert!(guest.contains("blockmount-linux"), "{package}: {guest:?}");
    }
    let agent = tree("blockmount-agent", &["standard"]);
    for host_side in ["blockmount-qemu", "blockmount-hcs", "clap"] {
        assert!(!agent.contains(host_side), "{agent:?}");
    }
}

#[test]
fn attaching_to_a_vm_of_others_needs_nothing_that_starts_one() {
    let attachers = tree("blockmount-qemu", &[]);
    for launching in ["blockmount-linux", "object", "sha2", "tempfile", "walkdir"] {
        assert!(!attachers.contains(launching), "{launching}: {attachers:?}");
    }
    assert!(tree("blockmount-qemu", &["launch"]).contains("object"));
}
