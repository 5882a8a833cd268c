//! The guests of a server: this machine, a virtual one, or several of these with names.

use std::sync::{Arc, OnceLock};

use blockmount::{BackendError, HolderName, Recovery};
use blockmount_containerd::service::{
    ActivationStatus, Activations, Info, Options, VmName, recorded,
};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;

use crate::args::{ServeArgs, Served};
use crate::cleanup::remove_abandoned;
use crate::failure::{Context, Failure, printable};
use crate::guest::{Guest as InGuest, GuestKind, Needs, kept_vm_has_ended};
use crate::interrupt::Interrupt;
use crate::machine::Machine;
use crate::run::{Remembered, Run};
use crate::status::Source;
use crate::terminal::say;

/// Below the directory of the run, or of all runs in a guest.
const TREES: &str = "activated";
const NEEDS: Needs = Needs {
    verity: true,
    encryption: false,
    more_ciphers: false,
    encryption_tools: false,
    filesystem_tools: true,
};

/// The guests that are there, each with a run of its own. At least one.
#[derive(Debug)]
pub(super) struct Guests(Vec<Guest>);

#[derive(Debug)]
struct Guest {
    name: Option<VmName>,
    machine: Machine,
    /// Why what was in it is lost, once that is so.
    lost: Arc<OnceLock<String>>,
    /// How it is doing, once it offers that.
    source: Option<Source>,
}

impl Guest {
    fn new(name: Option<VmName>, machine: Machine) -> Self {
        Guest {
            name,
            machine,
            lost: Arc::default(),
            source: None,
        }
    }

    /// What an earlier server has left there, and how it is taken over.
    fn take_recovery(&mut self, args: &ServeArgs) -> Result<(Recovery, Options), Failure> {
        let Guest { machine, .. } = self;
        machine.mark_held()?;
        let no_journal = || Failure::new("a server without a journal has nothing to go on with");
        let recovery = machine.take_recovery().ok_or_else(no_journal)?;
        let options = Options::new(machine.own_target(TREES), machine.records());
        let options = match machine.guest() {
            InGuest::Local(_) => options.here(),
            _ => options,
        };
        Ok(match args.grace {
            Some(grace) => (recovery, options.grace(grace)),
            None => (recovery, options),
        })
    }

    fn offer_status(&mut self, args: &ServeArgs, activations: &Activations) {
        let Guest { name, machine, .. } = self;
        let activations = Some((activations.clone(), name.as_ref()));
        let offered =
            machine.offer_status("serve", Some(&args.name()), args.address(), activations);
        self.lost = offered.lost.clone();
        self.source = Some(offered);
    }

    /// How much is activated in it.
    fn activated(&self) -> usize {
        let source = self.source.as_ref();
        source.map_or(0, |source| source.read().activations.len())
    }

    /// Ends it, where nothing is activated in it.
    async fn end(self, interrupt: &Interrupt) -> Result<(), Failure> {
        if self.lost.get().is_none() {
            return self.machine.end(interrupt).await.result;
        }
        let named = self.name.map(|name| format!(" {name}")).unwrap_or_default();
        if !self.machine.discard().await? {
            say(format_args!(
                "the virtual machine{named} is lost, and may be alive: its run stays for the next server"
            ));
        }
        Ok(())
    }

    /// Undoes a start that has come to nothing.
    async fn give_up(self, interrupt: &Interrupt) {
        if self.machine.is_resumed() {
            self.machine.leave_activations();
        } else if let Err(failure) = self.machine.end(interrupt).await.result {
            say(format_args!("{}", failure.on_one_line()));
        }
    }
}

impl Guests {
    /// Goes on with the runs of an earlier server, or starts them. A virtual machine with a name that has ended is left out.
    pub(super) async fn start(
        args: &ServeArgs,
        served: Vec<Served>,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let starting = served.iter().map(|served| start(args, served, interrupt));
        let (mut guests, mut ended, mut failed) = (Vec::new(), None, None);
        for (served, started) in served.iter().zip(join_all(starting).await) {
            let name = served.name.clone();
            let (failure, name) = match (started, name) {
                (Ok(machine), name) => {
                    guests.push(Guest::new(name, machine));
                    continue;
                }
                (Err(failure), None) => return Err(failure),
                (Err(failure), Some(name)) => (failure, name),
            };
            match has_ended(served).await {
                true => {
                    let lost = run_name(args, served).ok();
                    let lost = lost.and_then(|run| recorded_in(&run)).unwrap_or_default();
                    say(format_args!(
                        "the virtual machine {name} has ended, and is left out{lost}: {}",
                        failure.on_one_line()
                    ));
                    ended.get_or_insert(failure);
                }
                false => drop(failed.get_or_insert(failure.of(format!("vm {name}")))),
            }
        }
        let none = guests.is_empty().then_some(ended).flatten();
        let guests = Guests(guests);
        match failed.or(none) {
            None => Ok(guests),
            Some(failure) => {
                guests.give_up(interrupt).await;
                Err(failure)
            }
        }
    }

