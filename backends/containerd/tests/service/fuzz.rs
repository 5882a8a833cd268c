//! Bytes that no client of ours sends: the server answers or disconnects, does no harm, and goes on.
//!
//! `BLOCKMOUNT_FUZZ_SECONDS` says for how long; 2 if it does not. `BLOCKMOUNT_FUZZ_SEED` begins with other bytes.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockmount::Manager;
use blockmount::testing::{FakeVm, MemoryJournal};
use blockmount_containerd::service::{Activations, Options, Peers, listen, serve};

/// How long a server may take for one answer.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Words that the service and its lists know, which random bytes would not come upon.
const WORDS: [&str; 20] = [
    "erofs",
    "ext4",
    "overlay",
    "bind",
    "loop",
    "tmpfs",
    "format/",
    "mkdir/",
    "ro",
    "rbind",
    "lowerdir=",
    "upperdir=",
    "{{ mount 0 }}",
    "{{ overlay 0 1 }}",
    "{{ overlay 9 0 }}",
    "{{ source 0 }}",
    "device=/b",
    "X-containerd.mkdir.path=",
    "X-containerd.dmverity=",
    "labels.a==b",
];

/// What is sent, the same for the same seed.
struct Random(fastrand::Rng);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0.usize(..bound)
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.0.usize(..=most);
        std::iter::repeat_with(|| self.0.u8(..))
            .take(length)
            .collect()
    }

    fn word(&mut self) -> Vec<u8> {
        match self.below(3) {
            0 => self.bytes(12),
            _ => WORDS[self.below(WORDS.len())].as_bytes().to_vec(),
        }
    }

    /// A message with some bytes changed, taken out or put in.
    fn mutated(&mut self, mut message: Vec<u8>) -> Vec<u8> {
        for _ in 0..self.below(4) {
            let at = self.below(message.len() + 1);
            match self.below(4) {
                0 if at < message.len() => message[at] = self.0.u8(..),
                1 => message.truncate(at),
                2 => {
                    let more = self.bytes(16);
                    message.splice(at..at, more);
                }
                _ => {
                    let more = self.word();
                    message.splice(at..at, more);
                }
            }
        }
        message
    }
}

/// A field of a message that has bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 128 {
        field.push(length as u8 | 128);
        length >>= 7;
    }
    field.push(length as u8);
    field.extend_from_slice(bytes);
    field
}

fn mount(kind: &[u8], source: &[u8], options: &[Vec<u8>]) -> Vec<u8> {
    let options = options.iter().flat_map(|option| field(4, option));
    [field(1, kind), field(2, source)]
        .concat()
        .into_iter()
        .chain(options)
        .collect()
}

/// A request that makes sense: a layer, read-only.
fn plain(name: &str) -> Vec<u8> {
    plain_of(name, "/layer.erofs")
}

fn plain_of(name: &str, image: &str) -> Vec<u8> {
    let options = [b"ro".to_vec(), b"loop".to_vec()];
    let layer = mount(b"erofs", image.as_bytes(), &options);
    [field(1, name.as_bytes()), field(2, &layer)].concat()
}

/// A list of mounts of words that are known, in an order that may make no sense.
fn jumbled(random: &mut Random) -> Vec<u8> {
    let mut request = field(1, &random.word());
    for _ in 0..random.below(5) {
        let join = |random: &mut Random| -> Vec<u8> {
            let words = random.below(3) + 1;
            (0..words).flat_map(|_| random.word()).collect()
        };
        let kind = join(random);
        let source = join(random);
        let options: Vec<Vec<u8>> = (0..random.below(4)).map(|_| join(random)).collect();
        request.extend(field(2, &mount(&kind, &source, &options)));
    }
    request
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [length[1], length[2], length[3], kind, flags];
    [&head[..], &stream.to_be_bytes(), payload].concat()
}

/// A call as HTTP/2 has it: headers that are written out, and a message behind its length.
fn call(method: &str, message: &[u8]) -> Vec<u8> {
    let path = format!("/containerd.services.mounts.v1.Mounts/{method}");
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", &*path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("containerd-namespace", "default"),
    ];
    let headers = headers.iter().flat_map(|(name, value)| {
        let (name_length, value_length) = (name.len() as u8, value.len() as u8);
        let mut header = vec![0, name_length];
        header.extend_from_slice(name.as_bytes());
        header.push(value_length);
        header.extend_from_slice(value.as_bytes());
        header
    });
    let headers: Vec<u8> = headers.collect();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let data = [&[0], &length[..], message].concat();
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 4, 1, &headers),
        frame(0, 1, 1, &data),
    ]
    .concat()
}

