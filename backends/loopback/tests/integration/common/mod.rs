//! What the tests share: images of their own, and looking at nothing but what is their own.
// Each test file is a crate and uses some of it; a panic here is a test's failure message.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use blockmount_loopback::{BoundLoop, LoopTransport, LoopTransportBuilder, bound_loops};

/// A directory for images, and a mark that no other test has.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub mark: String,
}

impl Bench {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mark = format!(
            "test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        // On disk: a memory filesystem would have no direct I/O in older kernels.
        Bench {
            dir: tempfile::tempdir_in("/var/tmp").unwrap(),
            mark,
        }
    }

    pub fn transport(&self) -> LoopTransport {
        self.builder().build().unwrap()
    }

    /// Marked, and quick to find that a device is busy.
    pub fn builder(&self) -> LoopTransportBuilder {
        LoopTransport::builder()
            .mark(&self.mark)
            .busy_timeout(Duration::from_millis(100))
    }

    /// An image of a size in bytes; all zeros.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    pub fn ext4(&self, name: &str) -> PathBuf {
        let path = self.image(name, 8 << 20);
        run("mkfs.ext4", &["-q", "-F", path.to_str().unwrap()]);
        path
    }

    /// An image with the names of an erofs, and one with the data of its files.
    pub fn erofs_with_blob(&self) -> [PathBuf; 2] {
        let [image, blob, tree] = ["merged", "blob", "tree"].map(|name| self.path(name));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("file"), [7; 8192]).unwrap();
        let blob_option = format!("--blobdev={}", blob.display());
        let [at, from] = [&image, &tree].map(|path| path.to_str().unwrap());
        run(
            "mkfs.erofs",
            &["--quiet", "--chunksize=4096", &blob_option, at, from],
        );
        [image, blob]
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The devices that carry this bench's mark, from the kernel.
    pub fn bound(&self) -> Vec<BoundLoop> {
        with_mark(&self.mark)
    }

    /// Proves that nothing is left; closing by a blocking thread may take a moment.
    pub fn assert_nothing_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.bound().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(self.bound(), []);
    }
}

pub fn with_mark(mark: &str) -> Vec<BoundLoop> {
    bound_loops()
        .unwrap()
        .into_iter()
        .filter(|bound| bound.mark() == mark)
        .collect()
}

pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A mount for as long as the value lives.
pub struct Mounted(PathBuf);

impl Mounted {
    pub fn new(device: &Path, target: &Path) -> Self {
        std::fs::create_dir_all(target).unwrap();
        run(
            "mount",
            &[device.to_str().unwrap(), target.to_str().unwrap()],
        );
        Mounted(target.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.0.to_str().unwrap()]);
    }
}
