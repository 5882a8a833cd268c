//! The engine as this agent offers it to its hosts: every path of a request is below the directories that they may use.

use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay,
    Presence, Unplugger, Usage, blocking,
};
use blockmount_linux::LinuxGuest;
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;

/// A guest that mounts only below its roots, and stacks only what is there.
#[derive(Debug, Clone)]
pub(crate) struct AgentGuest {
    pub(crate) engine: LinuxGuest,
    /// Anywhere if there are none.
    pub(crate) roots: Arc<[PathBuf]>,
    /// Whether the directory of a scratch is made if it is not there, as hosts of Hyper-V expect it.
    pub(crate) makes_scratch: bool,
}

impl AgentGuest {
    /// The overlay with its layers by paths without links; all of them below the roots.
    fn bound(&self, overlay: &Overlay) -> Result<Overlay, BackendError> {
        let mut bound = overlay.clone();
        for layer in &mut bound.layers {
            self.check(layer)?;
            // A link in a layer's image could lead out of the roots.
            *layer = std::fs::canonicalize(&*layer).map_err(|error| cannot_use(layer, error))?;
            self.check(layer)?;
        }
        if let Some(scratch) = &bound.scratch {
            // The engine follows no link on the way to it.
            self.check(scratch)?;
            if self.makes_scratch {
                make_directories(scratch).map_err(|error| cannot_use(scratch, error.into()))?;
            }
        }
        Ok(bound)
    }

    fn check(&self, path: &Path) -> Result<(), BackendError> {
        let leaves = path.components().any(|part| part == Component::ParentDir);
        let below = |root: &Path| path.starts_with(root) && path != root && !leaves;
        // A root may itself be reached through a link, as /var/run is.
        let within =
            |root: &PathBuf| below(root) || root.canonicalize().is_ok_and(|root| below(&root));
        if self.roots.is_empty() || self.roots.iter().any(within) {
            return Ok(());
        }
        let roots: Vec<String> = self
            .roots
            .iter()
            .map(|root| root.display().to_string())
            .collect();
        Err(BackendError::invalid(format!(
            "cannot use {} in an overlay: it must be below {}",
            path.display(),
            roots.join(" or ")
        ))
        .with_path(path))
    }
}

fn cannot_use(path: &Path, error: io::Error) -> BackendError {
    let message = format!("cannot use {} in an overlay", path.display());
    let error = match error.kind() {
        io::ErrorKind::NotFound => BackendError::not_found(message).with_source(error),
        _ => BackendError::invalid(message).with_source(error),
    };
    error.with_path(path)
}

/// Makes the directories of a path that are missing, through no symbolic link: the image on a scratch disk is not trusted.
fn make_directories(path: &Path) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = openat(CWD, "/", flags, Mode::empty())?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        at = match openat(&at, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                mkdirat(&at, name, Mode::from_raw_mode(0o755))?;
                openat(&at, name, flags, Mode::empty())?
            }
            opened => opened?,
        };
    }
    Ok(())
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Mounter for AgentGuest {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        self.engine.mount(device, target, options).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.engine.unmount(target).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.engine.usage(target).await
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        self.engine.trim(target).await
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        self.engine.grow(target, bytes).await
    }

    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Mounter::adopt(&self.engine, device, target, options).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl LayerCombiner for AgentGuest {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        let (guest, overlay) = (self.clone(), overlay.clone());
        let bound = blocking(move || guest.bound(&overlay)).await?;
        self.engine.combine(&bound).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.engine.separate(target).await
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        LayerCombiner::adopt(&self.engine, overlay).await
    }
}

/// The engine shows only what it has mounted, and that is below the roots.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Binder for AgentGuest {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        self.engine.bind(bind).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        self.engine.unbind(target).await
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        Binder::adopt(&self.engine, bind).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for AgentGuest {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.engine.unplug(device).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn guest(root: &Path, makes_scratch: bool) -> AgentGuest {
        AgentGuest {
            engine: LinuxGuest::builder().build(),
            roots: [root.to_owned()].into(),
            makes_scratch,
        }
    }

    #[tokio::test]
    async fn x08_every_path_of_an_overlay_is_below_the_roots() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("layer")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        let guest = guest(&root, false).await;
        let at = |name: &str| root.join(name);
        let whole = Overlay::new([at("layer")], at("t")).with_scratch(at("scratch"));
        assert_eq!(guest.bound(&whole).unwrap(), whole);
        for layer in [
            PathBuf::from("/etc"),
            at("link"),
            at("layer/../../etc"),
            root.clone(),
        ] {
            let error = guest.bound(&Overlay::new([layer], at("t"))).unwrap_err();
            assert_eq!(error.kind(), blockmount::ErrorKind::Invalid, "{error}");
        }
        for scratch in [PathBuf::from("/etc"), at("../scratch")] {
            let overlay = Overlay::new([at("layer")], at("t")).with_scratch(scratch);
            let error = guest.bound(&overlay).unwrap_err();
            assert_eq!(error.kind(), blockmount::ErrorKind::Invalid, "{error}");
        }
    }

    #[tokio::test]
    async fn f06_the_directory_of_a_scratch_is_made_for_a_host_of_hyper_v() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("layer")).unwrap();
        std::os::unix::fs::symlink("/tmp", root.join("link")).unwrap();
        let scratch = root.join("c/scratch/abc");
        let overlay = Overlay::new([root.join("layer")], root.join("c/rootfs"));
        let with = |scratch: &Path| overlay.clone().with_scratch(scratch);
        guest(&root, false).await.bound(&with(&scratch)).unwrap();
        assert!(!scratch.exists());
        let makes = guest(&root, true).await;
        makes.bound(&with(&scratch)).unwrap();
        assert!(scratch.is_dir());
        // Not through a link.
        let error = makes.bound(&with(&root.join("link/abc"))).unwrap_err();
        assert_eq!(error.kind(), blockmount::ErrorKind::Invalid, "{error}");
    }
}
