//! Mounting as a naive program does: what the agent's figures are compared with.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockmount_linux::sysfs::{self, Disk};
use blockmount_linux::uevent::wait_until;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::task::JoinSet;

use crate::Context;
use crate::protocol::{BareMount, BareTimes};
use crate::tables::is_scsi_address;

/// How long a device may take to appear.
const APPEARS: Duration = Duration::from_secs(20);
/// When the kernel is asked to look for those that it was not told of: QEMU loses plugs of disks that come in a burst, since a
/// guest has room for eight of them on each controller.
const ANNOUNCED: Duration = Duration::from_secs(10);
/// How long a disk that has just appeared may refuse to be read, on a busy machine, and how soon it is tried again.
const READABLE: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(1);
/// The highest count that makes sense.
const MOST: u32 = 10_000;

/// Mounts each as soon as its device is there, and answers in their order. Their devices are waited for
/// together: what is measured is the kernel, and not many who listen to it. Ten seconds after they have begun, the kernel is asked
/// to look for those that are missing then.
///
/// # Errors
///
/// If a device does not appear within 20 seconds, or cannot be mounted or unmounted. Nothing stays mounted.
pub async fn run_all(mounts: Vec<BareMount>) -> io::Result<Vec<BareTimes>> {
    let start = Instant::now();
    if mounts
        .iter()
        .any(|asked| !(1..=MOST).contains(&asked.count))
    {
        return Err(io::Error::other(format!("a count is from 1 to {MOST}")));
    }
    let mut times = vec![BareTimes::default(); mounts.len()];
    let mut missing: Vec<(usize, BareMount)> = mounts.into_iter().enumerate().collect();
    let mut tasks = JoinSet::new();
    let mut deadline = start + ANNOUNCED;
    let waited = loop {
        if missing.is_empty() {
            break Ok(());
        }
        let (found, rest) = match next_found(missing, deadline).await {
            Ok(found) => found,
            Err(failure) => break Err(failure),
        };
        missing = rest;
        if found.is_empty() && deadline == start + ANNOUNCED {
            deadline = start + APPEARS;
            if let Err(failure) = look_for(&missing).await {
                break Err(failure);
            }
        } else if found.is_empty() {
            let devices: Vec<&str> = missing.iter().map(|(_, asked)| &*asked.device).collect();
            let devices = devices.join(", ");
            break Err(io::Error::other(format!(
                "no device {devices} within {APPEARS:?}"
            )));
        }
        let at = microseconds(start);
        for (index, asked, node) in found {
            tasks.spawn_blocking(move || (index, repeat(&asked, &node, start, at)));
        }
    };
    // Each comes to its end, also where another has failed: nothing stays mounted behind the answer.
    let mut failed = waited.err();
    while let Some(ended) = tasks.join_next().await {
        match ended.context(|| "a bare mount was lost".to_owned())? {
            (index, Ok(took)) => times[index] = took,
            (_, Err(failure)) => failed = Some(failure),
        }
    }
    failed.map_or(Ok(times), Err)
}

/// What was found, and what is missing still.
type Sorted = (Vec<(usize, BareMount, PathBuf)>, Vec<(usize, BareMount)>);

/// Waits until at least one of the devices is there. At the deadline, what is found is nothing.
async fn next_found(missing: Vec<(usize, BareMount)>, deadline: Instant) -> io::Result<Sorted> {
    let devices: Vec<String> = missing
        .iter()
        .map(|(_, asked)| asked.device.clone())
        .collect();
    let look = move || {
        let nodes: Vec<Option<PathBuf>> = devices.iter().map(|device| node(device)).collect();
        Ok(nodes.iter().any(Option::is_some).then_some(nodes))
    };
    let Some(nodes) = wait_until(deadline, look).await.map_err(io::Error::other)? else {
        return Ok((Vec::new(), missing));
    };
    let (mut found, mut rest) = (Vec::new(), Vec::new());
    for ((index, asked), node) in missing.into_iter().zip(nodes) {
        match node {
            Some(node) => found.push((index, asked, node)),
            None => rest.push((index, asked)),
        }
    }
    Ok((found, rest))
}

/// Has the kernel look for SCSI disks.
async fn look_for(missing: &[(usize, BareMount)]) -> io::Result<()> {
    let missing = missing.iter().map(|(_, asked)| asked.device.clone());
    let disks: Vec<String> = missing.filter(|device| is_scsi_address(device)).collect();
    let look = move || {
        for disk in disks {
            let (host, disk) = disk.split_once(':').unwrap_or_default();
            let host = format!("/sys/class/scsi_host/host{host}");
            let asked = sysfs::command(Path::new(&host), "scan", &disk.replace(':', " "));
            asked.map_err(io::Error::other)?;
        }
        Ok(())
    };
    tokio::task::spawn_blocking(look).await?
}

