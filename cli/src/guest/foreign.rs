//! A virtual machine that somebody else has started: where its monitor and its agent are, and how they are reached.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{BackendError, ErrorKind};
use blockmount_bridge::{Dialer, RedialingChannel};
use blockmount_qemu::AgentChannel;
use blockmount_qemu::qmp::{NONE, Qmp, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::failure::{Context, Failure, printable};

/// The controller that a machine has unless others are named.
const CONTROLLER: &str = "scsi0";
/// How long a socket may take to accept.
const CONNECTING: Duration = Duration::from_secs(10);
/// How long QEMU is given to show that it lives, after the connection to the agent was lost.
const DYING: Duration = Duration::from_millis(500);
/// A token is what the agent takes for one: so many bytes.
const TOKEN: std::ops::RangeInclusive<usize> = 16..=4096;

/// A virtual machine that somebody else has started. All of it is remembered for a mount with a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ForeignVm {
    /// The socket of QEMU's monitor.
    pub(crate) monitor: PathBuf,
    pub(crate) agent: Socket,
    /// The file with what the agent wants to be shown first.
    pub(crate) token: Option<PathBuf>,
    /// What QEMU calls the SCSI controllers that may be used, in the order in which the agent was told of them.
    pub(crate) controllers: Vec<String>,
    /// The way to a checker in the guest, for a demo.
    #[serde(skip)]
    pub(crate) checker: Option<Socket>,
}

/// Where a program of the guest is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Socket {
    Unix(PathBuf),
    Vsock { cid: u32, port: u32 },
}

impl FromStr for Socket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither unix:PATH nor vsock:CID:PORT");
        match text.split_once(':') {
            Some(("unix", path)) => Ok(Socket::Unix(absolute(path).ok_or_else(wrong)?)),
            Some(("vsock", address)) => {
                let (cid, port) = address.split_once(':').ok_or_else(wrong)?;
                let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
                Ok(Socket::Vsock {
                    cid: number(cid)?,
                    port: number(port)?,
                })
            }
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Socket::Unix(path) => write!(f, "unix:{}", printable(path.display())),
            Socket::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

/// A path that is the same in whatever directory the next program is started.
fn absolute(path: &str) -> Option<PathBuf> {
    // It fails for the empty one alone.
    std::path::absolute(path).ok()
}

/// Reads `qemu:QMP_SOCKET`.
pub(crate) fn parse_monitor(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("qemu:").and_then(absolute);
    path.ok_or_else(|| format!("{text:?} is not qemu:QMP_SOCKET"))
}

/// A stream to a program of the guest.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin + Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + Debug> Stream for T {}

impl Socket {
    pub(super) async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let connecting = async {
            let stream: Box<dyn Stream> = match self {
                Socket::Unix(path) => Box::new(UnixStream::connect(path).await?),
                Socket::Vsock { cid, port } => {
                    Box::new(VsockStream::connect(VsockAddr::new(*cid, *port)).await?)
                }
            };
            io::Result::Ok(stream)
        };
        timeout(CONNECTING, connecting).await?
    }
}

impl ForeignVm {
    /// The machine with this monitor and this agent.
    pub(crate) fn new(monitor: PathBuf, agent: Socket, mut controllers: Vec<String>) -> Self {
        if controllers.is_empty() {
            controllers.push(CONTROLLER.to_owned());
        }
        ForeignVm {
            monitor,
            agent,
            token: None,
            controllers,
            checker: None,
        }
    }

