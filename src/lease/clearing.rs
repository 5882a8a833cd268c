//! Who finds a slot or a path taken by what is only to be torn down has it torn down first.

use std::pin::Pin;
use std::sync::Arc;

use super::{Driver, Table};
use crate::{Error, ErrorKind};

type Clearing = Pin<Box<dyn Future<Output = bool> + Send>>;

/// The tables whose resources stand on each other, from the top down: each tear-down releases what the next table tears
/// down. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct Tables(Arc<[Arc<dyn Clear>]>);

trait Clear: Send + Sync {
    fn clear(self: Arc<Self>) -> Clearing;
}

impl<D: Driver> Clear for Table<D> {
    fn clear(self: Arc<Self>) -> Clearing {
        Box::pin(async move { self.clear_pending().await })
    }
}

impl Tables {
    /// One table that stands alone.
    pub(crate) fn one<D: Driver>(table: &Arc<Table<D>>) -> Self {
        Tables([table.clone() as Arc<dyn Clear>].into())
    }

    /// The same with these above.
    pub(crate) fn below(&self, above: &Tables) -> Self {
        Tables(above.0.iter().chain(&*self.0).cloned().collect())
    }

    /// Asks, and asks once more if a slot or a path was taken by what is only to be torn down, or is on its way down.
    pub(crate) async fn clearing<T, F: Future<Output = Result<T, Error>>>(
        &self,
        mut ask: impl FnMut() -> F,
    ) -> Result<T, Error> {
        let mut cleared = false;
        loop {
            match ask().await {
                Err(error) if !cleared && is_taken(&error) && self.clear().await => cleared = true,
                answer => return answer,
            }
        }
    }

    async fn clear(&self) -> bool {
        let mut cleared = false;
        for table in &*self.0 {
            cleared |= table.clone().clear().await;
        }
        cleared
    }
}

fn is_taken(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Full | ErrorKind::Conflict)
}
