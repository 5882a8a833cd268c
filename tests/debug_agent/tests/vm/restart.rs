//! A guest that is restored while time has passed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::rig::{self, Rig};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u08_a_restored_guest_has_the_clock_of_its_host() {
    // The state is at least this old: without help the guest's clock is as far behind.
    let age = Duration::from_secs(5);
    rig::start().await.shut_down().await;
    tokio::time::sleep(age).await;
    let rig = Rig::start().await;
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let clock = rig.ask(json!("clock")).await["clock"].as_u64().unwrap();
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let guest = Duration::from_millis(clock);
    let allowed = Duration::from_secs(2);
    assert!(
        before - allowed < guest && guest < after + allowed,
        "{guest:?} is not between {before:?} and {after:?}"
    );
    rig.end().await;
}