/// Sends it, and waits for the answer or the end: the last frame of stream 1, a farewell, or nothing more. What is not `whole` may be the
/// beginning of more, of which the server is told that it does not come; a client that goes takes its calls along.
fn send(socket: &Path, bytes: &[u8], is_whole: bool) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // Whoever sends nonsense may be disconnected before its end.
    let _sent = stream.write_all(bytes);
    if !is_whole {
        let _closed = stream.shutdown(std::net::Shutdown::Write);
    }
    let mut head = [0; 9];
    loop {
        match stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) => {
                let kinds = [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::TimedOut];
                assert!(!kinds.contains(&error.kind()), "no answer to {bytes:?}");
                return;
            }
        }
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        let (kind, flags) = (head[3], head[4]);
        let is_last = matches!(kind, 0 | 1) && flags & 1 != 0;
        if is_last || matches!(kind, 3 | 7) {
            return;
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Counts panics of all threads, which a task of a server would only report.
fn count_panics() -> Arc<AtomicUsize> {
    let panics = Arc::<AtomicUsize>::default();
    let (counted, before) = (panics.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        counted.fetch_add(1, Ordering::Relaxed);
        before(panic);
    }));
    panics
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_sent_the_server_goes_on_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let vm = FakeVm::new();
    let builder = Manager::builder()
        .transport(vm.clone())
        .unplugger(vm.clone())
        .mounter(vm.clone())
        .combiner(vm.clone())
        .binder(vm.clone());
    let recovery = builder.recover(MemoryJournal::new()).await.unwrap();
    let manager = recovery.manager().clone();
    let options = Options::new("/run/m", dir.path().join("records"));
    let activations = Activations::recover(recovery, options).await.unwrap();
    let socket = dir.path().join("socket");
    let listener = listen(&socket).unwrap();
    let serving = serve(
        listener,
        activations.clone(),
        Peers::default(),
        std::future::pending(),
    );
    let serving = tokio::spawn(serving);
    let panics = count_panics();

    // What is sent does arrive.
    let at = socket.clone();
    let plainly = move || send(&at, &call("Activate", &plain("known")), true);
    tokio::task::spawn_blocking(plainly).await.unwrap();
    assert_eq!(activations.count(), 1);

    let seconds = number("BLOCKMOUNT_FUZZ_SECONDS").unwrap_or(2);
    let seed = number("BLOCKMOUNT_FUZZ_SEED").unwrap_or(1);
    let at = socket.clone();
    let sending = tokio::task::spawn_blocking(move || {
        let (mut random, end) = (
            Random(fastrand::Rng::with_seed(seed)),
            Instant::now() + Duration::from_secs(seconds),
        );
        let methods = [
            "Activate",
            "Activate",
            "Deactivate",
            "Info",
            "Update",
            "List",
            "Wonder",
        ];
        let mut sent = 0;
        while Instant::now() < end {
            let method = methods[random.below(methods.len())];
            let message = match random.below(4) {
                0 => random.bytes(200),
                1 => random.mutated(plain("known")),
                2 => random.mutated(plain("other")),
                _ => {
                    let message = jumbled(&mut random);
                    random.mutated(message)
                }
            };
            let whole = call(method, &message);
            // Most of them reach the service, and some break the connection itself.
            match random.below(8) {
                0 => send(&at, &random.mutated(whole), false),
                _ => send(&at, &whole, true),
            }
            sent += 1;
        }
        sent
    });
    let sent: u64 = sending.await.unwrap();
    assert!(sent > 50, "only {sent} messages were sent");
    assert_eq!(panics.load(Ordering::Relaxed), 0);

    // Of the layer that all requests name, one may be activated with options that no other can be beside.
    let last = plain_of("at the end", "/last.erofs");
    let at = socket.clone();
    let again = move || send(&at, &call("Activate", &last), true);
    tokio::task::spawn_blocking(again).await.unwrap();
    activations.info("default", "at the end").unwrap();
    activations.deactivate_all().await.unwrap();
    assert_eq!(activations.count(), 0);
    assert!(manager.drain().await.is_clean());
    vm.check().unwrap();
    vm.assert_empty();
    serving.abort();
}
