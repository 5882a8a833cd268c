//! Serving containerd's Mounts service, for this machine or for a virtual one.

mod guests;
mod metrics;
mod page;
mod systemd;
mod web;

use blockmount_containerd::service::{Peers, listen, serve};
use tokio::net::UnixListener;
use tokio::signal::unix::Signal;

use crate::args::{ServeArgs, Served};
use crate::failure::{Context, Failure, printable};
use crate::guest::GuestKind;
use crate::interrupt::Interrupt;
use crate::machine::require_root;
use crate::status::Source;
use crate::terminal::{note, say};
use guests::Guests;
use web::Web;

pub(crate) use web::WebAddress;

/// Serves until a signal. `Ok` is the exit status.
pub(crate) async fn run(
    args: ServeArgs,
    interrupt: Interrupt,
    hangup: Option<Signal>,
) -> Result<u8, Failure> {
    let is_local = |served: &Served| served.guest == GuestKind::Local;
    let served = args.served()?;
    if served.iter().any(is_local) {
        require_root("serve")?;
    }
    // Nothing is started for an address that is taken.
    let socket = Socket::open(&args)?;
    let web = match &args.metrics {
        Some(address) => Some(Web::open(address).await?),
        None => None,
    };
    let peers = Peers::default();
    peers.allow_only(args.allowed_users()?);
    let mut guests = Guests::start(&args, served, &interrupt).await?;
    let activations = match guests.recover(&args).await {
        Ok(activations) => activations,
        Err(failure) => {
            guests.give_up(&interrupt).await;
            return Err(failure);
        }
    };
    let sources = guests.offer_status(&args, &activations);
    note(format_args!(
        "serving at {}; {} activated",
        printable(args.address().display()),
        activations.count()
    ));
    if let Some(web) = &web {
        let address = web
            .address()
            .context(|| "cannot tell where the metrics are".to_owned())?;
        note(format_args!("metrics and a page at {address}"));
    }
    systemd::notify("READY=1");
    let lost = {
        let serving = serve(
            socket.listener,
            activations.clone(),
            peers.clone(),
            interrupt.token().clone().cancelled_owned(),
        );
        tokio::select! {
            () = serving => None,
            why = guests.failed() => Some(why),
            () = reload(hangup, &args, &peers) => None,
            () = watch(web.as_ref(), sources) => None,
        }
    };
    systemd::notify("STOPPING=1");
    if socket.is_own {
        remove_socket(&args);
    }
    drop(web);
    let left = activations.leave().await;
    if lost.is_none() && !left.is_empty() {
        let (count, name) = (left.len(), args.name());
        say(format_args!(
            "{count} activated, which stay for the next server with --name {name}"
        ));
    }
    let ended = guests.end(&left, &interrupt).await;
    match lost {
        Some(why) => Err(Failure::new("what is activated is lost").because(why)),
        None => ended.map(|()| 0),
    }
}

/// Offers the metrics, if they are wanted. Never ends.
async fn watch(web: Option<&Web>, sources: Vec<Source>) {
    if let Some(web) = web {
        web.serve(sources).await;
    }
    std::future::pending().await
}

/// Reads the file again at each SIGHUP. Never ends.
async fn reload(hangup: Option<Signal>, args: &ServeArgs, peers: &Peers) {
    let Some(mut hangup) = hangup else {
        return std::future::pending().await;
    };
    while hangup.recv().await.is_some() {
        systemd::notify_reloading();
        match args.allowed_users() {
            Ok(users) => {
                peers.allow_only(users);
                note(format_args!(
                    "SIGHUP: the users that may connect were read again"
                ));
            }
            Err(failure) => say(format_args!("SIGHUP: nothing is changed: {failure}")),
        }
        systemd::notify("READY=1");
    }
    std::future::pending().await
}

struct Socket {
    listener: UnixListener,
    /// Whether it is ours to remove.
    is_own: bool,
}

impl Socket {
    fn open(args: &ServeArgs) -> Result<Self, Failure> {
        if let Some(listener) = systemd::listener()? {
            return Ok(Socket {
                listener,
                is_own: false,
            });
        }
        let address = args.address();
        let what = || format!("cannot listen at {}", address.display());
        Ok(Socket {
            listener: listen(address).context(what)?,
            is_own: true,
        })
    }
}

fn remove_socket(args: &ServeArgs) {
    if let Err(error) = std::fs::remove_file(args.address()) {
        tracing::info!(%error, "the socket was removed by somebody else");
    }
}