    /// Whether nobody is at its monitor any more: the machine has ended.
    pub(crate) async fn has_ended(&self) -> bool {
        match UnixStream::connect(&self.monitor).await {
            Ok(_) => false,
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ),
        }
    }

    pub(super) async fn qmp(&self) -> Result<Qmp, Failure> {
        let at = printable(self.monitor.display());
        let what = || format!("cannot reach the virtual machine with its monitor at {at}");
        let advice = "give the socket of a QEMU that runs, such as -qmp unix:PATH,server=on,wait=off; it has one client at a time";
        let connected = UnixStream::connect(&self.monitor).await.context(what);
        let stream = connected.map_err(|failure| failure.advise(advice))?;
        let qmp = Qmp::connect(stream).await.map_err(|error| {
            let what = match &error {
                // A monitor greets the next client once the one before has gone.
                QmpError::TimedOut { .. } => {
                    format!("{}, which another client may have", what())
                }
                _ => what(),
            };
            Failure::new(what).because(error)
        });
        qmp.map_err(|failure| failure.advise(advice))
    }

    /// Refuses controllers that the machine does not have, before a disk waits for one.
    pub(super) async fn ensure_controllers(&self, qmp: &Qmp) -> Result<(), Failure> {
        let what = || "cannot ask QEMU for its SCSI controllers".to_owned();
        let devices = json!({ "path": "/machine/peripheral" });
        let devices = qmp.execute("qom-list", devices).await.context(what)?;
        let is_controller = |device: &&Value| {
            let kind = device["type"].as_str().unwrap_or_default();
            kind.starts_with("child<virtio-scsi")
        };
        let devices = devices.as_array().into_iter().flatten();
        let found = devices.filter(is_controller);
        let found: Vec<&str> = found.filter_map(|device| device["name"].as_str()).collect();
        let mut wanted = self.controllers.iter();
        let Some(missing) = wanted.find(|id| !found.contains(&id.as_str())) else {
            return Ok(());
        };
        let what = format!("the virtual machine has no SCSI controller with the id {missing}");
        Err(Failure::new(what).advise(match found.is_empty() {
            true => "start QEMU with -device virtio-scsi-pci,id=scsi0".to_owned(),
            false => format!("name those that blockmount may use, in the order in which the agent knows them, by --controller; there are: {}", printable(found.join(", "))),
        }))
    }

    /// The agent in its guest.
    pub(super) async fn agent(&self, qmp: Qmp) -> Result<AgentSocket, Failure> {
        let at = &self.agent;
        let what = || format!("cannot reach the agent of the virtual machine at {at}");
        let advice = "in its guest runs: blockmount agent, with what \"blockmount agent --help\" says of how it is reached";
        let token = self.token.as_deref().map(read_token).transpose()?;
        let dialer = AgentLine {
            socket: at.clone(),
            token,
            qmp: qmp.clone(),
        };
        let channel = RedialingChannel::connect(dialer).await.context(what);
        let channel = channel.map_err(|failure| failure.advise(advice))?;
        Ok(AgentSocket::new(channel, qmp))
    }
}

fn read_token(path: &Path) -> Result<Vec<u8>, Failure> {
    let what = || format!("cannot use the token in {}", path.display());
    let file = File::open(path).context(what)?;
    let mut token = Vec::new();
    let mut start = file.take(*TOKEN.end() as u64 + 1);
    start.read_to_end(&mut token).context(what)?;
    match TOKEN.contains(&token.len()) {
        true => Ok(token),
        false => {
            let advice = "give the file that the agent has as its --vsock-token";
            let why = "it has to have from 16 to 4096 bytes";
            Err(Failure::new(what()).because(why).advise(advice))
        }
    }
}

/// The way to the agent, and to QEMU, which knows whether the machine lives.
#[derive(Debug)]
pub(crate) struct AgentLine {
    socket: Socket,
    token: Option<Vec<u8>>,
    qmp: Qmp,
}

#[async_trait]
impl Dialer for AgentLine {
    type Stream = Box<dyn Stream>;

    async fn dial(&self) -> Result<Box<dyn Stream>, BackendError> {
        let at = &self.socket;
        let failed = |error| {
            BackendError::other(format!("cannot reach the agent at {at}")).with_source(error)
        };
        let mut stream = at.connect().await.map_err(failed)?;
        if let Some(token) = &self.token {
            let shown = timeout(CONNECTING, stream.write_all(token)).await;
            let shown = shown.unwrap_or_else(|elapsed| Err(elapsed.into()));
            shown.map_err(failed)?;
        }
        Ok(stream)
    }

    async fn is_alive(&self) -> bool {
        match self.qmp.execute_within("query-status", NONE, DYING).await {
            // A slow one lives.
            Err(error) => error.kind() != ErrorKind::Gone,
            Ok(_) => true,
        }
    }
}

/// The agent behind a socket.
pub(crate) type AgentSocket = AgentChannel<AgentLine>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_read_and_others_are_refused() {
        let unix = "unix:/run/vm/agent".parse::<Socket>().unwrap();
        assert_eq!(unix, Socket::Unix("/run/vm/agent".into()));
        let vsock = "vsock:3:5000".parse::<Socket>().unwrap();
        assert_eq!(vsock, Socket::Vsock { cid: 3, port: 5000 });
        for socket in [&unix, &vsock] {
            assert_eq!(&socket.to_string().parse::<Socket>().unwrap(), socket);
        }
        for text in [
            "",
            "unix:",
            "/run/vm/agent",
            "vsock:3",
            "vsock:a:1",
            "vsock:3:4294967296",
            "tcp:1:2",
        ] {
            assert!(text.parse::<Socket>().is_err(), "{text:?}");
        }
        assert_eq!(parse_monitor("qemu:/run/qmp"), Ok("/run/qmp".into()));
        for text in ["qemu:", "/run/qmp", "hcs:/run/qmp"] {
            assert!(parse_monitor(text).is_err(), "{text:?}");
        }
        // The next program may be started elsewhere.
        assert!(parse_monitor("qemu:qmp").unwrap().is_absolute());
    }
}
