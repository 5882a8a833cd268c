//! Mounting a stack, and holding it until a signal.

use std::path::{Path, PathBuf};

use blockmount::{
    Disk, Encryption, Format, HolderName, MountOptions, MountPoint, MountRequest, OverlayOptions,
    StackRequest, Step,
};
use serde::Serialize;

use crate::args::{Integrity, Layer, MountArgs};
use crate::failure::{Context, Failure, printable};
use crate::guest::{GuestKind, Needs, Place, Transports, ensure_allowed};
use crate::images;
use crate::interrupt::Interrupt;
use crate::kernel::{Tables, loop_marks};
use crate::keys::{self, KeyFile};
use crate::machine::{Machine, Mounted, is_raw, require_root};
use crate::report::{passed_on, table};
use crate::run::{self, Remembered, Run, sudo};
use crate::stacking::{distinct, layer_request};
use crate::target;
use crate::terminal::{complain, note, print, print_json, say, wrapped};
use crate::viewing::{self, HeldView};

/// Where everything is while the stack is held.
#[derive(Debug, Serialize)]
struct Held {
    target: String,
    writable: bool,
    layers: Vec<HeldDisk>,
    scratch: Option<HeldDisk>,
    views: Vec<HeldView>,
    pid: u32,
}

#[derive(Debug, Serialize)]
struct HeldDisk {
    source: String,
    partition: Option<u32>,
    /// As the guest's kernel shows it; none where nobody in the guest can be asked.
    filesystem: Option<String>,
    locator: String,
    device: Option<String>,
    path: String,
    /// Why a transport that was asked before has not taken it.
    passed_on: Option<String>,
}

/// Mounts, holds and releases. `Ok` is the exit status.
pub(crate) async fn run(mut args: MountArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    let before = Tables::read()?;
    if let Some(name) = args.resume.take() {
        return resume(args, &name, &interrupt, &before).await;
    }
    if args.guest() == GuestKind::Local {
        require_root("mount")?;
    }
    let vm = args.vm.foreign(args.guest)?;
    refuse_lost_vm(&args)?;
    refuse_lost_format(&args)?;
    let target = place_of(args.at.as_deref().unwrap_or(Path::new("")), args.guest())?;
    args.layers.given = distinct(&args.layers.given);
    refuse_too_many(&args.layers.given)?;
    viewing::refuse_absent_layers(&args)?;
    let guest = args.guest();
    for shown in &mut args.views {
        shown.at = place_of(&shown.at, guest)?;
    }
    let requests = args.layers.given.iter().map(layer_request);
    let requests = requests.collect::<Result<Vec<_>, _>>()?;
    let keys = keys::read(&args.layers.given)?;
    let run = || match &args.name {
        None => Run::start_anonymous(&target, vm.as_ref()),
        Some(name) => {
            let layers = &args.layers.given;
            let remembered = Remembered::new(name.clone(), &target, layers, args.guest());
            let remembered = remembered.in_vm(vm.clone());
            Run::start_named(&remembered.with_views(args.views.len()))
        }
    };
    let place = Place::of(args.guest(), vm.clone(), args.transport, args.allow_backing)?;
    let place = place.needing(args.needs());
    let mut machine = Machine::start(place, run, &interrupt).await?;
    let mounted = hold(&args, &target, requests, &keys, &mut machine, &interrupt).await;
    let mounted = mounted.map_err(|failure| match args.guest() {
        GuestKind::Local if failure.is_of(Step::Combine) => in_the_way(failure, &target),
        _ => failure,
    });
    hold_until_the_end(&args, &target, mounted, machine, &interrupt, &before).await
}

