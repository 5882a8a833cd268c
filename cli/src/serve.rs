//! Serving containerd's Mounts service, for this machine or for a virtual one.

mod metrics;
mod page;
mod systemd;
mod web;

use blockmount_containerd::service::{Activations, Options, Peers, listen, serve};
use tokio::net::UnixListener;
use tokio::signal::unix::Signal;

use crate::args::ServeArgs;
use crate::failure::{Context, Failure, printable};
use crate::guest::{GuestKind, Needs, Place};
use crate::interrupt::Interrupt;
use crate::machine::{Machine, require_root};
use crate::run::{Remembered, Run};
use crate::status::Source;
use crate::terminal::{note, say};
use web::Web;

pub(crate) use web::WebAddress;

/// Below the directory of the run, or of all runs in a guest.
const TREES: &str = "activated";

/// Serves until a signal. `Ok` is the exit status.
pub(crate) async fn run(
    args: ServeArgs,
    interrupt: Interrupt,
    hangup: Option<Signal>,
) -> Result<u8, Failure> {
    if args.guest() == GuestKind::Local {
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
    let mut machine = start(&args, &interrupt).await?;
    machine.mark_held()?;
    let no_journal = || Failure::new("a server without a journal has nothing to go on with");
    let recovery = machine.take_recovery().ok_or_else(no_journal)?;
    let mut options = Options::new(machine.own_target(TREES), machine.records());
    if let Some(grace) = args.grace {
        options = options.grace(grace);
    }
    let activations = Activations::recover(recovery, options).await?;
    let name = args.name();
    let source = machine.offer_status(
        "serve",
        Some(&name),
        args.address(),
        Some(activations.clone()),
    );
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
        let served = serve(
            socket.listener,
            activations.clone(),
            peers.clone(),
            interrupt.token().clone().cancelled_owned(),
        );
        tokio::select! {
            () = served => None,
            why = machine.failed() => Some(why),
            () = reload(hangup, &args, &peers) => None,
            () = watch(web.as_ref(), source) => None,
        }
    };
    systemd::notify("STOPPING=1");
    if socket.is_own {
        remove_socket(&args);
    }
    drop(web);
    let count = activations.leave().await.len();
    if let Some(why) = lost {
        machine.leave_activations();
        return Err(Failure::new("what is activated is lost").because(why));
    }
    if count > 0 {
        let name = args.name();
        say(format_args!(
            "{count} activated, which stay for the next server with --name {name}"
        ));
        machine.leave_activations();
        return Ok(0);
    }
    machine.end(&interrupt).await.result.map(|()| 0)
}

/// Goes on with the run of an earlier server, or starts one.
async fn start(args: &ServeArgs, interrupt: &Interrupt) -> Result<Machine, Failure> {
    let name = args.name();
    let found = Run::find(&name)?;
    let needs = Needs {
        verity: true,
        encryption: false,
        more_ciphers: false,
        encryption_tools: false,
        filesystem_tools: true,
    };
    let vm = args.foreign()?;
    let place = Place::of(args.guest(), vm.clone(), args.transport, false)?.needing(needs);
    match found {
        Some(found) if !found.is_server => {
            let what = format!("there is a mount with the name {name}");
            Err(Failure::new(what).advise("choose another --name"))
        }
        Some(found) if (found.guest(), &found.vm) != (args.guest(), &vm) => {
            let what = format!("what an earlier server {name} has activated is elsewhere");
            let advice = "say the same --guest or --vm as for that one, or choose another --name";
            Err(Failure::new(what).advise(advice))
        }
        Some(_) => Machine::start(place, || Ok(Run::resume(&name)?.0), interrupt).await,
        None => {
            let remembered = Remembered::of_server(name, args.address(), args.guest());
            let remembered = remembered.in_vm(vm);
            Machine::start(place, || Run::start_named(&remembered), interrupt).await
        }
    }
}

/// Offers the metrics, if they are wanted. Never ends.
async fn watch(web: Option<&Web>, source: Source) {
    if let Some(web) = web {
        web.serve(source).await;
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
