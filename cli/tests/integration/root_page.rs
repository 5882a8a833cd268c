//! The page of a server as a browser lays it out.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::servers::{Client, Server, layer, overlay, writable};
use crate::common::{self, LONGEST, image, kill_after, temp};
use serde_json::Value;
use tempfile::TempDir;

/// Put behind the page: what the browser has laid out, in pixels.
const MEASURE: &str = r#"<script>
const box = element => { const {left, top, right, bottom} = element.getBoundingClientRect(); return [left, top, right, bottom]; };
const svgs = [...document.querySelectorAll('svg')].map(svg => ({
    label: svg.getAttribute('aria-label'), box: box(svg),
    drawn: [...svg.querySelectorAll('rect, text, line')].map(one => ({name: one.tagName, text: one.textContent, box: box(one)}))}));
const measured = {window: innerWidth, room: document.documentElement.clientWidth, page: document.documentElement.scrollWidth, svgs,
    filled: getComputedStyle(document.querySelector('rect.occupied')).fill};
const said = document.createElement('pre');
said.id = 'measured';
said.textContent = JSON.stringify(measured);
document.body.append(said);
</script>"#;

/// The policy that the server sends with the page, and its body.
fn page(at: &Path) -> (String, String) {
    let mut stream = UnixStream::connect(at).unwrap();
    write!(stream, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let policy = head
        .lines()
        .find_map(|line| line.strip_prefix("content-security-policy: "));
    (policy.unwrap().to_owned(), body.to_owned())
}

/// What Chromium makes of a page in a window of this width.
fn measured(dir: &TempDir, (policy, body): &(String, String), width: u32) -> Value {
    let file = dir.path().join("page.html");
    // As strict as the server, but for the script of this test.
    let policy = format!(
        "<meta http-equiv=Content-Security-Policy content=\"{policy}; script-src 'unsafe-inline'\">"
    );
    let body = body.replacen(
        "<meta charset=utf-8>",
        &format!("<meta charset=utf-8>{policy}"),
        1,
    );
    fs::write(&file, format!("{body}{MEASURE}")).unwrap();
    let profile = dir.path().join("profile");
    let browser = Command::new("chromium-headless-shell")
        // Root has no sandbox, and a container little shared memory.
        .args(["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args([&format!("--window-size={width},1000"), "--dump-dom"])
        .arg(format!("file://{}", file.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let watch = kill_after(browser.id(), LONGEST);
    let output = browser.wait_with_output().unwrap();
    drop(watch);
    let dom = String::from_utf8(output.stdout).unwrap();
    let (_, said) = dom
        .split_once("id=\"measured\">")
        .unwrap_or_else(|| panic!("{dom}"));
    serde_json::from_str(said.split_once("</pre>").unwrap().0).unwrap()
}

fn sides(element: &Value) -> [f64; 4] {
    serde_json::from_value(element["box"].clone()).unwrap()
}

#[test]
fn root_the_page_is_laid_out_in_a_browser_however_narrow() {
    let _alone = common::alone();
    let dir = temp();
    let base = dir
        .path()
        .join(format!("{}.erofs", "long-name-".repeat(12)));
    image("erofs", &base, &[("file", "x")]);
    let at = dir.path().join("metrics");
    let server = Server::ready(&dir, &["--metrics", &format!("unix:{}", at.display())]);
    let mut client = Client::of(&dir);
    let scratch = dir.path().join("rw.img");
    client.activate("web", &[writable(&scratch), layer(&base), overlay(1)]);
    let page = page(&at);
    client.deactivate("web");
    drop(client);
    server.end().says(0, &[]);

    for width in [640, 1280] {
        let seen = measured(&dir, &page, width);
        assert_eq!(seen["window"], width);
        // Nothing has to be scrolled for sideways.
        assert_eq!(seen["page"], seen["room"]);
        assert_eq!(seen["filled"], "rgb(43, 123, 186)", "no style");
        let svgs = seen["svgs"].as_array().unwrap();
        let labels: Vec<&str> = svgs
            .iter()
            .map(|svg| svg["label"].as_str().unwrap())
            .collect();
        assert_eq!(
            labels,
            ["the slots that are not free", "how long each step takes"]
        );
        for svg in svgs {
            let [left, top, right, bottom] = sides(svg);
            assert!(right - left > 500.0 && bottom - top > 20.0, "{svg}");
            let drawn = svg["drawn"].as_array().unwrap();
            let texts = drawn.iter().filter(|one| one["name"] == "text");
            assert!(texts.clone().count() > 0);
            for one in drawn {
                let inner = sides(one);
                let is_inside = inner[0] >= left - 1.0
                    && inner[1] >= top - 1.0
                    && inner[2] <= right + 1.0
                    && inner[3] <= bottom + 1.0;
                assert!(is_inside, "{width}: {one} is not in {:?}", sides(svg));
            }
            // No text is written over another.
            let texts: Vec<&Value> = texts.collect();
            for (index, one) in texts.iter().enumerate() {
                for other in &texts[index + 1..] {
                    let ([l, t, r, b], [left, top, right, bottom]) = (sides(one), sides(other));
                    let is_apart = r <= left || right <= l || b <= top || bottom <= t;
                    assert!(is_apart, "{width}: {one} is over {other}");
                }
            }
        }
    }
}
