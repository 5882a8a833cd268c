//! What is bound at one moment, looked at once for all calls that ask at the same time.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use blockmount_linux::is_absent;

use crate::device::{Device, Status, readable_numbers};

/// A device that this process has bound already, which need not be opened to know what it is bound to.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub(crate) number: u32,
    pub(crate) status: Status,
}

/// All devices that are bound, and can be read or written.
#[derive(Debug)]
pub(crate) struct Look {
    began: Instant,
    pub(crate) bound: Vec<(u32, Status)>,
}

/// What calls of this process have bound, and their transports do not know yet.
static PENDING: Mutex<BTreeMap<u32, Status>> = Mutex::new(BTreeMap::new());

fn pending() -> MutexGuard<'static, BTreeMap<u32, Status>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device that was just bound, so that no look has to open it. Dropped when its transport knows it, or before it is unbound.
#[derive(Debug)]
pub(crate) struct Pending(u32);

impl Pending {
    pub(crate) fn new(number: u32, status: &Status) -> Self {
        pending().insert(number, status.clone());
        Pending(number)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        pending().remove(&self.0);
    }
}

/// The last look. Whoever waits for this waits for the look that it needs.
static LAST: Mutex<Option<Arc<Look>>> = Mutex::new(None);

/// A look at all devices that has begun since then: what was bound before is in it.
///
/// Of many calls at once, those that come while one looks share the next look, so that each device is opened twice and not
/// once for each of them.
///
/// `ours` is asked when the look begins.
pub(crate) fn look(since: Instant, ours: impl FnOnce() -> Vec<Claim>) -> io::Result<Arc<Look>> {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(look) = last.as_ref().filter(|look| look.began > since) {
        return Ok(Arc::clone(look));
    }
    let began = Instant::now();
    // What leaves these meanwhile is among the claims.
    let mut known = pending().clone();
    let claims = ours().into_iter();
    known.extend(claims.map(|claim| (claim.number, claim.status)));
    let mut bound = Vec::new();
    for number in readable_numbers()? {
        let status = match known.remove(&number) {
            Some(status) => Some(status),
            None => status_of(number)?,
        };
        bound.extend(status.map(|status| (number, status)));
    }
    let look = Arc::new(Look { began, bound });
    *last = Some(Arc::clone(&look));
    Ok(look)
}

fn status_of(number: u32) -> io::Result<Option<Status>> {
    match Device::open_known(number) {
        Ok(device) => device.status(),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}
