//! Paths in the guest: which are well formed, which are taken, which are made up.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::{BackendError, DeviceLocator, MountOptions};

mod live;
mod made_up;

use live::{Live, MountedAs, Taken, Tree, above, at_or_below};
use made_up::MadeUp;

/// The longest path that a Linux guest takes, in bytes (`PATH_MAX` less the final zero).
const MAX_LEN: usize = 4095;

/// What is live in one guest: which paths are taken, and how each device is mounted.
#[derive(Clone)]
pub(crate) struct Claims(Arc<Mutex<Live>>);

/// A path that is taken, and with it the right to mount a device there. Dropping it frees both.
pub(crate) struct Claim {
    claims: Claims,
    target: Arc<Path>,
    /// The number in a path that was made up.
    number: Option<u32>,
}

impl Claims {
    /// Paths are made up below `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        let live = Live::new(MadeUp::below(root));
        Claims(Arc::new(Mutex::new(live)))
    }

    /// Takes `target` (or a path that it makes up) for a mount of a device.
    pub(crate) fn mount(
        &self,
        device: &DeviceLocator,
        options: &MountOptions,
        target: Option<&Path>,
    ) -> Result<Claim, BackendError> {
        let live = &mut *self.live();
        live.ensure_compatible(device, options)?;
        let (target, number) = match target {
            Some(target) => {
                let key = live.free(target, None)?;
                let taken = Taken::Mount(device.clone(), options.clone());
                live.paths.insert(key, taken);
                (target.into(), None)
            }
            None => {
                let Live { made_up, paths, .. } = &mut *live;
                let is_free =
                    |key: &[u8]| at_or_below(paths, key).is_none() && above(paths, key).is_none();
                // With no path taken by name there is nothing to compare with.
                let (number, path) = made_up.next((!paths.is_empty()).then_some(is_free))?;
                made_up.put(number, device.clone());
                (path.into(), Some(number))
            }
        };
        let options = options.clone();
        live.add(device, MountedAs { options, number });
        Ok(self.claim(target, number))
    }

    /// Takes `target` for an overlay. It may lie below `scratch`, where its changes go.
    pub(crate) fn overlay(
        &self,
        target: &Path,
        scratch: Option<&Path>,
    ) -> Result<Claim, BackendError> {
        let scratch = scratch.map(comparable).transpose()?;
        let mut live = self.live();
        let key = live.free(target, scratch.as_deref())?;
        live.paths.insert(key, Taken::Tree(Tree::Overlay));
        Ok(self.claim(target.into(), None))
    }

    /// Takes `target` for a view.
    pub(crate) fn view(&self, target: &Path) -> Result<Claim, BackendError> {
        let mut live = self.live();
        let key = live.free(target, None)?;
        live.paths.insert(key, Taken::Tree(Tree::View));
        Ok(self.claim(target.into(), None))
    }

    fn claim(&self, target: Arc<Path>, number: Option<u32>) -> Claim {
        Claim {
            claims: self.clone(),
            target,
            number,
        }
    }

    /// Held for a few look-ups, never across a call of other code.
    fn live(&self) -> MutexGuard<'_, Live> {
        self.0.lock()
    }
}

impl Claim {
    pub(crate) fn target(&self) -> &Arc<Path> {
        &self.target
    }

    /// Keeps the path taken for good: what is there may stay.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let live = &mut *self.claims.live();
        if let Some(number) = self.number {
            if let Some(device) = live.made_up.give_back(number) {
                live.remove(&device, |mounted| mounted.number == Some(number));
            }
            return;
        }
        let key = comparable(&self.target).expect("it was comparable when it was taken");
        if let Some(Taken::Mount(device, options)) = live.paths.remove(&*key) {
            let ours = MountedAs {
                options,
                number: None,
            };
            live.remove(&device, |mounted| *mounted == ours);
        }
    }
}

/// The form in which two spellings of one path are equal, and whatever is below it begins with it
/// (`/a/b/`); or why it is no path in a guest.
fn comparable(target: &Path) -> Result<Vec<u8>, BackendError> {
    let invalid = |why: &str| {
        let shown: String = target.to_string_lossy().chars().take(128).collect();
        Err(BackendError::invalid(format!(
            "{shown:?} cannot be a target: {why}"
        )))
    };
    let bytes = target.as_os_str().as_encoded_bytes();
    if bytes.len() > MAX_LEN {
        return invalid("it is longer than 4,095 bytes");
    }
    if bytes.contains(&0) {
        return invalid("it has a zero byte");
    }
    let unified = match target.to_str() {
        // Case and the kind of slash make no difference to Windows.
        Some(text) if is_windows(text) => text.replace('\\', "/").to_lowercase().into_bytes(),
        _ if bytes.first() == Some(&b'/') => bytes.to_owned(),
        _ => return invalid("it is not absolute"),
    };
    let mut plain = Vec::with_capacity(unified.len() + 2);
    for name in unified.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return invalid("it has a '..' in it"),
            name => {
                plain.push(b'/');
                plain.extend_from_slice(name);
            }
        }
    }
    if plain.is_empty() {
        return invalid("it is the root directory");
    }
    plain.push(b'/');
    Ok(plain)
}