    /// Takes over what an earlier server has activated in them.
    pub(super) async fn recover(&mut self, args: &ServeArgs) -> Result<Activations, Failure> {
        let mut found = Vec::new();
        for guest in &mut self.0 {
            let (recovery, options) = guest.take_recovery(args)?;
            found.push((guest.name.clone(), recovery, options));
        }
        let recovered = match found.pop() {
            Some((None, recovery, options)) => Activations::recover(recovery, options).await,
            last => {
                let named = found.into_iter().chain(last);
                let named =
                    named.filter_map(|(name, recovery, options)| Some((name?, recovery, options)));
                Activations::recover_in_vms(named).await
            }
        };
        going_on(recovered)
    }

    /// Serves one more, as at the start.
    pub(super) async fn take_in(
        &mut self,
        args: &ServeArgs,
        served: &Served,
        activations: &Activations,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let machine = start(args, served, interrupt).await?;
        let mut guest = Guest::new(served.name.clone(), machine);
        let added = match (guest.take_recovery(args), &served.name) {
            (Ok((recovery, options)), Some(name)) => {
                going_on(activations.add_vm(name.clone(), recovery, options).await)
            }
            (Ok(_), None) => Err(Failure::new("it has no name")),
            (Err(failure), _) => Err(failure),
        };
        match added {
            Ok(()) => {
                guest.offer_status(args, activations);
                self.0.push(guest);
                Ok(())
            }
            Err(failure) => {
                guest.give_up(interrupt).await;
                Err(failure)
            }
        }
    }

    /// Ends one in which nothing is activated any more.
    pub(super) async fn leave_out(
        &mut self,
        name: &VmName,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let mut guests = self.0.iter();
        match guests.position(|guest| guest.name.as_ref() == Some(name)) {
            Some(at) => self.0.remove(at).end(interrupt).await,
            None => Ok(()),
        }
    }

    /// The names of those that are lost.
    pub(super) fn lost(&self) -> Vec<VmName> {
        let lost = self.0.iter().filter(|guest| guest.lost.get().is_some());
        lost.filter_map(|guest| guest.name.clone()).collect()
    }

    /// The names of the virtual machines, where there are several.
    pub(super) fn names(&self) -> impl Iterator<Item = &VmName> {
        self.0.iter().filter_map(|guest| guest.name.as_ref())
    }

    /// Has each say how it is doing.
    pub(super) fn offer_status(&mut self, args: &ServeArgs, activations: &Activations) {
        for guest in &mut self.0 {
            guest.offer_status(args, activations);
        }
    }

    /// How each is doing, by the names of their virtual machines.
    pub(super) fn sources(&self) -> Vec<Source> {
        let sources = self.0.iter().filter_map(|guest| guest.source.clone());
        let mut sources: Vec<Source> = sources.collect();
        sources.sort_by(|one, other| one.vm.cmp(&other.vm));
        sources
    }

    /// Waits until what is in all of them is lost, and says why. For ever if all were lost before: those that were not have been left
    /// out since, and others may be taken in. Cancel safe: what was said of one is not said again.
    pub(super) async fn failed(&self) -> String {
        let served = self.0.iter().filter(|guest| guest.lost.get().is_none());
        let mut last = None;
        let failing = served.map(async |guest| (guest, guest.machine.failed().await));
        let mut failing: FuturesUnordered<_> = failing.collect();
        while let Some((guest, why)) = failing.next().await {
            if let Some(activations) = guest.source.as_ref().and_then(|of| of.activations.as_ref())
            {
                activations.lose_vm(guest.name.as_ref(), &why);
            }
            if let Some(name) = &guest.name {
                match guest.activated() {
                    0 => say(format_args!(
                        "the virtual machine {name} is lost, in which nothing is activated: {why}"
                    )),
                    _ => say(format_args!(
                        "what is activated in the virtual machine {name} is lost: {why}"
                    )),
                }
            }
            last = Some(guest.lost.get_or_init(|| why).clone());
        }
        match last {
            Some(why) => why,
            None => std::future::pending().await,
        }
    }

    /// Leaves those in which something is activated to the next server, also where that is lost, and ends the others.
    pub(super) async fn end(
        self,
        left: &[ActivationStatus],
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let mut result = Ok(());
        for guest in self.0 {
            let name = guest.name.as_ref().map(VmName::as_str);
            let has_some = left
                .iter()
                .any(|activation| activation.vm.as_deref() == name);
            match has_some {
                true => guest.machine.leave_activations(),
                false => result = result.and(guest.end(interrupt).await),
            }
        }
        result
    }