/// The node of a device that is there. Of a disk by its SCSI address: as soon as it has a name.
fn node(device: &str) -> Option<PathBuf> {
    if !is_scsi_address(device) {
        let node = Path::new("/dev").join(Path::new(device).file_name()?);
        return node.exists().then_some(node);
    }
    let mut names = fs::read_dir(scsi(device).join("block")).ok()?.flatten();
    let node = Path::new("/dev").join(names.next()?.file_name());
    // Open before it is announced means that it does not answer yet.
    fs::File::open(&node).is_ok().then_some(node)
}

/// The directory of a SCSI device.
fn scsi(address: &str) -> PathBuf {
    Path::new("/sys/bus/scsi/devices").join(address)
}

fn repeat(asked: &BareMount, node: &Path, start: Instant, found: u64) -> io::Result<BareTimes> {
    let what = || {
        format!(
            "cannot mount {} at {}",
            node.display(),
            asked.target.display()
        )
    };
    let data = CString::new(asked.data.as_str()).context(what)?;
    let flags = match asked.read_only {
        true => MountFlags::RDONLY,
        false => MountFlags::empty(),
    };
    let target = asked.target.ancestors();
    let made: Vec<&Path> = target.take_while(|path| !path.exists()).collect();
    fs::create_dir_all(&asked.target).context(what)?;
    let mut times = BareTimes {
        found,
        ..BareTimes::default()
    };
    let mut mount_all = || {
        for _ in 0..asked.count {
            let before = Instant::now();
            mount_readable(&asked.device, || {
                mount(
                    node,
                    &asked.target,
                    asked.filesystem.as_str(),
                    flags,
                    data.as_c_str(),
                )
            })
            .context(what)?;
            times.mount.push(microseconds(before));
            times.mounted.push(microseconds(start));
            let before = Instant::now();
            unmount(&asked.target, UnmountFlags::NOFOLLOW)
                .context(|| format!("cannot unmount {}", asked.target.display()))?;
            times.unmount.push(microseconds(before));
        }
        Ok(())
    };
    let done = mount_all();
    for directory in made {
        // In vain while another mount needs it, which removes it then.
        let _ = fs::remove_dir(directory);
    }
    done.map(|()| times)
}

/// Mounts, again for 20 seconds while that fails with an I/O error: in a burst of hot-plugs a disk that has just appeared
/// may refuse its first reads, and a mount of it right then fails; or the question for its size, and then all mounts do.
fn mount_readable(device: &str, mount: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
    let deadline = Instant::now() + READABLE;
    loop {
        match mount() {
            Err(Errno::IO) if Instant::now() < deadline => {
                if is_scsi_address(device) {
                    // If it is in vain, the next mount says so.
                    let _ = Disk::ensure_measured(&scsi(device));
                }
                std::thread::sleep(AGAIN);
            }
            done => return done,
        }
    }
}

fn microseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(device: &str, target: &Path) -> BareMount {
        BareMount {
            device: device.to_owned(),
            filesystem: "tmpfs".to_owned(),
            target: target.to_owned(),
            read_only: true,
            data: String::new(),
            count: 3,
        }
    }

    #[tokio::test]
    async fn root_mounts_and_unmounts_as_often_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let targets = [dir.path().join("a/b"), dir.path().join("c")];
        let mounts = targets.iter().map(|target| asked("null", target)).collect();
        let times = run_all(mounts).await.unwrap();
        for times in &times {
            let lengths = [&times.mount, &times.mounted, &times.unmount].map(Vec::len);
            assert_eq!(lengths, [3, 3, 3]);
            assert!(times.found <= times.mounted[0] && times.mounted.is_sorted());
        }
        assert_eq!(times.len(), 2);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn one_failure_is_told_after_all_have_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut wrong = asked("null", &dir.path().join("x"));
        wrong.filesystem = "nosuchfs".to_owned();
        let error = run_all(vec![wrong]).await.unwrap_err().to_string();
        assert!(error.contains("cannot mount /dev/null"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut none = asked("null", &dir.path().join("x"));
        none.count = 0;
        assert!(run_all(vec![none]).await.is_err());
    }

    #[test]
    fn a_device_is_a_name_below_dev() {
        assert_eq!(node("null").unwrap(), Path::new("/dev/null"));
        assert_eq!(node("../dev/null").unwrap(), Path::new("/dev/null"));
        assert!(node("..").is_none() && node("").is_none() && node("99:0:0:0").is_none());
    }
}