/// Goes on with the mount of a program that has ended. A signal that comes before the mount is taken over leaves it as it is.
async fn resume(
    mut args: MountArgs,
    name: &HolderName,
    interrupt: &Interrupt,
    before: &Tables,
) -> Result<u8, Failure> {
    let (run, remembered) = Run::resume(name)?;
    if remembered.is_server {
        let what = format!("{name} is no mount, but the activations of a server");
        return Err(
            Failure::new(what).advise(format!("go on with them: {}", remembered.resuming()))
        );
    }
    let guest = remembered.guest();
    let kept = match guest {
        GuestKind::Foreign => {
            let named = format!("={name}");
            format!(
                "to release it: {}blockmount cleanup --resumable{named}",
                sudo()
            )
        }
        _ => discard_advice(run.work_dir(), Some(name)),
    };
    args.name = Some(name.clone());
    let left = |failure: Failure| left(failure, name);
    // Whichever had the disks.
    let transports = (guest == GuestKind::Qemu).then_some(Transports::Auto);
    let place = Place::of(guest, remembered.vm.clone(), transports, false)?;
    let machine = Machine::start(place, || Ok(run), interrupt).await;
    interrupt.check().map_err(left)?;
    let again = format!(
        "try it again: {}blockmount mount --resume {name}; {kept}",
        sudo()
    );
    let mut machine = machine.map_err(|failure| failure.advise(again))?;
    let target = remembered.target();
    machine.note_target(&target)?;
    args.layers.given = remembered.layers();
    let claimed = machine.claim(name, remembered.views).await;
    let claimed = match (claimed, interrupt.check()) {
        (Ok(mounted), Err(interrupted)) => {
            machine.leave(mounted);
            return Err(left(interrupted));
        }
        (claimed, _) => claimed,
    };
    hold_until_the_end(&args, &target, claimed, machine, interrupt, before).await
}

/// Shows what is mounted, holds it until a signal or until it is lost, and releases everything.
async fn hold_until_the_end(
    args: &MountArgs,
    target: &Path,
    mounted: Result<Mounted, Failure>,
    mut machine: Machine,
    interrupt: &Interrupt,
    before: &Tables,
) -> Result<u8, Failure> {
    let held = match mounted {
        Ok(mounted) => {
            machine.offer_status("mount", args.name.as_ref(), target, None);
            let shown = match machine.mark_held() {
                Ok(()) => show(args, &machine, &mounted).await,
                failed => failed,
            };
            let shown = match (shown, &args.name) {
                // Others may be at work in it, as they were before this program came.
                (Err(failure), Some(name)) if machine.is_resumed() => {
                    machine.leave(mounted);
                    return Err(left(failure, name));
                }
                (shown, _) => shown,
            };
            let further = interrupt.further();
            if shown.is_ok() {
                let why = tokio::select! {
                    signal = interrupt.requested() => signal.to_owned(),
                    why = machine.failed() => why,
                };
                say(format_args!(
                    "{why}: releasing {}",
                    printable(target.display())
                ));
            }
            interrupt.now("releasing the stack");
            machine.release(mounted, further).await;
            shown
        }
        Err(failure) => Err(failure),
    };
    let ended = machine.end(interrupt).await;
    if let Some(work) = ended.kept {
        if let Err(ended) = ended.result {
            tracing::info!(%ended, "not all of what is left could be released");
        }
        return held
            .map(|()| 0)
            .map_err(|failure| failure.advise(discard_advice(&work, args.name.as_ref())));
    }
    let mut left_over = Tables::read()?.left_over(&ended.ours, before, loop_marks);
    left_over.extend(ended.left_in_guest);
    match (held, ended.result) {
        (Err(failure), Err(ended)) => {
            complain(&failure);
            Err(ended)
        }
        (Ok(()), Err(ended)) => Err(ended),
        (_, Ok(())) if !left_over.is_empty() => Err(Failure::new("something is left over")
            .because(left_over.join("; "))
            .advise(format!("run: {}blockmount cleanup", sudo()))),
        (Err(failure), Ok(())) => {
            say(format_args!("everything was released; nothing is left"));
            Err(failure)
        }
        (Ok(()), Ok(())) => {
            note(format_args!("released; nothing is left"));
            Ok(0)
        }
    }
}

/// Says what to do about a tree of another run at the target, if that is what was in the way.
fn in_the_way(failure: Failure, target: &Path) -> Failure {
    match run::in_the_way(target) {
        Some(advice) => failure.advise(advice),
        None => failure,
    }
}

/// A resume that has changed nothing.
fn left(failure: Failure, name: &HolderName) -> Failure {
    failure.advise(format!(
        "the mount is left as it was; go on with it: {}blockmount mount --resume {name}",
        sudo()
    ))
}

/// What to do with a mount that could not be resumed.
fn discard_advice(work: &Path, name: Option<&HolderName>) -> String {
    let work = printable(work.display());
    let name = name.map(|name| format!("={name}")).unwrap_or_default();
    format!(
        "what was written stays in {work}, mounted or not; to discard it: {}blockmount cleanup --resumable{name}",
        sudo()
    )
}