/// `c:\...`: a path in a Windows guest, on whatever host we run.
fn is_windows(path: &str) -> bool {
    let bytes = path.as_bytes();
    bytes.len() > 3 && bytes[0].is_ascii_alphabetic() && &bytes[1..3] == b":\\"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn claims() -> (Claims, DeviceLocator, MountOptions) {
        let device = DeviceLocator::new("scsi", "0/0").unwrap();
        (
            Claims::new("c:\\mounts\\scsi".into()),
            device,
            MountOptions::read_only(),
        )
    }

    #[test]
    fn windows_guests_know_no_case_and_two_slashes() {
        let (claims, device, options) = claims();
        let live = claims
            .mount(&device, &options, Some(Path::new("C:\\Mounts\\x")))
            .unwrap();
        assert_eq!(
            &**live.target(),
            Path::new("C:\\Mounts\\x"),
            "the guest gets the path as it was requested"
        );
        for target in ["c:\\mounts\\X", "c:\\mounts/x\\below", "c:\\MOUNTS"] {
            let taken = claims.mount(&device, &options, Some(Path::new(target)));
            assert_eq!(
                taken.err().map(|error| error.kind()),
                Some(ErrorKind::Conflict),
                "{target}"
            );
        }
        let made_up = claims.mount(&device, &options, None).unwrap();
        assert_eq!(&**made_up.target(), Path::new("c:\\mounts\\scsi\\m0"));
    }

    #[test]
    fn a_made_up_path_is_taken_like_any_other() {
        let device = DeviceLocator::new("scsi", "0/0").unwrap();
        let claims = Claims::new("/run/mounts".into());
        let mount = |target: Option<&str>| {
            claims.mount(&device, &MountOptions::read_only(), target.map(Path::new))
        };
        let _below_m1 = mount(Some("/run/mounts/m1/below")).unwrap();
        let first = mount(None).unwrap();
        let second = mount(None).unwrap();
        assert_eq!(&**first.target(), Path::new("/run/mounts/m0"));
        assert_eq!(
            &**second.target(),
            Path::new("/run/mounts/m2"),
            "m1 would hide what is below it"
        );
        for (target, why) in [
            (
                "/run/mounts/m0",
                "device scsi:0/0 is mounted there or below",
            ),
            (
                "/run/./mounts//m2/",
                "device scsi:0/0 is mounted there or below",
            ),
            ("/run", "device scsi:0/0 is mounted there or below"),
            ("/run/mounts", "device scsi:0/0 is mounted there or below"),
            (
                "/run/mounts/m2/a/b",
                "device scsi:0/0 is mounted above, at /run/mounts/m2/",
            ),
        ] {
            let refused = mount(Some(target)).err().unwrap().to_string();
            assert_eq!(refused, why, "{target}");
        }
        for free in [
            "/run/mounts/m3",
            "/run/mounts/m02",
            "/run/mounts/m",
            "/run/mountsm0",
            "/m0",
        ] {
            mount(Some(free)).unwrap();
        }
        let scratch = Some(Path::new("/run/mounts/m0"));
        let inside = claims
            .overlay(Path::new("/run/mounts/m0/tree"), scratch)
            .unwrap();
        let deeper = claims.overlay(Path::new("/run/mounts/m0/tree/deeper"), scratch);
        assert!(deeper.is_err(), "the overlay is nearer than the scratch");
        drop((inside, first, second));
        assert_eq!(
            &**mount(None).unwrap().target(),
            Path::new("/run/mounts/m0")
        );
        mount(Some("/run/mounts/m2")).unwrap();
    }

    #[test]
    fn no_path_is_made_up_below_what_is_no_directory_of_a_guest() {
        let (_, device, options) = claims();
        // With the longest of these, only the numbers of one digit fit.
        let longest = format!("/{}", "x".repeat(MAX_LEN - "/".len() - "/m0".len()));
        for (root, usable) in [("relative", 0), ("/a/../b", 0), (longest.as_str(), 10)] {
            let claims = Claims::new(root.into());
            let mount = || claims.mount(&device, &options, None);
            let live: Vec<_> = (0..usable).map(|_| mount().unwrap()).collect();
            let refused = mount().err().map(|error| error.kind());
            assert_eq!(refused, Some(ErrorKind::Invalid), "{root:.20}");
            drop(live);
            assert_eq!(mount().is_ok(), usable > 0, "{root:.20}");
        }
    }

    #[test]
    fn each_of_several_mounts_of_a_device_counts_until_its_own_end() {
        let device = DeviceLocator::new("scsi", "0/0").unwrap();
        let claims = Claims::new("/run/mounts".into());
        let mount = |flag: &str, target: Option<&str>| {
            let options = MountOptions::builder()
                .options(["ro", flag])
                .build()
                .unwrap();
            claims.mount(&device, &options, target.map(Path::new))
        };
        let writer = || claims.mount(&device, &MountOptions::default(), None);
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut live = [
                mount("nodev", None).ok(),
                mount("noexec", Some("/a")).ok(),
                mount("nosuid", None).ok(),
            ];
            for ended in order {
                assert!(writer().is_err(), "a reader is left");
                assert!(live[ended].take().is_some());
            }
            assert!(writer().is_ok());
        }
        let live = claims.live();
        assert!(live.mounts.is_empty() && live.more_mounts.is_empty());
    }

    #[test]
    fn a_dropped_claim_frees_its_path_its_number_and_its_device() {
        let (claims, device, options) = claims();
        for _ in 0..3 {
            let claim = claims
                .mount(&device, &MountOptions::default(), None)
                .unwrap();
            assert!(
                claims.mount(&device, &options, None).is_err(),
                "a writer has it alone"
            );
            assert_eq!(&**claim.target(), Path::new("c:\\mounts\\scsi\\m0"));
        }
        let live = claims.live();
        assert!(live.paths.is_empty() && live.mounts.is_empty() && live.made_up.is_empty());
    }
}
