//! A signal at any moment: everything is released, and the program says so.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{
    Answer, assert_nothing_left, finish, image, program, run, run_id, signal, temp,
};
use rustix::process::Signal;

/// The program, which no signal passes by: a shell without a terminal has what it starts in the background ignore SIGINT, and
/// nohup SIGHUP, until the program listens to them.
fn interruptible(arguments: &[&str]) -> Command {
    let program = program(arguments);
    let mut command = Command::new("env");
    command
        .arg("--default-signal")
        .arg(program.get_program())
        .args(program.get_args())
        .stdin(Stdio::null());
    command
}

/// Runs the program and sends a signal after a while.
fn interrupted(arguments: &[&str], after: Duration, with: Signal) -> Answer {
    let mut command = interruptible(arguments);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(after);
        signal(pid, with);
    });
    let answer = finish(child);
    sender.join().unwrap();
    answer
}

/// Parts of a run, spread evenly over it, in an order that differs from run to run.
fn parts(count: u32) -> impl Iterator<Item = f64> {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    let jitter = move |n: u32| {
        (seed.wrapping_mul(2_654_435_761).wrapping_add(n * 40_503) % 1_000) as f64 / 1e3
    };
    (0..).map(move |n| (f64::from(n % count) + jitter(n)) / f64::from(count))
}

/// Interrupts runs at so many moments and more, until a quarter of those has stopped one.
fn at_any_moment(arguments: &[&str], count: u32, dir: &tempfile::TempDir) {
    let time = || {
        let start = Instant::now();
        run(arguments).says(0, &[]);
        start.elapsed()
    };
    // The shorter of two: the first may have to read everything from the disk.
    let mut whole = time().min(time());
    let (mut rounds, mut stopped) = (0, 0);
    for part in parts(count) {
        let moment = whole.mul_f64(part);
        let with = [Signal::INT, Signal::TERM, Signal::HUP][rounds % 3];
        let answer = interrupted(arguments, moment, with);
        match answer.code {
            // Before the program listens, or after its work was done.
            None => assert_eq!(run_id(&answer.stderr), None, "at {moment:?}: {answer}"),
            // It has ended before, since the machine does less now.
            Some(0) => whole = moment.max(whole / 2),
            _ => {
                answer.says(130, &["interrupted by SIG", "nothing is left"]);
                assert_eq!(answer.stdout, "", "at {moment:?}: {answer}");
                stopped += 1;
            }
        }
        let (code, id) = (answer.code, run_id(&answer.stderr));
        eprintln!("{moment:?} of {whole:?}: {code:?} in run {id:?}");
        assert_nothing_left(&answer, dir);
        rounds += 1;
        let most = 5 * count as usize;
        assert!(rounds <= most, "{stopped} stopped in {rounds} rounds");
        if rounds >= count as usize && stopped >= count / 4 {
            return;
        }
    }
}

#[test]
fn root_demo_with_samples_at_4_moments() {
    // Few, since each demo makes its samples first: that takes 12 seconds of processor time.
    at_any_moment(&["demo", "--json"], 4, &temp());
}

#[test]
fn root_demo_with_images_at_20_moments() {
    let dir = temp();
    let paths = ["a", "b", "c"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    for (path, filesystem) in paths.iter().zip(["ext4", "erofs", "squashfs"]) {
        image(
            filesystem,
            path,
            &[
                ("a", "a"),
                ("b", "b"),
                (path.rsplit('/').next().unwrap(), "x"),
            ],
        );
    }
    let layers = [
        "demo", "--json", "--layer", &paths[0], "--layer", &paths[1], "--layer", &paths[2],
    ];
    at_any_moment(&layers, 20, &dir);
}

#[test]
fn root_mount_at_20_moments_of_its_set_up() {
    let dir = temp();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (top, base, at) = (path("top"), path("base"), path("at"));
    image("erofs", &top, &[("a", "a")]);
    image("ext4", &base, &[("b", "b")]);
    let layers = ["--layer", &top, "--layer", &base];
    let arguments = [&["mount", "--at", &at, "--scratch", "32M"][..], &layers].concat();
    for n in 1..=20 {
        // Users press Ctrl-C more than once: that must not leave anything either.
        let child = interruptible(&arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        let sender = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(n * 8));
            for _ in 0..1 + n % 3 {
                signal(pid, Signal::INT);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let answer = finish(child);
        sender.join().unwrap();
        match answer.code {
            None => assert_eq!(run_id(&answer.stderr), None, "{answer}"),
            Some(0) => answer.says(0, &["nothing is left"]),
            _ => answer.says(130, &["interrupted by SIGINT", "nothing is left"]),
        }
        assert!(!dir.path().join("at").exists(), "{answer}");
        assert_nothing_left(&answer, &dir);
    }
}
