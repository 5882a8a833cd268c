//! A lease, and the name of who holds it.

use std::sync::Arc;

use crate::Error;
use crate::holders::Holder;
use crate::journal::RecordKey;
use crate::lease::{Driver, Lease, Which};
use crate::release::{Releasing, give_back};

/// What every handle of a caller is: one share of what is up, for a holder if it has a name.
pub(crate) struct Named<D: Driver> {
    /// Dropped first: who has released is no holder any more, whatever becomes of the tear-down.
    holder: Option<Arc<Holder>>,
    lease: Lease<D>,
}

impl<D: Driver> Named<D> {
    /// Writes down whose it is. Releases it if that fails; `explain` says then what it was.
    pub(crate) async fn held_by(
        mut self,
        holder: Option<Holder>,
        key: impl FnOnce(&Self) -> RecordKey,
        explain: impl FnOnce(&Self, Error) -> Error,
    ) -> Result<Self, Error> {
        let Some(holder) = holder else {
            return Ok(self);
        };
        if let Err(error) = holder.hold(key(&self)) {
            let error = explain(&self, error);
            give_back(self.releasing()).await;
            return Err(error);
        }
        self.holder = Some(Arc::new(holder));
        Ok(self)
    }

    pub(crate) fn resource(&self) -> &D::Resource {
        self.lease.resource()
    }

    pub(crate) fn key(&self) -> &D::Key {
        self.lease.key()
    }

    pub(crate) fn releasing(self) -> Releasing {
        drop(self.holder);
        self.lease.release()
    }

    /// The same for what must not linger.
    pub(crate) fn releasing_now(self) -> Releasing {
        drop(self.holder);
        self.lease.release_now()
    }

    pub(crate) fn which(&self) -> Which<D> {
        self.lease.which()
    }

    /// Leaves what is up as it is, and its holder in the journal, for the next process.
    pub(crate) fn abandon(self) {
        self.holder.as_deref().inspect(|holder| holder.keep());
        self.lease.abandon();
    }

    /// One more share of it, for a holder or for what is above it.
    pub(crate) fn share(&self, holder: Option<Holder>) -> Self {
        Named {
            holder: holder.map(Arc::new),
            lease: self.lease.share(),
        }
    }

    /// One more share of it for the same holder, who has it until both are released.
    pub(crate) fn again(&self) -> Self {
        Named {
            holder: self.holder.clone(),
            lease: self.lease.share(),
        }
    }
}

/// For nobody by name.
impl<D: Driver> From<Lease<D>> for Named<D> {
    fn from(lease: Lease<D>) -> Self {
        let holder = None;
        Named { holder, lease }
    }
}
