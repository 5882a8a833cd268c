//! How held runs say how they are doing: as tables, as JSON, as metrics and as a page.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::common::servers::{Client, Server, layer, overlay, writable};
use crate::common::{
    self, LONGEST, assert_nothing_left, hold, image, kill_after, program, run, signal, temp,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

fn name(dir: &TempDir) -> String {
    common::servers::name(dir)
}

fn erofs(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("layer.erofs");
    image("erofs", &path, &[("file", "x")]);
    path
}

#[test]
fn root_a_held_mount_says_how_it_is_doing() {
    let dir = temp();
    let (image, at) = (erofs(&dir), dir.path().join("tree"));
    let name = name(&dir);
    let words = [
        "--name",
        &name,
        "--scratch",
        "8M",
        "--at",
        at.to_str().unwrap(),
        "--layer",
    ];
    let held = hold(words.into_iter().chain([image.to_str().unwrap()]));
    let held = held.unwrap_or_else(|answer| panic!("{answer}"));
    let only = ["status", "--name", &name];
    let answer = run(only);
    answer.says(0, &[]);
    for words in [
        "mount ",
        "this machine",
        "layer.erofs",
        "1 layer, scratch",
        "attach",
        "p99",
    ] {
        assert!(answer.stdout.contains(words), "{words}: {answer}");
    }
    let too_long = |line: &&str| line.chars().count() > 80;
    assert_eq!(answer.stdout.lines().find(too_long), None, "{answer}");
    let json = run(only.into_iter().chain(["--json"])).json();
    let status = &json["runs"][0];
    assert_eq!(status["process"], held.pid());
    let manager = &status["manager"];
    assert_eq!(
        manager["holders"],
        json!([{"name": name, "of": format!("the stack at {}", at.display())}])
    );
    let slots = manager["slots"].as_array().unwrap();
    assert!(
        slots
            .iter()
            .all(|slot| slot["transport"] == "loop" && slot["usage"] == "occupied")
    );
    assert_eq!(slots.len(), 2);

    // A line each second, until a signal.
    let mut watch = program(only);
    watch.args(["--watch", "--json"]).stdout(Stdio::piped());
    let mut watch = watch.spawn().unwrap();
    let watched = kill_after(watch.id(), LONGEST);
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let lines: Vec<Value> = lines
        .take(2)
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect();
    assert!(
        lines
            .iter()
            .all(|line| line["runs"][0]["process"] == held.pid()),
        "{lines:?}"
    );
    signal(watch.id(), Signal::INT);
    assert!(watch.wait().unwrap().success());
    drop(watched);

    for picture in pictures(&only, 12) {
        let lines: Vec<&str> = picture.split("\r\n").collect();
        assert!(lines.len() <= 12, "{picture:?}");
        let [first, .., last] = &lines[..] else {
            panic!("{picture:?}")
        };
        assert!(first.starts_with("mount "), "{picture:?}");
        assert_eq!(*last, "Ctrl-C ends it");
    }

    held.kill();
    let ended = run(only);
    ended.says(1, &[]);
    assert!(
        ended.stdout.contains(&format!("mount --resume {name}")),
        "{ended}"
    );
    let held = hold(["--resume", &name]).unwrap_or_else(|answer| panic!("{answer}"));
    run(only).says(0, &[]);
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    assert_eq!(run(only).stdout, "nothing is held\n");
}

/// What a terminal with so many lines is shown within some seconds, without what positions and clears.
fn pictures(words: &[&str], rows: u32) -> Vec<String> {
    let watch = program(words);
    let words: Vec<&str> = watch
        .get_args()
        .map(|word| word.to_str().unwrap())
        .collect();
    let watch = watch.get_program().to_str().unwrap();
    let command = format!(
        "stty rows {rows} cols 80; timeout -s INT 3 {watch} {} --watch",
        words.join(" ")
    );
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]);
    let output = script.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (text, _) = text.rsplit_once("\u{1b}[J").unwrap();
    let pictures = text.split("\u{1b}[H").skip(1);
    let pictures = pictures.map(|picture| picture.replace("\u{1b}[K", "").replace("\u{1b}[J", ""));
    let pictures: Vec<String> = pictures.collect();
    assert!(pictures.len() > 1, "{text:?}");
    pictures
}