/// Refuses names for what a kill would take along, or leave where it cannot be found again.
fn refuse_lost_vm(args: &MountArgs) -> Result<(), Failure> {
    let is_kept = args.guest() != GuestKind::Qemu;
    if is_kept && args.keep_vm {
        let what = "there is no virtual machine of this program's own that could be kept";
        return Err(Failure::usage(what).advise("add --guest qemu, or leave --keep-vm out"));
    }
    if args.name.is_none() || is_kept {
        return Ok(());
    }
    if !args.keep_vm {
        let what = "a mount with a --name outlives this program, and a virtual machine does not";
        return Err(Failure::usage(what).advise("add --keep-vm, or leave --name out"));
    }
    Ok(())
}

/// Refuses a name for a mount on this machine that would lose its layers with this program.
fn refuse_lost_format(args: &MountArgs) -> Result<(), Failure> {
    let shown = args.layers.given.iter().find(|layer| !is_raw(layer));
    match shown {
        Some(layer) if args.name.is_some() && args.guest() == GuestKind::Local => {
            let image = printable(layer.image.display());
            let what = format!(
                "a mount with a --name outlives this program, which is needed to show {image}"
            );
            Err(Failure::usage(what)
                .advise("convert it to a raw image: qemu-img convert -O raw IMAGE RAW"))
        }
        _ => Ok(()),
    }
}

/// Where the tree or a view of it is to be. In a virtual machine, whether a link may be on the way is for the guest to say.
fn place_of(given: &Path, guest: GuestKind) -> Result<PathBuf, Failure> {
    if guest != GuestKind::Local {
        let target = std::path::absolute(given).context(|| format!("--at {given:?} is no path"));
        let target =
            target.map_err(|failure| failure.advise("name a directory, such as --at /mnt/tree"))?;
        // Where the agent of another machine mounts, it says itself.
        if guest == GuestKind::Qemu {
            ensure_allowed(&target)?;
        }
        return Ok(target);
    }
    let target = target::resolve(given)?;
    if std::path::absolute(given).is_ok_and(|plain| plain != target) {
        let (given, at) = (printable(given.display()), printable(target.display()));
        note(format_args!("note: {given} is {at}"));
    }
    Ok(target)
}

/// As many layers as the kernel stacks (`OVL_MAX_STACK`), which is better known before they are attached.
const MOST_LAYERS: usize = 500;

fn refuse_too_many(layers: &[Layer]) -> Result<(), Failure> {
    if layers.len() <= MOST_LAYERS {
        return Ok(());
    }
    let what = format!(
        "{} layers are more than the {MOST_LAYERS} that Linux stacks",
        layers.len()
    );
    Err(Failure::usage(what).advise("make one image of several layers"))
}

async fn hold(
    args: &MountArgs,
    target: &Path,
    requests: Vec<MountRequest>,
    keys: &[KeyFile],
    machine: &mut Machine,
    interrupt: &Interrupt,
) -> Result<Mounted, Failure> {
    let options = OverlayOptions::new(&args.overlay_options);
    let options = options.context(|| "the overlay options make no sense".to_owned())?;
    let mut stack = StackRequest::new(target).options(options);
    if let Some(name) = &args.name {
        stack = stack.held_by(name.clone());
    }
    let disks = machine
        .disks(&args.layers.given, args.allow_backing)
        .await?;
    let layers: Vec<_> = disks.into_iter().zip(requests).collect();
    for (disk, request) in layers.clone() {
        stack = stack.layer(disk, request);
    }
    if let Some(size) = args.scratch {
        machine.work_dir()?;
        let image = machine.scratch();
        let request = match args.is_formatted_in_guest() {
            true => {
                images::blank(&image, size)?;
                formatted(args)?
            }
            false => {
                images::scratch(&image, size, interrupt).await?;
                MountRequest::default()
            }
        };
        stack = stack.scratch(Disk::virtual_disk(image), request);
    }
    interrupt.check()?;
    machine.note_target(target)?;
    let making = machine.manager().stack(&stack);
    let stack = machine.with_keys(keys, making).await?;
    interrupt.check()?;
    let views = viewing::make(args, &layers, &stack, machine, interrupt).await?;
    Ok(Mounted { stack, views })
}

