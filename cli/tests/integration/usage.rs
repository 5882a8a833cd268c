//! The command line: help texts, and what makes no sense.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use crate::common::run;

#[test]
fn every_command_has_help_with_examples() {
    for (arguments, words) in [
        (
            &["--help"][..],
            &[
                "demo",
                "mount",
                "inspect",
                "cleanup",
                "agent",
                "Examples:",
                "Exit status",
            ][..],
        ),
        (
            &["demo", "--help"],
            &["--layer", "--partition", "--json", "Examples:"],
        ),
        (
            &["mount", "--help"],
            &[
                "--layer",
                "--scratch",
                "--option",
                "--at",
                "Examples:",
                "--json",
            ],
        ),
        (&["inspect", "--help"], &["IMAGE", "--json", "Examples:"]),
        (
            &["cleanup", "--help"],
            &["--dry-run", "living run", "Examples:"],
        ),
        (
            &["agent", "--help"],
            &[
                "--virtio-port",
                "--vsock",
                "--unix",
                "--serial",
                "--root",
                "--scsi-controller",
                "--vpmem",
                "/etc/blockmount/modules",
                "/etc/blockmount/agent.args",
                "Examples:",
            ],
        ),
    ] {
        let answer = run(arguments);
        answer.says(0, &[]);
        for word in words {
            assert!(answer.stdout.contains(word), "no {word:?} in {answer}");
        }
    }
    assert!(run(["--version"]).stdout.starts_with("blockmount "));
}

#[test]
fn nonsense_is_refused_with_status_2() {
    for arguments in [
        &[][..],
        &["mound"],
        &["mount"],
        &["mount", "--layer", "x"],
        &["mount", "--at", "/mnt/x"],
        &["mount", "--at", "/mnt/x", "--partition", "1"],
        &[
            "mount",
            "--at",
            "/mnt/x",
            "--layer",
            "x",
            "--partition",
            "0",
        ],
        &[
            "mount",
            "--at",
            "/mnt/x",
            "--layer",
            "x",
            "--partition",
            "1",
            "--partition",
            "2",
        ],
        &[
            "mount",
            "--at",
            "/mnt/x",
            "--layer",
            "x",
            "--scratch",
            "many",
        ],
        &["mount", "--at", "/mnt/x", "--layer", "x", "--scratch", "1K"],
        &["mount", "--at", "/mnt/x", "--layer", "x", "--colour"],
        &["demo", "extra"],
        &["agent", "--vsock", "0xffffffff"],
        &["agent", "--vsock-listen", "many"],
        &["agent", "extra"],
        &["inspect"],
        &["inspect", "x", "--log", "a=b=c"],
    ] {
        let answer = run(arguments);
        assert_eq!(answer.code, Some(2), "{arguments:?}: {answer}");
        assert!(
            !answer.stderr.is_empty() && answer.stdout.is_empty(),
            "{arguments:?}: {answer}"
        );
    }
}
