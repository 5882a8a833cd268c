//! Serving containerd's Mounts service, for this machine or for a virtual one.

mod guests;
mod metrics;
mod page;
mod reload;
mod systemd;
mod web;

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use blockmount_containerd::service::{Peers, listen, serve};
use rustix::fs::{Mode, OFlags};
use tokio::net::UnixListener;
use tokio::signal::unix::Signal;
use tokio::task::JoinSet;

use crate::args::{ServeArgs, Served};
use crate::failure::{Context, Failure, printable};
use crate::guest::GuestKind;
use crate::interrupt::Interrupt;
use crate::machine::require_root;
use crate::terminal::{note, say};
use guests::Guests;
use reload::Reloading;
use web::{Sources, Web};

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
    let mut socket = Socket::open(&args)?;
    let ended = run_at(&mut socket, args, served, interrupt, hangup).await;
    socket.remove();
    ended
}

async fn run_at(
    socket: &mut Socket,
    mut args: ServeArgs,
    served: Vec<Served>,
    interrupt: Interrupt,
    mut hangup: Option<Signal>,
) -> Result<u8, Failure> {
    let web = match &args.metrics {
        Some(address) => Some(Web::open(address).await?),
        None => None,
    };
    let peers = Peers::default();
    peers.allow_only(args.allowed_users()?);
    let mut guests = Guests::start(&args, served, &interrupt).await?;
    // One that is left out is tried again when the file is read again.
    args.remember_only(guests.names());
    let activations = match guests.recover(&args).await {
        Ok(activations) => activations,
        Err(failure) => {
            guests.give_up(&interrupt).await;
            return Err(failure);
        }
    };
    let sources = Sources::default();
    guests.offer_status(&args, &activations);
    if let Err(failure) = socket.follow(&peers) {
        say(format_args!("{}", failure.on_one_line()));
    }
    sources.set(guests.sources());
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
    // A task of its own: it goes on while the file is read again, which may take as long as a virtual machine takes to boot.
    let mut serving = tokio::spawn(serve(
        socket.listener()?,
        activations.clone(),
        peers.clone(),
        interrupt.token().clone().cancelled_owned(),
    ));
    // So do the metrics.
    let mut watching = JoinSet::new();
    if let Some(web) = web {
        let sources = sources.clone();
        watching.spawn(async move { web.serve(sources).await });
    }
    let lost = loop {
        let vacated = tokio::select! {
            ended = &mut serving => break ended.err().map(|error| error.to_string()),
            why = guests.failed() => break Some(why),
            name = activations.vacated() => Some(name),
            () = hear(&mut hangup) => None,
        };
        let mut reloading = Reloading {
            args: &mut args,
            peers: &peers,
            socket,
            guests: &mut guests,
            activations: &activations,
            sources: &sources,
        };
        match vacated {
            Some(name) => reloading.see_off(name, &interrupt).await,
            None => reloading.run(&interrupt).await,
        }
    };
    systemd::notify("STOPPING=1");
    socket.remove();
    // Its socket goes with it.
    watching.shutdown().await;
    let left = activations.leave().await;
    if lost.is_none() && !left.is_empty() {
        let (count, name) = (left.len(), args.name());
        say(format_args!(
            "{count} activated, which stay for the next server with --name {name}"
        ));
    }
    let ended = guests.end(&left, &interrupt).await;
    match lost {
        Some(why) => {
            let what = match left.is_empty() {
                true => "the guest is lost, in which nothing was activated",
                false => "what is activated is lost",
            };
            // Why its files could not be removed is one more thing.
            if let Err(failure) = ended {
                say(format_args!("{}", failure.on_one_line()));
            }
            Err(Failure::new(what).because(why))
        }
        None => ended.map(|()| 0),
    }
}

/// Waits for a SIGHUP; for ever, where it is not listened to.
async fn hear(hangup: &mut Option<Signal>) {
    let heard = match hangup {
        Some(hangup) => hangup.recv().await,
        None => None,
    };
    if heard.is_none() {
        std::future::pending().await
    }
}

/// Where clients connect.
struct Socket {
    /// Until it is served.
    listener: Option<UnixListener>,
    /// Where it is and which file it is, while it is ours to remove.
    own: Option<(PathBuf, (u64, u64))>,
}

impl Socket {
    fn open(args: &ServeArgs) -> Result<Self, Failure> {
        if let Some(listener) = systemd::listener()? {
            return Ok(Socket {
                listener: Some(listener),
                own: None,
            });
        }
        let address = args.address();
        let what = || format!("cannot listen at {}", address.display());
        let listener = listen(address).context(what)?;
        let file = identity(address).context(what)?;
        Ok(Socket {
            listener: Some(listener),
            own: Some((address.to_owned(), file)),
        })
    }

    fn listener(&mut self) -> Result<UnixListener, Failure> {
        let none = || Failure::new("the socket is served already");
        self.listener.take().ok_or_else(none)
    }

    /// Lets everybody connect while other users are allowed, which are told by their credentials, and its owner alone otherwise.
    /// The socket of a service manager has the permissions that its unit says.
    fn follow(&self, peers: &Peers) -> Result<(), Failure> {
        let Some((address, file)) = &self.own else {
            return Ok(());
        };
        let mode = match peers.has_others() {
            true => 0o666,
            false => 0o600,
        };
        let what = || {
            let address = printable(address.display());
            format!(
                "the permissions of {address} cannot become {mode:o}, and who may connect is as before"
            )
        };
        // The very socket, whatever is in its place in a moment.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::open(address, flags, Mode::empty()).context(what)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        let found = fs::metadata(&path).context(what)?;
        if (found.dev(), found.ino()) != *file {
            return Err(Failure::new(what()).because("it is that of another server"));
        }
        fs::set_permissions(&path, Permissions::from_mode(mode)).context(what)
    }

    /// Removes the socket, unless somebody has removed or replaced it.
    fn remove(&mut self) {
        let Some((address, file)) = self.own.take() else {
            return;
        };
        let removed = match identity(&address) {
            Ok(found) if found != file => Err(io::Error::other("it is that of another server")),
            Ok(_) => fs::remove_file(&address),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::info!(%error, "the socket was removed or replaced by somebody else");
        }
    }
}

/// What tells a file from others on this machine.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = path.symlink_metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