/// A scratch whose filesystem is made in the guest, behind the encryption if there is any.
fn formatted(args: &MountArgs) -> Result<MountRequest, Failure> {
    let filesystem = args.format.as_deref().unwrap_or("ext4");
    let mut options = MountOptions::builder().format(Format::new(filesystem));
    if args.encrypt {
        let plain = Encryption::Ephemeral;
        options = options.encryption(args.integrity.map_or(plain, Integrity::encryption));
    }
    let options = options.build();
    let options = options.context(|| "the scratch cannot be mounted so".to_owned())?;
    Ok(MountRequest::new(options))
}

impl MountArgs {
    fn guest(&self) -> GuestKind {
        self.vm.guest(self.guest)
    }

    fn is_formatted_in_guest(&self) -> bool {
        self.encrypt || self.format.is_some()
    }

    /// What a guest has to be able to do for these.
    fn needs(&self) -> Needs {
        let any = |is_so: fn(&Layer) -> bool| self.layers.given.iter().any(is_so);
        let is_luks = any(|layer| layer.luks.is_some());
        Needs {
            verity: any(|layer| layer.verity.is_some()),
            encryption: self.encrypt || is_luks || any(|layer| layer.key.is_some()),
            more_ciphers: self.integrity.is_some(),
            encryption_tools: is_luks,
            filesystem_tools: self.is_formatted_in_guest(),
        }
    }
}

async fn show(args: &MountArgs, machine: &Machine, mounted: &Mounted) -> Result<(), Failure> {
    let stack = &mounted.stack;
    let mounts = machine.guest().mounts().await?;
    let disk = |layer: &Layer, mount: &MountPoint| {
        let seen = mounts.as_ref().map(|mounts| mounts.at(mount.path()));
        let seen = seen.transpose()?;
        Ok(HeldDisk {
            source: layer.image.display().to_string(),
            partition: layer.partition.map(u32::from),
            filesystem: seen.map(|seen| seen.filesystem.clone()),
            locator: mount.locator().to_string(),
            device: seen.map(|seen| seen.device.clone()),
            path: mount.path().display().to_string(),
            passed_on: machine.recorder().passed_on(&layer.image),
        })
    };
    let scratch = Layer::of(machine.scratch());
    let held = Held {
        target: stack.target().display().to_string(),
        writable: stack.scratch().is_some(),
        layers: args
            .layers
            .given
            .iter()
            .zip(stack.layers())
            .map(|(layer, mount)| disk(layer, mount))
            .collect::<Result<_, Failure>>()?,
        scratch: match stack.scratch() {
            Some(mount) => Some(disk(&scratch, mount)?),
            None => None,
        },
        views: mounted.views.iter().map(HeldView::of).collect(),
        pid: std::process::id(),
    };
    if args.json {
        return print_json(&held);
    }
    print(&held.to_text())?;
    if let Some(top) = machine.guest().look_into(stack.target()).await? {
        print(&wrapped(&format!("  at its top: {}", printable(top)), "  "))?;
        note(format_args!(
            "it is in a virtual machine whose guest runs nothing but the agent: use it from a program, \
             as examples/foreign_vm.rs of the source does"
        ));
    }
    note(format_args!(
        "held until Ctrl-C or SIGTERM to process {}",
        held.pid
    ));
    Ok(())
}

impl Held {
    fn to_text(&self) -> String {
        let mut table = table(&["disk", "filesystem", "locator", "device", "path"]);
        for disk in self.layers.iter().chain(&self.scratch) {
            let partition = disk
                .partition
                .map_or(String::new(), |number| format!(" (partition {number})"));
            table.add_row([
                printable(format!("{}{partition}", disk.source)).to_string(),
                disk.filesystem.clone().unwrap_or_else(unseen),
                disk.locator.clone(),
                disk.device.clone().unwrap_or_else(unseen),
                printable(&disk.path).to_string(),
            ]);
        }
        let why = self.layers.iter().chain(&self.scratch);
        let why = passed_on(why.map(|disk| (&*disk.source, &disk.passed_on)));
        let access = if self.writable {
            "writable"
        } else {
            "read-only"
        };
        let views = self.views.iter().map(|view| format!("\n{view}"));
        format!(
            "{table}\n{why}\n{access} tree at {}{}",
            printable(&self.target),
            views.collect::<String>()
        )
    }
}

/// What stands where only the guest's kernel could tell.
fn unseen() -> String {
    "-".to_owned()
}
