//! Who finds a slot or a path taken by what is only to be torn down, or only lingers, has it torn down first.

use std::pin::Pin;
use std::sync::Arc;

use super::{Driver, Lingering, Table};
use crate::{DiskId, Error, ErrorKind, Step};

type Clearing = Pin<Box<dyn Future<Output = bool> + Send>>;

/// The tables whose resources stand on each other, from the top down: each tear-down releases what the next table tears
/// down. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct Tables {
    tables: Arc<[Arc<dyn Clear>]>,
    /// Of all of them.
    lingering: Lingering,
}

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
        Tables {
            tables: [table.clone() as Arc<dyn Clear>].into(),
            lingering: table.lingering.clone(),
        }
    }

    /// The same with these above.
    pub(crate) fn below(&self, above: &Tables) -> Self {
        let tables = above.tables.iter().chain(&*self.tables);
        Tables {
            tables: tables.cloned().collect(),
            lingering: self.lingering.clone(),
        }
    }

    /// Asks, and asks again if a slot or a path was taken by what is only to be torn down, is on its way down, or lingers.
    pub(crate) async fn clearing<T, F: Future<Output = Result<T, Error>>>(
        &self,
        mut ask: impl FnMut() -> F,
    ) -> Result<T, Error> {
        let mut means = Means::default();
        loop {
            let error = match ask().await {
                Err(error) if is_taken(&error) => error,
                answer => return answer,
            };
            // Boxed, since few come to it.
            if !Box::pin(self.clear_for(&error, &mut means)).await {
                return Err(error);
            }
        }
    }

    /// Whether it is worth to ask again.
    async fn clear_for(&self, error: &Error, means: &mut Means) -> bool {
        let Means {
            pending,
            all,
            leaving,
        } = means;
        (pending.is_first() && self.clear().await)
            || match error.kind() {
                // One at a time, the least recently used first.
                ErrorKind::Full => self.lingering.make_room().await,
                // Any of them may have the path or the name.
                _ => all.is_first() && self.lingering.clear().await,
            }
            // What lingered may be on its way down for somebody else.
            || (self.let_linger() && leaving.is_first() && self.clear().await)
    }

    /// Whether anything can linger.
    pub(crate) fn let_linger(&self) -> bool {
        self.lingering.is_on()
    }

    /// Tears down what lingers of a disk whose file has changed.
    pub(crate) async fn clear_disk(&self, disk: &DiskId) -> Result<(), Error> {
        self.lingering.clear_disk(disk).await
    }

    async fn clear(&self) -> bool {
        let mut cleared = false;
        for table in &*self.tables {
            cleared |= table.clone().clear().await;
        }
        cleared
    }
}

fn is_taken(error: &Error) -> bool {
    // A journal that is full has no slot for a disk.
    error.step() != Step::Record && matches!(error.kind(), ErrorKind::Full | ErrorKind::Conflict)
}

/// What is tried for one request, once each.
#[derive(Default)]
struct Means {
    pending: Once,
    all: Once,
    leaving: Once,
}

/// Whether something was tried.
#[derive(Default)]
struct Once(bool);

impl Once {
    fn is_first(&mut self) -> bool {
        !std::mem::replace(&mut self.0, true)
    }
}
