//! The guest's end of a debug agent.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use blockmount_agent::{Service, ServiceError};
use blockmount_checker::protocol::Response;
use blockmount_checker::{CheckerServer, Context, server};
use blockmount_linux::mapper::DeviceMapper;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
use rustix::system::{RebootCommand, reboot};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::agent_process;
use crate::keys;
use crate::protocol::{DebugRequest, DebugResponse, OwnRequest, OwnResponse};

/// Answers whoever asks. Clones are the same debug agent.
#[derive(Debug, Clone)]
pub struct DebugServer(Arc<State>);

#[derive(Debug)]
struct State {
    checker: CheckerServer,
    agent: PathBuf,
    held: Mutex<HashMap<PathBuf, File>>,
}

impl Service for DebugServer {
    async fn serve<S>(&self, mut stream: S) -> Result<(), ServiceError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        while let Some(request) = server::next(&mut stream).await? {
            let powers_off = matches!(request, Ok(DebugRequest::Own(OwnRequest::PowerOff)));
            let answer = match request {
                Ok(DebugRequest::Checker(request)) => {
                    self.0.checker.answer(request).await.map(Into::into)
                }
                Ok(DebugRequest::Own(request)) => self.answer(request).await,
                Err(error) => Err(error),
            };
            let powers_off = powers_off && answer.is_ok();
            server::respond(&mut stream, answer).await?;
            if powers_off {
                rustix::fs::sync();
                reboot(RebootCommand::PowerOff)?;
            }
        }
        Ok(())
    }
}

impl DebugServer {
    /// One that lists the directories below roots, and takes this program for the agent.
    pub fn new(roots: Vec<PathBuf>, agent: PathBuf) -> Self {
        DebugServer(Arc::new(State {
            checker: CheckerServer::new(roots),
            agent,
            held: Mutex::default(),
        }))
    }

    async fn answer(&self, request: OwnRequest) -> io::Result<DebugResponse> {
        if request == OwnRequest::KillAgent {
            let pid = agent_process::kill(&self.0.agent).await?;
            return Ok(OwnResponse::Pid(Some(pid)).into());
        }
        if let OwnRequest::Exercise(exercise) = request {
            return Ok(OwnResponse::Steps((*exercise).run().await?).into());
        }
        if let OwnRequest::Try(trial) = request {
            return Ok(OwnResponse::Refused((*trial).run().await?).into());
        }
        if let OwnRequest::Run(program) = request {
            return Ok(OwnResponse::Ended(program.run().await?).into());
        }
        let state = self.0.clone();
        tokio::task::spawn_blocking(move || state.answer(request)).await?
    }
}

