//! The socket, who may use it, and the connections.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::{HttpService, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;

use super::activations::Activations;
use super::grpc::Calls;
use super::protocol::mounts::mounts_server::MountsServer;

/// How many connections the processes of one user have at once; more are refused, and those of other users are not.
const MOST_CONNECTIONS: usize = 512;
/// How many calls of one connection run at once.
const MOST_CALLS: u32 = 1024;
/// How long the calls under way may take once the server ends: as long as a manager waits for one answer.
const DRAIN_TIMEOUT: Duration = blockmount::DEFAULT_TIMEOUT;
/// How long clients have, once their calls have ended, to take the last answers and go.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How many processes that are refused are told so at once; more are disconnected without a word.
const MOST_REFUSALS: usize = 16;
/// How long one that is refused has to ask, and to read that.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a refusal is logged at most: whoever is refused may come back as often as it likes.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// How long accepting pauses where the process has no descriptors left, of which there is no event.
const PAUSE: Duration = Duration::from_millis(50);

/// Whose processes may use the socket: root's, those of the server's own user, and of users that are added.
///
/// Clones are the same: a change takes effect for the next who connects.
#[derive(Debug, Clone)]
pub struct Peers(Arc<RwLock<BTreeSet<u32>>>);

impl Default for Peers {
    fn default() -> Self {
        let peers = Peers(Arc::default());
        peers.allow_only([]);
        peers
    }
}

impl Peers {
    /// Lets processes of these users in besides root's and the server's own, and of no others. For them the permissions of the
    /// socket's file have to be wider than [`listen`] makes them.
    pub fn allow_only(&self, users: impl IntoIterator<Item = u32>) {
        let own = [0, rustix::process::geteuid().as_raw()];
        let users = own.into_iter().chain(users).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = users;
    }

    /// Whether there are users besides root and the server's own.
    pub fn has_others(&self) -> bool {
        let own = [0, rustix::process::geteuid().as_raw()];
        let users = self.0.read().unwrap_or_else(PoisonError::into_inner);
        users.iter().any(|user| !own.contains(user))
    }

    fn has(&self, user: u32) -> bool {
        let users = self.0.read().unwrap_or_else(PoisonError::into_inner);
        users.contains(&user)
    }

    /// The user of a process, or why it is refused.
    fn check(&self, stream: &UnixStream) -> Result<u32, Status> {
        // The kernel's own words (`SO_PEERCRED`), from when the peer connected.
        match stream.peer_cred() {
            Ok(peer) if self.has(peer.uid()) => Ok(peer.uid()),
            Ok(peer) => Err(Status::permission_denied(format!(
                "processes of user {} may not use this service: those of root, of the server's own user and of users that it \
                 allows may",
                peer.uid()
            ))),
            Err(error) => Err(Status::permission_denied(format!(
                "the user of this process cannot be told, and the service is for some users only: {error}"
            ))),
        }
    }
}

/// Makes a socket that only its owner can connect to (0600), whatever the umask is. One that a server has left is replaced.
///
/// # Errors
///
/// `AddrInUse` if a server is there, `AlreadyExists` if something else is.
///
/// # Panics
///
/// Outside of a tokio runtime.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match path.symlink_metadata() {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "there is something that is no socket",
            ));
        }
        Ok(_) if StdStream::connect(path).is_ok() => return Err(io::ErrorKind::AddrInUse.into()),
        _ => {}
    }
    // Nobody else can reach a socket in a private directory before it has its permissions.
    let mut draft = PathBuf::from(path).into_os_string();
    draft.push(format!(".{}", std::process::id()));
    let draft = PathBuf::from(draft);
    DirBuilder::new().mode(0o700).create(&draft)?;
    let listening = bind(&draft, path);
    let removed = fs::remove_dir(&draft);
    listening.and_then(|listener| removed.map(|()| listener))
}

fn bind(draft: &Path, path: &Path) -> io::Result<UnixListener> {
    let directory = fs::File::open(draft)?;
    // The path of a socket is short (108 bytes), and this one always is.
    let socket = PathBuf::from(format!("/proc/self/fd/{}/s", directory.as_raw_fd()));
    let listener = UnixListener::bind(&socket)?;
    let placed = fs::set_permissions(&socket, Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&socket, path));
    match placed {
        Ok(()) => Ok(listener),
        Err(error) => {
            fs::remove_file(&socket)?;
            Err(error)
        }
    }
}

