//! The registry of transports: how devices of each scheme are found and unplugged.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{BackendError, BlockDevice, DeviceLocator, ErrorKind, Resolver, Unplugger};

use crate::device::{free, mapper};

/// How long a device may be busy for a moment before it counts as in use.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

/// The transports of a guest: for each scheme (`scsi`), the [`Resolver`] of its locators and, if it has one of its
/// own, its [`Unplugger`]. Itself a resolver and an unplugger, which pass each locator on by its scheme.
///
/// A device whose transport has no unplugger is proven free and flushed when it is unplugged, and nothing is removed:
/// only the transport knows how to remove a device.
///
/// Cloning is cheap for what a guest has: a handful of entries.
#[derive(Clone, Default)]
pub struct Transports(BTreeMap<String, Entry>);

#[derive(Clone, Default)]
struct Entry {
    resolver: Option<Arc<dyn Resolver>>,
    unplugger: Option<Arc<dyn Unplugger>>,
}

impl Transports {
    /// A registry without any transport.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same registry with a resolver for a scheme, in place of the one it may have had.
    #[must_use]
    pub fn with(mut self, scheme: impl Into<String>, resolver: Arc<dyn Resolver>) -> Self {
        self.0.entry(scheme.into()).or_default().resolver = Some(resolver);
        self
    }

    /// The same registry with an unplugger for a scheme, in place of the one it may have had.
    #[must_use]
    pub fn with_unplugger(
        mut self,
        scheme: impl Into<String>,
        unplugger: Arc<dyn Unplugger>,
    ) -> Self {
        self.0.entry(scheme.into()).or_default().unplugger = Some(unplugger);
        self
    }

    /// The schemes that are known, sorted.
    pub fn schemes(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    fn get(&self, device: &DeviceLocator) -> Result<&Entry, BackendError> {
        let known = self.0.get(device.transport());
        known.ok_or_else(|| unknown_transport(device, self.schemes()))
    }
}

impl fmt::Debug for Transports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.schemes()).finish()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for Transports {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        match &self.get(device)?.resolver {
            Some(resolver) => resolver.resolve(device).await,
            None => Err(unknown_transport(device, self.schemes())),
        }
    }

    async fn measure(&self, device: &DeviceLocator) -> Result<bool, BackendError> {
        match &self.get(device)?.resolver {
            Some(resolver) => resolver.measure(device).await,
            None => Err(unknown_transport(device, self.schemes())),
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for Transports {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        if let Some(unplugger) = &self.get(device)?.unplugger {
            return unplugger.unplug(device).await;
        }
        let free = async {
            let found = self.resolve(device).await?;
            match found.range {
                None => free::release(&found.path, DEFAULT_TIMEOUT).await,
                Some(range) => mapper::release_range(&found.path, range, DEFAULT_TIMEOUT).await,
            }
        };
        match free.await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }
}

fn unknown_transport<'a>(
    device: &DeviceLocator,
    known: impl Iterator<Item = &'a str>,
) -> BackendError {
    let known: Vec<&str> = known.collect();
    let known = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    BackendError::unsuitable(format!(
        "this guest knows no transport {:?} (of device {device}); it knows: {known}",
        device.transport(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fixed(&'static str);

    #[async_trait]
    impl Resolver for Fixed {
        async fn resolve(&self, _: &DeviceLocator) -> Result<BlockDevice, BackendError> {
            match self.0 {
                "" => Err(BackendError::not_found("gone")),
                path => Ok(BlockDevice::new(path).with_range(0..1)),
            }
        }
    }

    fn two() -> Transports {
        Transports::new()
            .with("a", Arc::new(Fixed("/dev/blockmount-a")))
            .with("b", Arc::new(Fixed("")))
    }

    #[tokio::test]
    async fn dispatches_by_transport_and_names_what_it_knows() {
        let found = two().resolve(&"a:1".parse().unwrap()).await.unwrap();
        assert_eq!(found.path.to_str(), Some("/dev/blockmount-a"));
        let error = two()
            .resolve(&"scsi:0/3".parse().unwrap())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable);
        assert!(error.message().ends_with("it knows: a, b"), "{error}");
    }

    #[tokio::test]
    async fn the_generic_unplugger_takes_absence_for_done() {
        let transports = two();
        for absent in ["a:1", "b:1"] {
            transports.unplug(&absent.parse().unwrap()).await.unwrap();
        }
        let error = transports
            .unplug(&"c:1".parse().unwrap())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable);
    }
}
