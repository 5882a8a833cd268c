//! A runtime over loop devices that is killed at each gate and at random moments, also while it recovers from the kill before,
//! and the next one that goes on.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockmount::{DeviceLocator, Disk, Manager, Recovery};
use blockmount_linux::LinuxGuest;
use blockmount_loopback::{LoopTransport, LoopUnplugger, SCHEME};
use common::kills::{self, Gate, Plan, Runtime, World};
use common::{image, in_kernel, temp};

/// This machine, with the images in a directory.
struct Local(PathBuf);

impl Runtime for Local {
    async fn recover(&self, gate: Gate) -> Recovery {
        let mark = self.0.file_name().unwrap().to_str().unwrap();
        let loops = Arc::new(LoopTransport::builder().mark(mark).build().unwrap());
        let engine = LinuxGuest::builder()
            .resolver(SCHEME, loops.clone())
            .unplugger(SCHEME, Arc::new(LoopUnplugger::default()))
            .overlay_mark(mark);
        let engine = engine.journal(self.0.join("engine")).await.unwrap();
        let guest = gate.guard(engine);
        let builder = Manager::builder()
            .transport(gate.guard(loops))
            .unplugger(guest.clone())
            .mounter(guest.clone())
            .combiner(guest)
            .mount_root(self.0.join("mounts"));
        let journal = gate.journal(&self.0.join("state"));
        builder.recover(journal).await.unwrap()
    }

    fn tree(&self) -> PathBuf {
        self.0.join("tree")
    }

    fn images(&self) -> &Path {
        &self.0
    }

    async fn assert_attached(&self, disk: &Disk, locator: &DeviceLocator) {
        let file = format!("/sys/block/loop{}/loop/backing_file", locator.address());
        let file = fs::read_to_string(file).unwrap();
        assert_eq!(Path::new(file.trim_end()), disk.source());
    }

    async fn list(&self, directory: &Path, id: &str) -> Vec<String> {
        assert_eq!(fs::read_to_string(directory.join("id")).unwrap(), id);
        let files = fs::read_dir(directory).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    async fn write(&self, file: &Path) {
        fs::write(file, "x").unwrap();
    }
}

#[test]
fn root_a_runtime_that_is_killed_at_any_moment_loses_nothing() {
    if let Some(directory) = kills::runtime_directory() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(kills::run(&Local(directory)));
    }
    let directory = temp();
    let path = |name: &str| directory.path().join(name);
    image("erofs", path("0.img"), &[("id", "of 0")]);
    image("ext4", path("1.img"), &[("id", "of 1")]);
    image("ext4", path("scratch.img"), &[]);
    let test = "root_a_runtime_that_is_killed_at_any_moment_loses_nothing";
    let name = directory.path().file_name().unwrap().to_owned();
    let mut world = World::new(test, directory.path(), true, || in_kernel(&name));
    world.play(&Plan {
        kills: 40,
        gates: 100,
        moments: Duration::from_millis(250),
        longest: Duration::from_secs(5),
        rounds: 25,
    });
}