/// Serves until `stop` ends; then it accepts no connection and no call any more, and waits for those under way, for up to five
/// minutes. What is activated stays.
///
/// # Cancel safety
///
/// Dropping the future ends all connections; calls under way come to their end, and what was activated for them is taken back.
pub async fn serve(
    listener: UnixListener,
    activations: Activations,
    peers: Peers,
    stop: impl Future<Output = ()>,
) {
    let (calls, mut under_way) = mpsc::channel(1);
    let service = Limited {
        service: MountsServer::new(Calls(activations)),
        calls: calls.downgrade(),
    };
    let mut users = Users::default();
    let refusals = Arc::new(Semaphore::new(MOST_REFUSALS));
    let mut log = RefusalLog::default();
    let (ending, _) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_ended) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => match peers.check(&stream).and_then(|user| users.connect(user)) {
                    Ok(slot) => {
                        let connection = serve_calls(stream, service.clone(), ending.subscribe());
                        connections.spawn(async move {
                            connection.await;
                            drop(slot);
                        });
                    }
                    Err(refused) => {
                        log.refused(&stream, &refused);
                        let Ok(slot) = refusals.clone().try_acquire_owned() else {
                            continue;
                        };
                        let refusal = refuse_calls(stream, refused, ending.subscribe());
                        connections.spawn(async move {
                            drop(tokio::time::timeout(REFUSAL_TIMEOUT, refusal).await);
                            drop(slot);
                        });
                    }
                },
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
    drop((listener, ending, calls));
    // Nothing is sent: it ends when the last call has.
    if tokio::time::timeout(DRAIN_TIMEOUT, under_way.recv())
        .await
        .is_err()
    {
        tracing::warn!("calls are under way still; their clients get no answer");
    }
    let closed = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
        tracing::debug!("clients that do not answer are disconnected");
    }
}

/// What the log says of processes that are refused.
#[derive(Default)]
struct RefusalLog {
    said_at: Option<Instant>,
    unsaid: u64,
}

impl RefusalLog {
    fn refused(&mut self, stream: &UnixStream, why: &Status) {
        if self.said_at.is_some_and(|at| at.elapsed() < LOG_INTERVAL) {
            self.unsaid += 1;
            return;
        }
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let others_before = std::mem::take(&mut self.unsaid);
        tracing::warn!(
            pid,
            why = why.message(),
            others_before,
            "a process is refused"
        );
        self.said_at = Some(Instant::now());
    }
}

/// How many connections each user has. As many users as may connect.
#[derive(Default)]
struct Users(HashMap<u32, Arc<Semaphore>>);

impl Users {
    /// Counts one more for as long as the answer is kept.
    fn connect(&mut self, user: u32) -> Result<OwnedSemaphorePermit, Status> {
        let none = || Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let left = self.0.entry(user).or_insert_with(none).clone();
        left.try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "the processes of user {user} have {MOST_CONNECTIONS} connections to this service already, which is the most"
            ))
        })
    }
}

/// The service until it ends. Each call has a sender, so that the end of the last is an event.
#[derive(Clone)]
struct Limited {
    service: MountsServer<Calls>,
    calls: mpsc::WeakSender<Infallible>,
}

impl Limited {
    async fn call(mut self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let Some(under_way) = self.calls.upgrade() else {
            return Ok(Status::unavailable("the server is ending").into_http());
        };
        let answer = self.service.call(request).await;
        drop(under_way);
        answer
    }
}

async fn serve_calls(stream: UnixStream, service: Limited, ending: watch::Receiver<()>) {
    let call = service_fn(move |request| service.clone().call(request));
    connection(stream, call, ending).await;
}

/// Answers each call by why none is served.
async fn refuse_calls(stream: UnixStream, why: Status, ending: watch::Receiver<()>) {
    let call = service_fn(move |_request| {
        std::future::ready(Ok::<_, Infallible>(why.clone().into_http::<Body>()))
    });
    connection(stream, call, ending).await;
}

async fn connection<S>(stream: UnixStream, call: S, mut ending: watch::Receiver<()>)
where
    S: HttpService<Incoming, ResBody = Body, Error = Infallible>,
    S::Future: Send + 'static,
{
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.max_concurrent_streams(MOST_CALLS);
    let serving = builder.serve_connection(TokioIo::new(stream), call);
    let mut serving = std::pin::pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        // The sender is dropped, and never sends.
        _ = ending.changed() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection has ended");
    }
}