/// What a server answers to one request, and what it says of it.
fn get(mut stream: impl std::io::Read + std::io::Write, path: &str) -> (String, String) {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

/// The series of a text in OpenMetrics, each with its value. The text has to keep the format's rules.
fn series(text: &str) -> BTreeMap<String, f64> {
    assert!(text.ends_with("# EOF\n"), "{text}");
    let (mut found, mut families) = (BTreeMap::new(), BTreeSet::new());
    let mut family = String::new();
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(comment) = line.strip_prefix("# ") {
            let (kind, rest) = comment.split_once(' ').unwrap();
            let name = rest.split(' ').next().unwrap().to_owned();
            if kind == "HELP" {
                assert!(families.insert(name.clone()), "{name} is there twice");
                family = name.clone();
            }
            assert!(
                ["HELP", "TYPE", "UNIT"].contains(&kind) && name == family,
                "{line}"
            );
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        assert!(series.starts_with(&family), "{line} is not of {family}");
        assert!(
            found
                .insert(series.to_owned(), value.parse().unwrap())
                .is_none(),
            "{line}"
        );
    }
    found
}

#[test]
fn root_a_server_offers_metrics_and_a_page() {
    let _others = common::by_name();
    let dir = temp();
    let image = erofs(&dir);
    let at = dir.path().join("metrics");
    let unix = format!("unix:{}", at.display());
    let server = Server::ready(&dir, &["--metrics", &unix]);
    assert_eq!(at.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let get = |path: &str| get(UnixStream::connect(&at).unwrap(), path);
    let (head, body) = get("/");
    assert!(
        head.starts_with("http/1.1 200") && head.contains("text/html"),
        "{head}"
    );
    assert!(
        head.contains("content-security-policy: default-src 'none'"),
        "{head}"
    );
    assert!(
        body.contains("All are free") && body.contains("Nothing was done yet"),
        "{body}"
    );

    let mut client = Client::of(&dir);
    let hostile = dir.path().join("<script>.img");
    client.activate("web", &[writable(&hostile), layer(&image), overlay(1)]);
    client.activate("view", &[layer(&image)]);
    let (head, body) = get("/metrics");
    assert!(
        head.contains("application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{head}"
    );
    let found = series(&body);
    for (series, value) in [
        ("blockmount_activations{namespace=\"default\"}", 2.0),
        ("blockmount_attachments{state=\"up\"}", 2.0),
        ("blockmount_attachments{state=\"pending\"}", 0.0),
        (
            "blockmount_slots{transport=\"loop\",usage=\"occupied\"}",
            2.0,
        ),
        ("blockmount_stacks{state=\"up\"}", 1.0),
        (
            "blockmount_step_duration_seconds_count{step=\"attach\"}",
            2.0,
        ),
        (
            "blockmount_step_duration_seconds_bucket{step=\"attach\",le=\"+Inf\"}",
            2.0,
        ),
        ("blockmount_step_failures_total{step=\"attach\"}", 0.0),
    ] {
        // The order of labels says nothing.
        let other = "blockmount_step_duration_seconds_bucket{le=\"+Inf\",step=\"attach\"}";
        let value_found = found
            .get(series)
            .or_else(|| found.get(other).filter(|_| series.contains("+Inf")));
        assert_eq!(value_found, Some(&value), "{series}: {body}");
    }
    assert!(
        body.contains("# UNIT blockmount_step_duration_seconds seconds"),
        "{body}"
    );
    assert!(
        body.contains("# TYPE blockmount_step_failures counter"),
        "{body}"
    );
    let (_, page) = get("/");
    assert_eq!(
        page.matches("<rect class=occupied").count(),
        2 + 1,
        "{page}"
    );
    assert!(page.contains("attach: 2 calls, 0 failed"), "{page}");
    assert!(
        page.contains("&lt;script&gt;.img") && !page.contains("<script"),
        "{page}"
    );
    let (_, tree) = get("/status.json");
    let tree: Value = serde_json::from_str(&tree).unwrap();
    let activations = &tree["runs"][0]["activations"];
    assert_eq!(activations.as_array().unwrap().len(), 2);
    assert!(get("/etc/passwd").0.starts_with("http/1.1 404"));
    let mut post = UnixStream::connect(&at).unwrap();
    post.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    post.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");

    // Clients that say nothing or nonsense keep nobody else out.
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&at).unwrap()).collect();
    let mut nonsense = UnixStream::connect(&at).unwrap();
    let _refused = nonsense.write_all(&[b'x'; 4096]);
    drop(silent);
    assert!(get("/metrics").0.starts_with("http/1.1 200"));

    client.deactivate("web");
    client.deactivate("view");
    drop(client);
    assert_eq!(
        series(&get("/metrics").1)["blockmount_attachments{state=\"up\"}"],
        0.0
    );
    server.end().says(0, &[]);
    assert!(!at.exists());
}

#[test]
fn root_metrics_are_offered_over_tcp_at_a_port_of_the_systems_choice() {
    let _others = common::by_name();
    let dir = temp();
    let mut server = Server::ready(&dir, &["--metrics", "127.0.0.1:0"]);
    let said = server.wait_for("metrics and a page at http://");
    let (_, address) = said.split_once("http://").unwrap();
    let address = address.trim_end_matches('/');
    let (head, body) = get(TcpStream::connect(address).unwrap(), "/metrics");
    assert!(
        head.starts_with("http/1.1 200") && body.contains("blockmount_build_info"),
        "{head}"
    );
    let taken = run([
        "serve",
        "--address",
        dir.path().join("x").to_str().unwrap(),
        "--name",
        "other-of-test",
        "--metrics",
        address,
    ]);
    taken.says(1, &["cannot offer metrics at"]);
    assert!(taken.stderr.contains("in use"), "{taken}");
    server.end().says(0, &[]);
}
