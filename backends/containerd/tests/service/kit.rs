//! A machine with loop devices, images to mount, and what is left at the end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use blockmount::{Manager, ManagerBuilder};
use blockmount_containerd::{Mount, Plan, plan};
use blockmount_linux::LinuxGuest;
use blockmount_loopback::{LoopTransport, LoopUnplugger, SCHEME, bound_loops};

/// A directory for one test, and the loop devices of its machine by their mark.
pub(crate) struct Machine {
    directory: tempfile::TempDir,
    mark: String,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let name = directory.path().file_name().unwrap().to_str().unwrap();
        let mark = format!("blockmount-{}", name.trim_start_matches('.'));
        Machine { directory, mark }
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where the mount points are.
    pub(crate) fn root(&self) -> PathBuf {
        self.at("mounts")
    }

    /// The builder of a manager as a process that starts now has it.
    pub(crate) async fn builder(&self) -> ManagerBuilder {
        let loops = LoopTransport::builder().mark(&self.mark).max_devices(4096);
        let loops = Arc::new(loops.build().unwrap());
        let engine = LinuxGuest::builder()
            .resolver(SCHEME, loops.clone())
            .unplugger(SCHEME, Arc::new(LoopUnplugger::default()))
            .overlay_mark(&self.mark)
            .journal(&self.at("guest-journal"))
            .await
            .unwrap();
        Manager::builder()
            .transport(loops)
            .unplugger(engine.clone())
            .mounter(engine.clone())
            .combiner(engine.clone())
            .binder(engine)
            .mount_root(self.root().join("images"))
    }

    pub(crate) async fn manager(&self) -> Manager {
        self.builder().await.build()
    }

    pub(crate) fn plan(&self, list: &[Mount], name: &str) -> Plan {
        plan(list, &self.root().join(name)).unwrap()
    }

    /// An erofs with files, each a name and its content.
    pub(crate) fn erofs(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let tree = self.at(&format!("{name}.tree"));
        fs::create_dir(&tree).unwrap();
        for (file, content) in files {
            fs::write(tree.join(file), content).unwrap();
        }
        let image = self.at(&format!("{name}.erofs"));
        run(Command::new("mkfs.erofs")
            .arg("--quiet")
            .args([&image, &tree]));
        fs::remove_dir_all(tree).unwrap();
        image
    }

    /// What is mounted below this machine's directory, and how many loop devices it has.
    pub(crate) fn left(&self) -> (Vec<String>, usize) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = self.directory.path().to_str().unwrap();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        let points = points.filter(|point| point.starts_with(own));
        let loops = bound_loops().unwrap().into_iter();
        let loops = loops.filter(|device| device.mark() == self.mark);
        (points.map(str::to_owned).collect(), loops.count())
    }

    /// Nothing is mounted or attached, and no mount point is left.
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.left(), (Vec::new(), 0));
        let root = self.root();
        let points: Vec<PathBuf> = match fs::read_dir(&root) {
            Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
            Err(_) => Vec::new(),
        };
        assert_eq!(points, Vec::<PathBuf>::new());
    }
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

pub(crate) fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A layer as the erofs snapshotter describes it.
pub(crate) fn layer(image: &Path) -> Mount {
    Mount::new("erofs", image.to_str().unwrap())
        .option("ro")
        .option("loop")
}

/// The file that an active snapshot is written to.
pub(crate) fn writable(image: &Path) -> Mount {
    Mount::new("mkfs/ext4", image.to_str().unwrap())
        .option("rw")
        .option("loop")
        .option("X-containerd.mkfs.fs=ext4")
        .option("X-containerd.mkfs.size=16MiB")
}

/// The overlay of an active snapshot over so many layers.
pub(crate) fn overlay(layers: usize) -> Mount {
    Mount::new("format/mkdir/overlay", "overlay")
        .option("X-containerd.mkdir.path={{ mount 0 }}/upper:0755")
        .option("X-containerd.mkdir.path={{ mount 0 }}/work:0755")
        .option("workdir={{ mount 0 }}/work")
        .option("upperdir={{ mount 0 }}/upper")
        .option(format!("lowerdir={{{{ overlay 1 {layers} }}}}"))
}
