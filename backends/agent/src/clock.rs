//! The clock and the random numbers of a guest that may have been restored from a saved state.
#![allow(unsafe_code)] // Two ioctls of the kernel's random number generator; the reasons are at the calls.

use std::fs::{File, OpenOptions};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockmount_bridge::Greeting;
use rustix::ioctl::{NoArg, Setter, ioctl};
use rustix::time::{ClockId, Timespec, clock_settime};
use tracing::{info, warn};

/// How far the clock may be off: a greeting takes its time, too.
const ALLOWED: Duration = Duration::from_millis(100);

/// The most random bytes that a host gives.
const MOST: usize = 64;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`.
const ADD_ENTROPY: u32 = 0x4008_5203;
const RESEED: u32 = 0x5207;

/// `struct rand_pool_info`, with its bytes.
#[repr(C)]
struct PoolInfo {
    /// How much entropy the bytes have, in bits.
    entropy_count: i32,
    /// How many bytes there are.
    size: i32,
    bytes: [u8; MOST],
}

/// Takes over what a host tells when it connects.
pub(crate) fn learn(greeting: Greeting) {
    if let Some(time) = greeting.time
        && let Err(error) = set_clock(time)
    {
        warn!(%error, "cannot set the clock to the host's");
    }
    if let Err(error) = add_entropy(&greeting.entropy) {
        warn!(%error, "cannot use the host's random bytes");
    }
}

fn set_clock(time: SystemTime) -> io::Result<()> {
    let now = SystemTime::now();
    let off = time
        .duration_since(now)
        .unwrap_or_else(|earlier| earlier.duration());
    if off <= ALLOWED {
        return Ok(());
    }
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).map_err(io::Error::other)?;
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: since.subsec_nanos().into(),
    };
    clock_settime(ClockId::Realtime, time)?;
    info!(?off, "set the clock to the host's");
    Ok(())
}

/// Credits random bytes, and has the generator use them at once: guests of one saved state would draw the same numbers.
fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    let length = bytes.len().min(MOST);
    if length == 0 {
        return Ok(());
    }
    let mut pool = PoolInfo {
        entropy_count: 8 * length as i32,
        size: length as i32,
        bytes: [0; MOST],
    };
    pool.bytes[..length].copy_from_slice(&bytes[..length]);
    let random: File = OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the header, and as many bytes behind it as `size` says, which are there.
    unsafe { ioctl(&random, Setter::<ADD_ENTROPY, PoolInfo>::new(pool)) }?;
    // SAFETY: the request has no argument.
    unsafe { ioctl(&random, NoArg::<RESEED>::new()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_right_is_left_alone() {
        // Without a privilege, setting it would fail.
        set_clock(SystemTime::now()).unwrap();
        add_entropy(&[]).unwrap();
    }
}
