//! The model behind a stand-in for the service's library, so that the real calls, handles and callbacks run.
#![allow(unsafe_code)] // the stand-in is a library in C

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once};
use std::time::Duration;

use blockmount_bridge::gcs::Hresult;
use blockmount_hcs::documents::PropertyQuery;
use blockmount_hcs::{HcsDeadlines, HcsError, HcsSystem};
use tokio::runtime::Handle;

use super::{Model, Reply, error_document};

/// What the stand-in asks for.
const OPEN: u32 = 0;
const START: u32 = 1;
const MODIFY: u32 = 2;
const PROPERTIES: u32 = 3;
const GRANT: u32 = 4;
const GRANT_GROUP: u32 = 5;

/// The answer after which an operation never ends.
const NEVER: i32 = i32::MAX;

type Answer = unsafe extern "system" fn(*const u16, u32, *const u16, *mut u16, u32) -> i32;

#[link(name = "computecore.dll", kind = "raw-dylib", modifiers = "+verbatim")]
unsafe extern "system" {
    fn StandInServe(answer_call: Answer);
    fn StandInOpenHandles() -> i32;
    fn StandInCancelled() -> i32;
}

struct Served {
    model: Model,
    runtime: Handle,
    /// How many starts are to fail, and how.
    refuse_start: Option<Hresult>,
}

static SERVED: Mutex<BTreeMap<String, Served>> = Mutex::new(BTreeMap::new());
static GRANTS: Mutex<BTreeSet<(String, String)>> = Mutex::new(BTreeSet::new());
static NEXT: AtomicUsize = AtomicUsize::new(0);
static SERVE: Once = Once::new();

fn served() -> MutexGuard<'static, BTreeMap<String, Served>> {
    SERVED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Makes a model a VM of the stand-in, and gives its id.
pub(crate) fn serve(model: &Model) -> String {
    // SAFETY: the function is there for as long as the process.
    SERVE.call_once(|| unsafe { StandInServe(answer_call) });
    let id = format!("vm-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let served_model = Served {
        model: model.clone(),
        runtime: Handle::current(),
        refuse_start: None,
    };
    served().insert(id.clone(), served_model);
    id
}

pub(crate) async fn open(model: &Model, timeout: Duration) -> HcsSystem {
    let deadlines = HcsDeadlines {
        modify: timeout,
        properties: timeout,
    };
    HcsSystem::open_with(&serve(model), deadlines)
        .await
        .unwrap()
}

/// The next operation of a VM cannot even be started.
pub(crate) fn refuse_start(id: &str, result: Hresult) {
    served().get_mut(id).unwrap().refuse_start = Some(result);
}

/// Handles of VMs and operations that are not closed.
pub(crate) fn open_handles() -> i32 {
    // SAFETY: it reads a number.
    unsafe { StandInOpenHandles() }
}

/// How many operations were cancelled before their end.
pub(crate) fn cancelled() -> i32 {
    // SAFETY: it reads a number.
    unsafe { StandInCancelled() }
}

/// Who was granted access to what; `*` is every VM.
pub(crate) fn grants() -> BTreeSet<(String, String)> {
    GRANTS.lock().unwrap().clone()
}

/// Called by the stand-in, from threads of its own but for `OPEN`, `START` and the grants.
unsafe extern "system" fn answer_call(
    system: *const u16,
    what: u32,
    document: *const u16,
    answer: *mut u16,
    capacity: u32,
) -> i32 {
    // SAFETY: both end with a NUL.
    let (system, document) = unsafe { (read(system), read(document)) };
    let (result, said) = decide(&system, what, &document);
    let said: Vec<u16> = said.encode_utf16().chain([0]).collect();
    assert!(said.len() <= capacity as usize, "the answer fits");
    // SAFETY: there is room for it.
    unsafe { std::ptr::copy_nonoverlapping(said.as_ptr(), answer, said.len()) };
    result
}

unsafe fn read(text: *const u16) -> String {
    if text.is_null() {
        return String::new();
    }
    let units = (0..).map(|at| unsafe { *text.add(at) });
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    String::from_utf16(&units).unwrap()
}

fn decide(system: &str, what: u32, document: &str) -> (i32, String) {
    let number = |result: Hresult| (result.bits().cast_signed(), String::new());
    if what == GRANT || what == GRANT_GROUP {
        let who = if what == GRANT { system } else { "*" };
        let new = GRANTS
            .lock()
            .unwrap()
            .insert((who.to_owned(), document.to_owned()));
        return number(if new {
            Hresult::OK
        } else {
            Hresult::ALREADY_EXISTS
        });
    }
    let (model, runtime, refuse) = match served().get_mut(system) {
        None => return number(Hresult::from_bits(0x8037_010e)),
        Some(served) => {
            let refuse = (what == START)
                .then(|| served.refuse_start.take())
                .flatten();
            (served.model.clone(), served.runtime.clone(), refuse)
        }
    };
    match what {
        OPEN => number(Hresult::OK),
        START => number(refuse.unwrap_or(Hresult::OK)),
        MODIFY => reply(runtime.block_on(model.receive(document))),
        PROPERTIES => {
            let query: PropertyQuery = serde_json::from_str(document).unwrap();
            match model.describe(&query) {
                Ok(properties) => (0, properties.to_json()),
                Err(other) => reply(other),
            }
        }
        other => panic!("the stand-in asks for {other}"),
    }
}

fn reply(reply: Reply) -> (i32, String) {
    match reply {
        Reply::Done => (0, String::new()),
        Reply::Never => (NEVER, String::new()),
        Reply::Fails(HcsError::Failed { result, message }) => (
            result.bits().cast_signed(),
            error_document(result, &message),
        ),
        Reply::Fails(other) => panic!("{other:?}"),
    }
}
