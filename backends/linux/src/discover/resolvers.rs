//! Who finds the devices of which transport, and who takes them out.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{BackendError, BlockDevice, DeviceLocator, ErrorKind, Resolver, Unplugger};

use crate::device::{self, mapper};

/// How long a device may be busy for a moment before it counts as in use.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

/// The [`Resolver`]s of a guest by the transport whose locators they read; itself a resolver that
/// passes each locator to the one for its transport.
///
/// Cloning is cheap for what a guest has: a handful of entries.
#[derive(Clone, Default)]
pub struct Resolvers(BTreeMap<String, Arc<dyn Resolver>>);

impl Resolvers {
    /// A registry that knows no transport yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same registry with a resolver for a transport (`scsi`), in place of the one it may have
    /// had.
    #[must_use]
    pub fn with(mut self, transport: impl Into<String>, resolver: Arc<dyn Resolver>) -> Self {
        self.0.insert(transport.into(), resolver);
        self
    }

    /// The transports whose locators can be resolved, sorted.
    pub fn transports(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    fn get(&self, device: &DeviceLocator) -> Result<&Arc<dyn Resolver>, BackendError> {
        self.0
            .get(device.transport())
            .ok_or_else(|| unknown_transport(device, self.transports()))
    }
}

impl fmt::Debug for Resolvers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.transports()).finish()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for Resolvers {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        self.get(device)?.resolve(device).await
    }
}

/// The [`Unplugger`]s of a guest by transport; itself an unplugger that passes each locator to the
/// one for its transport.
///
/// A transport that has a resolver but no unplugger of its own gets the generic treatment: the
/// device is proven free and what is cached is written to it, and nothing is removed, because how
/// to remove a device is the transport's knowledge.
#[derive(Clone, Default)]
pub struct Unpluggers {
    own: BTreeMap<String, Arc<dyn Unplugger>>,
    resolvers: Resolvers,
}

impl Unpluggers {
    /// A registry with the generic treatment for all transports that `resolvers` knows.
    pub fn new(resolvers: Resolvers) -> Self {
        Unpluggers {
            own: BTreeMap::new(),
            resolvers,
        }
    }

    /// The same registry with an unplugger for a transport, in place of the one it may have had.
    #[must_use]
    pub fn with(mut self, transport: impl Into<String>, unplugger: Arc<dyn Unplugger>) -> Self {
        self.own.insert(transport.into(), unplugger);
        self
    }

    /// The transports whose devices can be unplugged, sorted.
    pub fn transports(&self) -> impl Iterator<Item = &str> {
        let mut all: Vec<&str> = self.resolvers.transports().collect();
        all.extend(self.own.keys().map(String::as_str));
        all.sort_unstable();
        all.dedup();
        all.into_iter()
    }

    async fn let_go(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let resolver = self
            .resolvers
            .get(device)
            .map_err(|_| unknown_transport(device, self.transports()))?;
        let found = match resolver.resolve(device).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        let done = match found.range {
            None => device::let_go(&found.path, DEFAULT_TIMEOUT).await,
            Some(range) => mapper::let_go_range(&found.path, range, DEFAULT_TIMEOUT).await,
        };
        match done {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }
}

impl fmt::Debug for Unpluggers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.transports()).finish()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for Unpluggers {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        match self.own.get(device.transport()) {
            Some(own) => own.unplug(device).await,
            None => self.let_go(device).await,
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
                path => Ok(BlockDevice {
                    path: path.into(),
                    range: Some(0..1),
                }),
            }
        }
    }

    fn two() -> Resolvers {
        Resolvers::new()
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
        let unpluggers = Unpluggers::new(two());
        for absent in ["a:1", "b:1"] {
            unpluggers.unplug(&absent.parse().unwrap()).await.unwrap();
        }
        let error = unpluggers
            .unplug(&"c:1".parse().unwrap())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable);
    }
}
