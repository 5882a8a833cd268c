//! A machine with loop devices, images to mount, and what is left at the end.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use blockmount::{Manager, ManagerBuilder};
use blockmount_containerd::{Mount, Plan, plan};
use blockmount_linux::LinuxGuest;
use blockmount_loopback::{LoopTransport, LoopUnplugger, SCHEME, bound_loops};

/// A directory for one test, and the loop devices of its machine by their mark.
pub(crate) struct Machine {
    directory: PathBuf,
    mark: String,
    /// Nothing in a process that is killed: the directory is its parent's.
    _owner: Option<tempfile::TempDir>,
}

/// The variable with the directory of a test, for a process that it starts and kills.
const DIRECTORY: &str = "BLOCKMOUNT_TEST_DIRECTORY";
/// What such a process says once it may be killed.
pub(crate) const READY: &str = "ready to be killed";

impl Machine {
    pub(crate) fn new() -> Self {
        let owner = tempfile::tempdir().unwrap();
        Machine::over(owner.path().to_owned(), Some(owner))
    }

    fn over(directory: PathBuf, owner: Option<tempfile::TempDir>) -> Self {
        let name = directory.file_name().unwrap().to_str().unwrap();
        Machine {
            mark: format!("blockmount-{}", name.trim_start_matches('.')),
            directory,
            _owner: owner,
        }
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The machine of the process that has started this one.
    pub(crate) fn of_parent() -> Self {
        Machine::over(std::env::var_os(DIRECTORY).unwrap().into(), None)
    }

    /// A machine beside others of the same test, in a directory of its own.
    pub(crate) fn one_of_several(&self, name: &str) -> Self {
        let directory = self.at(name);
        fs::create_dir_all(&directory).unwrap();
        Machine {
            directory,
            mark: format!("{}-{name}", self.mark),
            _owner: None,
        }
    }

    /// Runs a test that is ignored in a process of its own until it says that it is ready, and kills that.
    pub(crate) fn kill_once_ready(&self, test: &str) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(DIRECTORY, &self.directory)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        let is_ready = said.map_while(Result::ok).any(|line| line.ends_with(READY));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_ready);
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
        let own = self.directory.to_str().unwrap();
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
