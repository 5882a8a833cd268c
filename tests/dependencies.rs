//! The rule of who may depend on whom, read from cargo itself:
//! `cli -> qemu, hcs -> bridge, loopback -> scsi, vpmem -> linux -> blockmount`, and the core knows no operating system.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What each crate of ours may use of ours, apart from tests.
const RULE: [(&str, &[&str]); 12] = [
    ("blockmount", &[]),
    ("blockmount-linux", &["blockmount"]),
    ("blockmount-scsi", &["blockmount", "blockmount-linux"]),
    ("blockmount-vpmem", &["blockmount", "blockmount-linux"]),
    (
        "blockmount-bridge",
        &["blockmount", "blockmount-scsi", "blockmount-vpmem"],
    ),
    (
        "blockmount-loopback",
        &["blockmount", "blockmount-linux", "blockmount-scsi"],
    ),
    (
        "blockmount-qemu",
        &[
            "blockmount",
            "blockmount-bridge",
            "blockmount-scsi",
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
            "blockmount-agent",
            "blockmount-bridge",
            "blockmount-checker",
            "blockmount-linux",
        ],
    ),
    (
        "blockmount-cli",
        &[
            "blockmount",
            "blockmount-agent",
            "blockmount-bridge",
            "blockmount-checker",
            "blockmount-linux",
            "blockmount-loopback",
            "blockmount-qemu",
            "blockmount-scsi",
            "blockmount-vpmem",
        ],
    ),
];

/// All that the core stands on.
const CORE: [&str; 9] = [
    "async-trait",
    "dashmap",
    "foldhash",
    "futures-util",
    "parking_lot",
    "serde",
    "thiserror",
    "tokio",
    "tracing",
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