impl State {
    /// Answers what takes no waiting. Blocks.
    fn answer(&self, request: OwnRequest) -> io::Result<DebugResponse> {
        match request {
            OwnRequest::Hold { path } => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                let file = rustix::fs::open(&path, flags, Mode::empty())
                    .context(|| format!("cannot open {}", path.display()))?;
                self.held().insert(path, file.into());
                Ok(Response::Done.into())
            }
            OwnRequest::Release { path } => {
                let file = self.held().remove(&path);
                drop(file);
                Ok(Response::Done.into())
            }
            OwnRequest::AgentPid => {
                agent_process::find(&self.agent).map(|pid| OwnResponse::Pid(pid).into())
            }
            OwnRequest::Dax { path } => is_dax(&path)
                .context(|| format!("cannot look at {}", path.display()))
                .map(|is_dax| OwnResponse::Dax(is_dax).into()),
            OwnRequest::Owner { path } => {
                let metadata = path.symlink_metadata();
                let found = metadata.context(|| format!("cannot look at {}", path.display()))?;
                Ok(OwnResponse::Owner(found.uid(), found.gid(), found.mode()).into())
            }
            OwnRequest::Clock => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                let time = since.map_or(0, |since| since.as_millis());
                let time = u64::try_from(time).unwrap_or(u64::MAX);
                Ok(OwnResponse::Clock(time).into())
            }
            OwnRequest::Keys => {
                let keys = std::fs::read_to_string("/proc/keys")
                    .context(|| "cannot read /proc/keys".to_owned())?;
                let ours = keys.lines().filter(|line| line.contains("blockmount"));
                Ok(OwnResponse::Keys(ours.map(str::to_owned).collect()).into())
            }
            OwnRequest::DropCaches => {
                rustix::fs::sync();
                std::fs::write("/proc/sys/vm/drop_caches", "3")
                    .context(|| "cannot drop what is cached".to_owned())
                    .map(|()| Response::Done.into())
            }
            OwnRequest::AddKey {
                kind,
                description,
                bytes,
            } => keys::add(&kind, &description, &bytes)
                .context(|| format!("cannot add key {description}"))
                .map(|()| Response::Done.into()),
            OwnRequest::RemoveKey { kind, description } => keys::remove(&kind, &description)
                .context(|| format!("cannot remove key {description}"))
                .map(|()| Response::Done.into()),
            OwnRequest::FilesWith { bytes, below } => keys::files_with(&bytes, &below)
                .context(|| format!("cannot read all of {}", below.display()))
                .map(|files| OwnResponse::Files(files).into()),
            OwnRequest::Unload { module } => unload(&module)
                .context(|| format!("cannot unload {module}"))
                .map(|()| Response::Done.into()),
            OwnRequest::MappedTables => mapped_tables().map(|tables| tables.into()),
            // What is done about it comes after the answer.
            OwnRequest::PowerOff => {
                agent_process::is_our_machine(&self.agent).map(|()| Response::Done.into())
            }
            OwnRequest::KillAgent
            | OwnRequest::Exercise(_)
            | OwnRequest::Try(_)
            | OwnRequest::Run(_) => unreachable!("this waits, and is answered elsewhere"),
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<PathBuf, File>> {
        // Never held while a file is opened or closed, which may block.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unload(module: &str) -> io::Result<()> {
    match rustix::system::delete_module(&CString::new(module)?, 0) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn mapped_tables() -> io::Result<OwnResponse> {
    let mapper = DeviceMapper::open().map_err(io::Error::other)?;
    let mut lines = Vec::new();
    for mapped in mapper.list().map_err(io::Error::other)? {
        let targets = mapper.table(&mapped.name).map_err(io::Error::other)?;
        for target in targets.unwrap_or_default() {
            lines.push(format!(
                "{} {} {}",
                mapped.name, target.kind, target.parameters
            ));
        }
    }
    Ok(OwnResponse::MappedTables(lines))
}

fn is_dax(path: &Path) -> io::Result<bool> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let found = statx(CWD, path, flags, StatxFlags::BASIC_STATS)?;
    Ok(found.stx_attributes.contains(StatxAttributes::DAX))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kit::serving::ask;

    fn debug_agent() -> tokio::io::DuplexStream {
        let server = DebugServer::new(Vec::new(), "/init".into());
        let (host, guest) = tokio::io::duplex(1 << 10);
        tokio::spawn(async move { server.serve(guest).await });
        host
    }

    #[tokio::test]
    async fn what_is_held_is_open_until_it_is_released() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("held");
        std::fs::write(&path, "").unwrap();
        let is_open = || {
            let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            open.filter_map(|fd| std::fs::read_link(fd.path()).ok())
                .any(|to| to == path)
        };
        let mut host = debug_agent();
        let hold = |path: &Path| json!({ "hold": { "path": path } });
        let release = json!({ "release": { "path": path } });
        assert_eq!(ask(&mut host, hold(&path)).await, json!("done"));
        assert!(is_open());
        assert_eq!(ask(&mut host, release.clone()).await, json!("done"));
        assert!(!is_open());
        assert_eq!(ask(&mut host, release).await, json!("done"));
        let absent = ask(&mut host, hold(&dir.path().join("absent"))).await;
        assert!(absent["failed"].is_string(), "{absent}");
        let dax = json!({ "dax": { "path": dir.path() } });
        assert_eq!(ask(&mut host, dax).await, json!({ "dax": false }));
    }

    #[tokio::test]
    async fn what_makes_no_sense_is_refused_and_the_next_is_done() {
        let mut host = debug_agent();
        for nonsense in [json!({}), json!("fly"), json!({ "hold": {} }), Value::Null] {
            let answer = ask(&mut host, nonsense).await;
            let failed = answer["failed"].as_str().unwrap();
            assert!(failed.contains("makes no sense"), "{answer}");
        }
        assert!(ask(&mut host, json!("tables")).await["tables"].is_object());
    }

    #[tokio::test]
    async fn a_machine_that_is_not_ours_is_not_turned_off() {
        let answer = ask(&mut debug_agent(), json!("power_off")).await;
        let failed = answer["failed"].as_str().unwrap();
        assert!(failed.contains("pid 1"), "{answer}");
    }
}
