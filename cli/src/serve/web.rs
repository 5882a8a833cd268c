//! What `--metrics` offers over HTTP: the metrics, the status, and a page.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use blockmount_containerd::service::listen;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{metrics, page};
use crate::failure::{Context as _, Failure, printable};
use crate::status::{Source, Status};

/// How many are served at once; others wait.
const MOST: usize = 32;
/// How long one request and its answer may take.
const LONGEST: Duration = Duration::from_secs(10);
/// How long accepting pauses where it fails, of which there is no event.
const PAUSE: Duration = Duration::from_millis(100);
/// Nothing of the page is loaded from elsewhere, and nothing in it runs.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// Where it is offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WebAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for WebAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: has a path behind it".to_owned()),
            Some(path) => Ok(WebAddress::Unix(path.into())),
            None => text.parse().map(WebAddress::Tcp).map_err(|_| {
                format!("{text:?} is neither an address with a port, such as 127.0.0.1:9464, nor unix:PATH")
            }),
        }
    }
}

impl fmt::Display for WebAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WebAddress::Tcp(address) => write!(f, "http://{address}/"),
            WebAddress::Unix(path) => write!(f, "unix:{}", printable(path.display())),
        }
    }
}

/// An address that is taken, and not served yet.
#[derive(Debug)]
pub(super) enum Web {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Web {
    pub(super) async fn open(address: &WebAddress) -> Result<Self, Failure> {
        let what = || format!("cannot offer metrics at {address}");
        Ok(match address {
            WebAddress::Tcp(address) => Web::Tcp(TcpListener::bind(address).await.context(what)?),
            WebAddress::Unix(path) => Web::Unix(listen(path).context(what)?, path.clone()),
        })
    }

    /// Where it really is: the system chooses a port in place of 0.
    pub(super) fn address(&self) -> io::Result<WebAddress> {
        Ok(match self {
            Web::Tcp(listener) => WebAddress::Tcp(listener.local_addr()?),
            Web::Unix(_, path) => WebAddress::Unix(path.clone()),
        })
    }

    /// Serves for ever.
    pub(super) async fn serve(&self, sources: Sources) {
        match self {
            Web::Tcp(listener) => {
                serve_all(sources, |cx| {
                    listener.poll_accept(cx).map_ok(|(one, _)| one)
                })
                .await;
            }
            Web::Unix(listener, _) => {
                serve_all(sources, |cx| {
                    listener.poll_accept(cx).map_ok(|(one, _)| one)
                })
                .await;
            }
        }
    }
}

/// Whose status is offered, as they come and go. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Sources(Arc<Mutex<Vec<Source>>>);

impl Sources {
    pub(super) fn set(&self, sources: Vec<Source>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sources;
    }

    fn read(&self) -> Vec<Status> {
        let sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sources = sources.clone();
        sources.iter().map(Source::read).collect()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        if let Web::Unix(_, path) = self
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::info!(%error, "the socket of the metrics was removed by somebody else");
        }
    }
}

async fn serve_all<S, A>(sources: Sources, accept: A)
where
    A: Fn(&mut Context<'_>) -> Poll<io::Result<S>>,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(MOST));
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        tokio::select! {
            Some(_ended) = connections.join_next() => {}
            accepted = poll_fn(&accept) => match accepted {
                Ok(stream) => drop(connections.spawn(connection(stream, sources.clone(), slot))),
                Err(error) => {
                    tracing::warn!(%error, "a connection for metrics cannot be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// One request, and its answer.
async fn connection<S>(stream: S, sources: Sources, slot: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.method(), request.uri().path(), &sources);
        async move { Ok::<_, Infallible>(answer) }
    });
    let mut builder = http1::Builder::new();
    let serving = builder
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(LONGEST, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection for metrics has ended"),
        Err(_) => tracing::debug!("a connection for metrics was too slow"),
    }
    drop(slot);
}

fn answer(method: &Method, path: &str, sources: &Sources) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        return said(
            StatusCode::METHOD_NOT_ALLOWED,
            TEXT,
            "there is nothing to change here\n".into(),
        );
    }
    match path {
        "/" => said(
            StatusCode::OK,
            "text/html; charset=utf-8",
            page::html(&sources.read()),
        ),
        "/metrics" => match metrics::text(sources.read()) {
            Ok(text) => said(StatusCode::OK, metrics::CONTENT_TYPE, text),
            Err(error) => failed(&error),
        },
        "/status.json" => match serde_json::to_string(&json!({ "runs": sources.read() })) {
            Ok(text) => said(StatusCode::OK, "application/json", text),
            Err(error) => failed(&error),
        },
        _ => said(
            StatusCode::NOT_FOUND,
            TEXT,
            "there are /, /metrics and /status.json\n".into(),
        ),
    }
}

const TEXT: &str = "text/plain; charset=utf-8";

fn failed(error: &dyn std::error::Error) -> Response<Full<Bytes>> {
    said(
        StatusCode::INTERNAL_SERVER_ERROR,
        TEXT,
        format!("{error}\n"),
    )
}

fn said(status: StatusCode, content: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_others_are_refused() {
        let tcp = "127.0.0.1:9464".parse::<WebAddress>().unwrap();
        assert_eq!(tcp.to_string(), "http://127.0.0.1:9464/");
        assert_eq!("unix:/a".parse(), Ok(WebAddress::Unix("/a".into())));
        assert!("[::1]:0".parse::<WebAddress>().is_ok());
        for text in [
            "",
            "unix:",
            "9464",
            "localhost",
            "localhost:9464",
            "/run/metrics",
        ] {
            assert!(text.parse::<WebAddress>().is_err(), "{text:?}");
        }
    }
}
