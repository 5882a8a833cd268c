//! Why the kernel does not permit a mount. Only ever for messages.

use std::fs;

/// Bit of `CAP_SYS_ADMIN` in the sets of capabilities.
const SYS_ADMIN: u64 = 1 << 21;

/// What this process lacks to mount block devices, as far as it can be seen, and what to do about it.
pub(crate) fn missing() -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let users = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    explain(&status, &users).to_owned()
}

fn explain(status: &str, users: &str) -> &'static str {
    let field = |name: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
    };
    let capabilities = field("CapEff").and_then(|bits| u64::from_str_radix(bits, 16).ok());
    let is_root = field("Uid").is_some_and(|ids| ids.split_whitespace().nth(1) == Some("0"));
    match capabilities {
        Some(bits) if bits & SYS_ADMIN == 0 && is_root => {
            "this process is root without the capability CAP_SYS_ADMIN, as in a container: grant it, or run it outside"
        }
        Some(bits) if bits & SYS_ADMIN == 0 => {
            "this process has not the capability CAP_SYS_ADMIN: run it as root"
        }
        _ if !is_initial(users) => {
            "this process is root in a user namespace, in which block devices cannot be mounted: run it as root of the system"
        }
        _ if field("Seccomp").is_some_and(|mode| mode != "0") => {
            "a filter of system calls (seccomp) is in force, as in a container: allow mount(2), or run it outside"
        }
        _ => "a security module may refuse it: see its log",
    }
}

/// Whether the map of user ids is that of the first namespace: each id is itself.
fn is_initial(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"]) || map.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u11_says_what_is_missing() {
        let status = |uid: u32, capabilities: &str, seccomp: u32| {
            format!(
                "Name:\tx\nUid:\t0\t{uid}\t0\t0\nCapEff:\t{capabilities}\nSeccomp:\t{seccomp}\n"
            )
        };
        let (all, none) = ("000001ffffffffff", "00000000a80425fb");
        let (initial, mapped) = ("         0          0 4294967295\n", "0 1000 1\n");
        for (status, users, expected) in [
            (status(0, none, 2), initial, "root without the capability"),
            (status(1000, none, 0), initial, "run it as root"),
            (status(0, all, 2), mapped, "user namespace"),
            (status(0, all, 2), initial, "seccomp"),
            (status(0, all, 0), initial, "security module"),
            (String::new(), "", "security module"),
        ] {
            let said = explain(&status, users);
            assert!(said.contains(expected), "{status} {users}: {said}");
        }
    }
}
