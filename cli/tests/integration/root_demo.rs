//! `blockmount demo` on the real kernel.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;

use crate::common::{self, assert_nothing_left, image, partitioned, run, temp};
use serde_json::Value;

fn strings<'a>(values: &'a [Value], field: &str) -> BTreeSet<&'a str> {
    values
        .iter()
        .map(|value| value[field].as_str().unwrap())
        .collect()
}

#[test]
fn root_does_the_whole_way_with_samples() {
    let dir = temp();
    let answer = run(["demo", "--json"]);
    answer.says(0, &[]);
    let json = answer.json();
    assert_eq!(json["guest"], "local");
    let disks = json["layers"].as_array().unwrap();
    let is_layer = |disk: &&Value| disk["role"] == "layer";
    let layers: Vec<Value> = disks.iter().filter(is_layer).cloned().collect();
    assert!(layers.len() >= 4, "{answer}");
    assert!(
        layers.iter().all(|layer| layer["containers"] == 2),
        "{answer}"
    );
    // The test machine has all tools.
    let filesystems = strings(&layers, "filesystem");
    assert!(filesystems.len() >= 3, "{answer}");
    assert!(
        layers.iter().any(|layer| layer["partition"] == 2),
        "{answer}"
    );
    for disk in disks {
        assert_eq!(disk["transport"], "loop");
        assert!(
            disk["locator"].as_str().unwrap().starts_with("loop:"),
            "{disk}"
        );
        assert!(
            disk["device"].as_str().unwrap().starts_with("/dev/loop"),
            "{disk}"
        );
        assert!(
            disk["path"]
                .as_str()
                .unwrap()
                .starts_with("/run/blockmount/"),
            "{disk}"
        );
        assert!(disk["attach_ms"].as_f64().unwrap() > 0.0, "{disk}");
        assert!(disk["mount_ms"].as_f64().unwrap() > 0.0, "{disk}");
    }
    let images = strings(disks, "source").len() as u64;
    for count in [
        "distinct_images",
        "attaches",
        "detaches",
        "mounts",
        "unmounts",
    ] {
        assert_eq!(json[count], images, "{count}: {answer}");
    }
    assert_eq!(strings(disks, "path").len() as u64, images);
    assert!(json["files_checked"].as_u64().unwrap() > 2_000, "{answer}");
    assert_eq!(json["digest_mismatches"], 0);
    assert_eq!(json["left_over"], Value::Array(Vec::new()));
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_takes_images_of_the_user_in_order() {
    let dir = temp();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    image(
        "erofs",
        path("top"),
        &[("layer.txt", "top"), ("top/a", "a")],
    );
    image(
        "squashfs",
        path("a middle: one, two"),
        &[("layer.txt", "middle"), ("top", "hidden")],
    );
    partitioned(path("base"), &[("layer.txt", "base"), ("base/b", "b")]);
    let (top, middle, base) = (path("top"), path("a middle: one, two"), path("base"));
    let arguments = [
        "--layer",
        &top,
        "--layer",
        &middle,
        "--layer",
        &base,
        "--partition",
        "2",
    ];
    let answer = run(["demo", "--json"].into_iter().chain(arguments));
    answer.says(0, &[]);
    let json = answer.json();
    let sources: Vec<&str> = json["layers"].as_array().unwrap()[..3]
        .iter()
        .map(|layer| layer["source"].as_str().unwrap())
        .collect();
    assert_eq!(sources, [&top, &middle, &base]);
    assert_eq!(
        (&json["attaches"], &json["digest_mismatches"]),
        (&5.into(), &0.into())
    );
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_prints_tables_for_people() {
    let dir = temp();
    let path = dir.path().join("one");
    image("ext4", &path, &[("a", "a"), ("b", "b")]);
    let before = fs::read(&path).unwrap();
    let answer = run(["demo", "--layer", path.to_str().unwrap()]);
    answer.says(0, &[]);
    for word in [
        "locator",
        "attach ms",
        "Slots in use",
        "Containers",
        "good: 3 images",
        "nothing left over",
    ] {
        assert!(answer.stdout.contains(word), "no {word:?} in {answer}");
    }
    assert_eq!(
        fs::read(&path).unwrap(),
        before,
        "the layer's image was written to"
    );
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_refuses_what_is_no_layer() {
    let dir = temp();
    let garbage = dir.path().join("garbage");
    fs::write(&garbage, vec![7; 1 << 20]).unwrap();
    let answer = run(["demo", "--json", "--layer", garbage.to_str().unwrap()]);
    answer.says(1, &["garbage", "advice:", "nothing is left"]);
    assert_eq!(answer.stdout, "");
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_u19_a_transport_is_refused_where_there_is_none_to_choose() {
    for transport in ["auto", "scsi", "vpmem"] {
        let answer = run(["demo", "--transport", transport]);
        answer.says(2, &["no --transport to choose", "--guest qemu"]);
        assert_eq!(common::run_id(&answer.stderr), None, "{answer}");
    }
}

#[test]
fn root_a_bench_measures_each_step_beside_bare_calls_and_leaves_nothing() {
    let dir = temp();
    let plot = dir.path().join("plot.svg");
    let answer = run([
        "bench",
        "--json",
        "--disks",
        "3,1,3",
        "--rounds",
        "2",
        "--linger",
        "--plot",
        plot.to_str().unwrap(),
    ]);
    answer.says(0, &[plot.to_str().unwrap()]);
    common::assert_measured(&answer, "local");
    for size in answer.json()["sizes"].as_array().unwrap() {
        for way in ["up", "down"] {
            let lingering = &size["lingering"][way];
            assert!(lingering["ours"]["p50"].as_f64().unwrap() > 0.0, "{answer}");
            assert!(lingering["ratio"].as_f64().is_some(), "{answer}");
        }
    }
    let drawn = fs::read_to_string(&plot).unwrap();
    for text in ["<svg", "up, floor", "down, floor", "</svg>"] {
        assert!(drawn.contains(text), "{text}: {drawn}");
    }
    assert_nothing_left(&answer, &dir);
    let png = dir.path().join("plot.png");
    let small = ["bench", "--disks", "1", "--rounds", "1", "--quiet"];
    let answer = run([&small[..], &["--plot", png.to_str().unwrap()]].concat());
    answer.says(0, &[]);
    let drawn = fs::read(&png).unwrap();
    assert!(drawn.starts_with(b"\x89PNG\r\n\x1a\n"), "{answer}");
    for text in ["floor p50", "attach", "unplug", "bare system calls"] {
        assert!(answer.stdout.contains(text), "{text}: {answer}");
    }
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_a_bench_that_cannot_be_says_so_before_anything_is_measured() {
    let dir = temp();
    let missing = dir.path().join("no/plot.svg");
    let refused = [
        (["--disks", "0"], 2, "from 1 to 256"),
        (["--disks", "1,257"], 2, "from 1 to 256"),
        (["--rounds", "x"], 2, "from 1 to 1000"),
        (["--plot", "plot.gif"], 2, ".svg or .png"),
        (["--plot", missing.to_str().unwrap()], 1, "cannot write"),
    ];
    for (words, code, says) in refused {
        let answer = run([&["bench"][..], &words].concat());
        answer.says(code, &[says]);
        assert_eq!(answer.stdout, "", "{answer}");
        assert_nothing_left(&answer, &dir);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