    /// Undoes a start that another guest has made fail.
    pub(super) async fn give_up(self, interrupt: &Interrupt) {
        for guest in self.0 {
            guest.give_up(interrupt).await;
        }
    }
}

fn going_on<T>(recovered: Result<T, BackendError>) -> Result<T, Failure> {
    let what = || "cannot go on with what an earlier server has activated".to_owned();
    let advice = "see what there is with \"blockmount cleanup --dry-run\"";
    recovered
        .context(what)
        .map_err(|failure| failure.advise(advice))
}

/// Goes on with the run of an earlier server in a guest, or starts one.
async fn start(
    args: &ServeArgs,
    served: &Served,
    interrupt: &Interrupt,
) -> Result<Machine, Failure> {
    let server = args.name();
    let name = run_name(args, served)?;
    let found = Run::find(&name)?;
    if found.is_none()
        && Run::has_abandoned(&name)?
        && let Err(failure) = remove_abandoned(&name, interrupt).await
    {
        say(format_args!(
            "what a server has left that was killed at its start stays: {}",
            failure.on_one_line()
        ));
    }
    let place = served.place.clone().needing(NEEDS);
    match found {
        Some(found) if !found.is_server => {
            let what = format!("there is a mount with the name {name}");
            Err(Failure::new(what).advise("choose another --name"))
        }
        Some(found) if (found.guest(), &found.vm) != (served.guest, &served.vm) => {
            let what = format!("what an earlier server {name} has activated is elsewhere");
            let advice = "say the same --guest or --vm as for that one, or choose another --name";
            Err(Failure::new(what).advise(advice))
        }
        Some(_) if !discard_ended(&name, served)? => {
            Machine::start(place, || Ok(Run::resume(&name)?.0), interrupt).await
        }
        _ => {
            let remembered = Remembered::of_server(name, args.address(), served.guest);
            let remembered = match served.name {
                None => remembered,
                Some(_) => remembered.for_one_of_several(server),
            };
            let remembered = remembered.in_vm(served.vm.clone());
            Machine::start(place, || Run::start_named(&remembered), interrupt).await
        }
    }
}

/// What the run in a guest is called.
fn run_name(args: &ServeArgs, served: &Served) -> Result<HolderName, Failure> {
    let server = args.name();
    match &served.name {
        None => Ok(server),
        Some(vm) => HolderName::new(format!("{server}/{vm}"))
            .context(|| format!("{server} is too long for a server of several virtual machines")),
    }
}

/// What an earlier server has activated in a machine that has ended, as the rest of a sentence; none if nothing is known of it.
fn recorded_in(name: &HolderName) -> Option<String> {
    let (run, _) = Run::resume(name).ok()?;
    let lost = recorded(&run.records());
    run.leave();
    let lost = lost.ok()?;
    (!lost.is_empty()).then(|| format!(", with what was activated in it ({})", listed(&lost)))
}

fn listed(lost: &[Info]) -> String {
    /// As many names as fit into a line that somebody reads.
    const MOST: usize = 8;
    let names = lost.iter().take(MOST);
    let mut names: Vec<String> = names
        .map(|info| printable(format!("{}/{}", info.namespace, info.name)).to_string())
        .collect();
    if lost.len() > MOST {
        names.push(format!("{} more", lost.len() - MOST));
    }
    names.join(", ")
}

/// Removes what an earlier server has noted of a virtual machine of its own that has ended for certain, and says what is lost with
/// it. False if it may be alive.
fn discard_ended(name: &HolderName, served: &Served) -> Result<bool, Failure> {
    if served.guest != GuestKind::Qemu {
        return Ok(false);
    }
    let (run, _) = Run::resume(name)?;
    if !kept_vm_has_ended(run.work_dir()) {
        return Ok(false);
    }
    let what = || format!("cannot tell what was activated in the virtual machine of {name}");
    let lost = recorded(&run.records()).context(what)?;
    run.finish()?;
    let lost = match lost.is_empty() {
        true => "nothing was activated in it".to_owned(),
        false => format!("what was activated in it is lost: {}", listed(&lost)),
    };
    let machine = match &served.name {
        None => "the virtual machine of the earlier server".to_owned(),
        Some(vm) => format!("the virtual machine {vm} of the earlier server"),
    };
    say(format_args!(
        "{machine} has ended, and {lost}; another one is started"
    ));
    Ok(true)
}

async fn has_ended(served: &Served) -> bool {
    match &served.vm {
        Some(vm) => vm.has_ended().await,
        None => false,
    }
}
