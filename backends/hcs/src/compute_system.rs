//! The service below: what changes a VM and knows about it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockmount_bridge::gcs::Hresult;
use thiserror::Error;

use crate::documents::{ErrorDocument, ModifySettingRequest, Properties, PropertyQuery};

/// One VM of Hyper-V, as the Host Compute Service has it. On Windows `HcsSystem` is one.
///
/// The two sides of the contract:
///
/// - *Any number of calls are under way at once.* No lock of the implementor may be held while the service works on one.
/// - *Every wait ends.* The implementor has a deadline of its own, and answers [`HcsError::TimedOut`] when it has passed. It
///   must then have cancelled the request, so that it does not come to effect much later.
/// - *A failure is all or nothing.* An error with a number means that the service has answered and that nothing has changed, but
///   for the numbers that say that it does not know either.
/// - Futures are let finish. If one is dropped nevertheless, the request may still come to effect.
#[async_trait]
pub trait ComputeSystem: Send + Sync + 'static {
    /// Changes the VM, and returns when that is done.
    ///
    /// # Errors
    ///
    /// What the service says, or that it says nothing.
    async fn modify(&self, request: &ModifySettingRequest) -> Result<(), HcsError>;

    /// Asks for properties of the VM. Changes nothing.
    ///
    /// # Errors
    ///
    /// As for [`modify`](Self::modify).
    async fn properties(&self, query: &PropertyQuery) -> Result<Properties, HcsError>;
}

/// One VM can serve several attachers.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ComputeSystem + ?Sized> ComputeSystem for Arc<S> {
    async fn modify(&self, request: &ModifySettingRequest) -> Result<(), HcsError> {
        (**self).modify(request).await
    }

    async fn properties(&self, query: &PropertyQuery) -> Result<Properties, HcsError> {
        (**self).properties(query).await
    }
}

/// Why the service has not done as asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HcsError {
    /// It says so.
    #[error("{message} ({result})")]
    Failed {
        /// The number of the error.
        result: Hresult,
        /// What the service says.
        message: String,
    },
    /// It has not answered in time, and the request was cancelled.
    #[error("the host compute service has not answered within {0:?}")]
    TimedOut(Duration),
    /// It has answered with something that cannot be read.
    #[error("the answer of the host compute service cannot be read: {0}")]
    Unreadable(String),
    /// It was not asked, because the request cannot be put in its words.
    #[error("{0}")]
    Unsendable(String),
}

impl HcsError {
    /// The error for a result, with what its error document says, if there is one.
    pub fn failed(result: Hresult, document: Option<&str>) -> Self {
        let document = document.and_then(ErrorDocument::from_json);
        let said = document.map(|document| document.said()).unwrap_or_default();
        let message = match said.is_empty() {
            false => said,
            true => "the host compute service does not say why".to_owned(),
        };
        HcsError::Failed { result, message }
    }
}
