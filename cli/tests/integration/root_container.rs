//! A container for real: an image of busybox whose layers are erofs, activated through the service, and run by runc.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::containers::{self, BUSYBOX};
use crate::common::servers::{self, Client, Server};
use crate::common::{self, eventually, in_kernel, run, temp};
use serde_json::json;
use tempfile::TempDir;

/// A container: where its tree is, and what runc calls it.
struct Container<'a> {
    dir: &'a TempDir,
    name: &'a str,
    root: PathBuf,
}

impl<'a> Container<'a> {
    /// Activates the image for it, with a scratch of its own.
    fn activate(dir: &'a TempDir, client: &mut Client, name: &'a str, layers: &[PathBuf]) -> Self {
        let root = containers::activate(dir, client, name, layers);
        Container { dir, name, root }
    }

    fn id(&self) -> String {
        format!("{}-{}", servers::name(self.dir), self.name)
    }

    /// A bundle as a runtime is given it, with a process in it.
    fn bundle(&self, words: &[&str]) -> PathBuf {
        let bundle = self.dir.path().join(format!("bundle-{}", self.name));
        fs::create_dir_all(&bundle).unwrap();
        let namespaces = ["pid", "mount", "ipc", "uts"].map(|kind| json!({"type": kind}));
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": words, "env": ["PATH=/bin"], "cwd": "/"},
            "root": {"path": self.root, "readonly": false},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": namespaces},
        });
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle
    }

    fn runc(&self) -> Command {
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(self.dir.path().join("runc"));
        runc.stdin(Stdio::null());
        runc
    }

    /// What a process says that runs in it to its end.
    #[track_caller]
    fn run(&self, words: &[&str]) -> String {
        let bundle = self.bundle(words);
        let output = self
            .runc()
            .arg("run")
            .arg("--bundle")
            .arg(bundle)
            .arg(self.id())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Container<'_> {
    /// A test that fails leaves no process.
    fn drop(&mut self) {
        let delete = self.runc().args(["delete", "--force", &self.id()]).output();
        drop(delete);
    }
}

#[test]
fn root_two_containers_run_over_layers_that_they_share() {
    let _others = common::by_name();
    assert!(
        Path::new(BUSYBOX).exists(),
        "tests/setup.sh all installs busybox-static"
    );
    let dir = temp();
    let layers = containers::layers(&dir);
    let server = Server::ready(&dir, &[]);
    let mut client = Client::of(&dir);
    let one = Container::activate(&dir, &mut client, "one", &layers);
    let two = Container::activate(&dir, &mut client, "two", &layers);
    // Each sees the topmost layer, and what it has written itself.
    assert_eq!(one.run(&["/app/hello", "one"]), "app\nfrom one\n");
    assert_eq!(two.run(&["/app/hello", "two"]), "app\nfrom two\n");
    assert_eq!(one.run(&["/bin/cat", "/app/written"]), "from one\n");
    let status = run(["status", "--json", "--name", &servers::name(&dir)]).json();
    let manager = &status["runs"][0]["manager"];
    assert_eq!(
        manager["attachments"].as_array().unwrap().len(),
        2 + 2,
        "{manager}"
    );

    // A container that runs keeps its tree.
    let bundle = one.bundle(&["/bin/sleep", "600"]);
    let mut sleeping = one.runc();
    sleeping
        .arg("run")
        .arg("--detach")
        .arg("--bundle")
        .arg(bundle)
        .arg(one.id());
    assert!(
        sleeping
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    );
    // The other's goes, and what both have stays for the one that runs; its own tree cannot go.
    client.deactivate("two");
    let busy = client.ask(&json!({"call": "Deactivate", "request": {"name": "one"}}));
    assert_eq!(busy["code"], "FAILED_PRECONDITION", "{busy}");
    let text = run(["status", "--name", &servers::name(&dir)]);
    assert!(text.stdout.contains("pending"), "{text}");
    assert!(
        one.runc()
            .args(["delete", "--force", &one.id()])
            .status()
            .unwrap()
            .success()
    );
    eventually("the end of a container", || {
        client
            .ask(&json!({"call": "Deactivate", "request": {"name": "one"}}))
            .get("answer")
            .is_some()
    });
    drop(client);
    server.end().says(0, &[]);
    assert_eq!(
        in_kernel(dir.path().file_name().unwrap()),
        Vec::<String>::new()
    );
}
