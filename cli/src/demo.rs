//! The main job, shown: two containers that share all layers, checked file by file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmount::{Disk, MountPoint, MountRequest, Stack, StackRequest};
use blockmount_checker::tree::Tree;

use crate::args::{DemoArgs, Layer};
use crate::check::{self, Check};
use crate::failure::{Context, FAILED, Failure};
use crate::guest::{ForeignVm, Guest, GuestKind, Mounts, Place, Transports};
use crate::image_sources::Limits;
use crate::images;
use crate::interrupt::Interrupt;
use crate::kernel::{Tables, loop_marks};
use crate::keys;
use crate::machine::{Machine, require_root};
use crate::report::{ContainerReport, LISTED, LayerReport, Report, Role, milliseconds};
use crate::run::{Run, is_root, sudo};
use crate::speed;
use crate::stacking::{distinct, layer_request};
use crate::terminal::{Progress, complain, print, print_json, say};
use crate::test_images::{TestImage, make};

/// The containers that share the layers.
const CONTAINERS: [&str; 2] = ["one", "two"];
/// Enough for what the demo writes; the files are sparse.
const SCRATCH_SIZE: u64 = 64 << 20;

/// Runs the demo. `Ok` is the exit status.
pub(crate) async fn run(args: DemoArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    if args.vm.guest(args.guest) == GuestKind::Local {
        require_root("demo")?;
    } else if !args.layers.given.is_empty() && !is_root() {
        let what = "what is in a --layer is read through a mount on this machine, which only root may make";
        let advice = "leave --layer out, run it with sudo, or mount it: blockmount mount --guest qemu --layer IMAGE --at /mnt/tree";
        return Err(Failure::new(what).advise(advice));
    }
    let progress = Progress::new();
    let before = Tables::read()?;
    let vm = foreign(&args)?;
    let guest = args.vm.guest(args.guest);
    let place = Place::of(guest, vm.clone(), args.transport, args.allow_backing)?;
    let run = || Run::start_anonymous(Path::new(""), vm.as_ref());
    let machine = Machine::start(place, run, &interrupt).await?;
    let result = job(&args, &machine, &interrupt, &progress).await;
    progress.stage("releasing everything");
    let recorder = machine.recorder().clone();
    let ended = machine.end(&interrupt).await;
    progress.done();
    let after = Tables::read()?;
    let mut left_over = after.left_over(&ended.ours, &before, loop_marks);
    left_over.extend(ended.left_in_guest);
    let mut report = match (result, ended.result) {
        (Ok(report), Ok(())) => report,
        (Ok(_), Err(failure)) => return Err(failure),
        (Err(failure), ended) => return Err(account_for(failure, ended, &left_over)),
    };
    let counts = recorder.counts();
    (report.detaches, report.unmounts) = (counts.detaches, counts.unmounts);
    report.left_over = left_over;
    match args.json {
        true => print_json(&report)?,
        false => {
            print(&report.to_text())?;
            print(&format!(
                "kernel's tables: {} mounts and {} loop devices before, {} and {} after, of this run: {}",
                before.mounts(),
                before.loops(),
                after.mounts(),
                after.loops(),
                report.left_over.len(),
            ))?;
        }
    }
    Ok(if report.is_good() { 0 } else { FAILED })
}

/// The virtual machine that somebody else has started, with the way to who digests files there.
fn foreign(args: &DemoArgs) -> Result<Option<ForeignVm>, Failure> {
    let vm = args.vm.foreign(args.guest)?;
    match (vm, &args.checker) {
        (Some(vm), Some(_)) => Ok(Some(ForeignVm {
            checker: args.checker.clone(),
            ..vm
        })),
        (Some(_), None) => {
            let what = "the demo digests files in the guest, which an agent does not do";
            let advice = "have \"blockmount checker\" run there, and add --checker unix:PATH";
            Err(Failure::usage(what).advise(advice))
        }
        (None, _) => Ok(None),
    }
}

/// After a failure the user wants to know first whether anything is left.
fn account_for(failure: Failure, ended: Result<(), Failure>, left_over: &[String]) -> Failure {
    match ended {
        Ok(()) if left_over.is_empty() => {
            say(format_args!("everything was released; nothing is left"));
            failure
        }
        Ok(()) => {
            complain(&failure);
            Failure::new("something is left over")
                .because(left_over.join("; "))
                .advise(format!("run: {}blockmount cleanup", sudo()))
        }
        Err(ended) => {
            complain(&failure);
            ended
        }
    }
}

/// Everything between the start of the run and its end.
async fn job(
    args: &DemoArgs,
    machine: &Machine,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Report, Failure> {
    let test_images = match args.layers.given.is_empty() {
        true => {
            let limits = match machine.guest() {
                Guest::Local(_) => Limits::LAYER,
                Guest::Qemu(_) => Limits::LAYER_OF_MACHINE,
            };
            let directory = machine.work_dir()?;
            make(directory, limits, machine.helper(), interrupt, progress).await?
        }
        false => given(args, machine, interrupt, progress).await?,
    };
    progress.stage("making scratch disks");
    let mut scratches = Vec::new();
    for name in CONTAINERS {
        let image = machine.work_dir()?.join(format!("scratch-{name}.ext4"));
        images::scratch(&image, SCRATCH_SIZE, interrupt).await?;
        scratches.push(image);
    }
    interrupt.check()?;

    let start = Instant::now();
    progress.stage(format!(
        "adding {} layers, twice, all at once",
        test_images.len()
    ));
    let layers: Vec<Layer> = test_images
        .iter()
        .map(|image| image.layer.clone())
        .collect();
    let disks = machine.disks(&layers, args.allow_backing).await?;
    let requests = [0, 1].map(|index| {
        let target = machine.own_target(CONTAINERS[index]);
        request(&target, &layers, &disks, &scratches[index])
    });
    let [one, two] = requests;
    let requests = [one?, two?];
    let manager = machine.manager();
    let (one, two) = tokio::join!(manager.stack(&requests[0]), manager.stack(&requests[1]));
    let stacks = [one?, two?];
    let required = args.transport.map(Transports::required);
    if let (Guest::Qemu(_), Some(Some(scheme))) = (machine.guest(), required) {
        refuse_others(&stacks, scheme)?;
    }
    let scene = Scene {
        machine,
        layers,
        scratches,
        stacks,
        start,
    };
    let checked = scene.check(test_images, interrupt, progress).await?;
    let mut report = scene.report(checked).await?;
    progress.stage("releasing both containers");
    for stack in scene.stacks {
        stack
            .release()
            .await
            .context(|| "cannot release a container".to_owned())?;
    }
    // The bare commands of the comparison take slots as they please, which nobody else's machine has for us.
    if let Guest::Qemu(guest) = machine.guest()
        && guest.is_own()
    {
        let directory = machine.work_dir()?;
        report.speed = Some(speed::measure(guest, directory, interrupt, progress).await?);
    }
    Ok(report)
}

/// What did not fit on a transport went to the next, which was not asked for.
fn refuse_others(stacks: &[Stack], scheme: &str) -> Result<(), Failure> {
    let mut layers = stacks.iter().flat_map(Stack::layers);
    match layers.find(|layer| layer.locator().transport() != scheme) {
        None => Ok(()),
        Some(layer) => {
            let at = layer.locator();
            let what = format!("a layer does not fit on {scheme}, and is {at}");
            Err(Failure::new(what).advise("use --transport auto"))
        }
    }
}

fn request(
    target: &Path,
    layers: &[Layer],
    disks: &[Disk],
    scratch: &Path,
) -> Result<StackRequest, Failure> {
    let mut stack = StackRequest::new(target);
    for (layer, disk) in layers.iter().zip(disks) {
        stack = stack.layer(disk.clone(), layer_request(layer)?);
    }
    Ok(stack.scratch(Disk::virtual_disk(scratch), MountRequest::default()))
}

/// Reads what is in the user's images, each mounted by itself.
async fn given(
    args: &DemoArgs,
    machine: &Machine,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Vec<TestImage>, Failure> {
    let layers = distinct(&args.layers.given);
    if !keys::read(&layers)?.is_empty() {
        let what = "a demo takes keys from keyrings alone";
        return Err(Failure::usage(what).advise("use \"blockmount mount\" for a key in a file"));
    }
    let disks = machine.local_disks(&layers, args.allow_backing).await?;
    let mut test_images = Vec::new();
    for (layer, disk) in layers.iter().zip(disks) {
        interrupt.check()?;
        progress.stage(format!("reading {}", layer.image.display()));
        let mount = machine.helper().add(&disk, &layer_request(layer)?).await?;
        let path = mount.path().to_owned();
        let tree = interrupt
            .blocking(move |stop| stop.bound(|stop| Tree::read(&path, stop, || ())))
            .await;
        let released = mount.release().await;
        released.context(|| format!("cannot release {}", layer.image.display()))?;
        test_images.push(TestImage {
            layer: layer.clone(),
            tree: tree?,
        });
    }
    Ok(test_images)
}

/// Both containers, up.
struct Scene<'a> {
    machine: &'a Machine,
    layers: Vec<Layer>,
    scratches: Vec<PathBuf>,
    stacks: [Stack; 2],
    start: Instant,
}

/// What the checks found.
struct Checked {
    check: Check,
    files: [u64; 2],
}

impl Scene<'_> {
    /// Compares both containers with the sources, has each write, and compares again.
    async fn check(
        &self,
        test_images: Vec<TestImage>,
        interrupt: &Interrupt,
        progress: &Progress,
    ) -> Result<Checked, Failure> {
        let expected = Arc::new(Tree::merged(test_images.iter().map(|image| &image.tree)));
        let targets = [0, 1].map(|index| self.stacks[index].target().to_owned());
        let guest = self.machine.guest();

        progress.stage("comparing every file in both containers with its source");
        let mut check = Check::default();
        let pass =
            check::trees(guest, interrupt, progress, &targets, [&expected, &expected]).await?;
        let files = pass.files();
        check.add(pass);

        progress.stage("writing in both containers, and comparing again");
        let after = check::write(guest, interrupt, &targets, &expected).await?;
        check
            .add(check::trees(guest, interrupt, progress, &targets, [&after[0], &after[1]]).await?);

        progress.stage("comparing every layer with its source again");
        for (image, mount) in test_images.into_iter().zip(self.stacks[0].layers()) {
            let (path, tree) = (mount.path().to_owned(), Arc::new(image.tree));
            check.add(check::trees(guest, interrupt, progress, &[path], [&tree]).await?);
        }
        Ok(Checked { check, files })
    }

    async fn report(&self, checked: Checked) -> Result<Report, Failure> {
        let mounts = self.machine.guest().mounts().await?;
        let mounts =
            mounts.ok_or_else(|| Failure::new("nobody in the guest says what is mounted"))?;
        let mut layers = Vec::new();
        for (layer, mount) in self.layers.iter().zip(self.stacks[0].layers()) {
            let sharing = self.stacks.iter().filter(|stack| {
                stack
                    .layers()
                    .iter()
                    .any(|other| other.path() == mount.path())
            });
            layers.push(self.disk(layer, Role::Layer, mount, sharing.count(), &mounts)?);
        }
        for (image, stack) in self.scratches.iter().zip(&self.stacks) {
            let layer = Layer::of(image);
            let mount = stack
                .scratch()
                .expect("each container was asked for with a scratch disk");
            layers.push(self.disk(&layer, Role::Scratch, mount, 1, &mounts)?);
        }
        let recorder = self.machine.recorder();
        let containers = CONTAINERS
            .iter()
            .zip(&self.stacks)
            .zip(checked.files)
            .enumerate();
        let containers = containers.map(|(index, ((name, stack), files))| ContainerReport {
            name,
            path: stack.target().display().to_string(),
            scratch: self.scratches[index].display().to_string(),
            overlay_ms: milliseconds(recorder.combined(stack.target()).unwrap_or_default()),
            files,
        });
        let containers = containers.collect();
        let counts = recorder.counts();
        let Check { files, mismatches } = checked.check;
        Ok(Report {
            guest: self.machine.guest().name(),
            layers,
            containers,
            slots: self.machine.guest().slots(),
            distinct_images: self.distinct_images()?,
            attaches: counts.attaches,
            detaches: counts.detaches,
            mounts: counts.mounts,
            unmounts: counts.unmounts,
            files_checked: files,
            digest_mismatches: mismatches.len(),
            mismatches: mismatches.into_iter().take(LISTED).collect(),
            left_over: Vec::new(),
            speed: None,
            seconds: (self.start.elapsed().as_secs_f64() * 1e3).round() / 1e3,
        })
    }

    fn disk(
        &self,
        layer: &Layer,
        role: Role,
        mount: &MountPoint,
        containers: usize,
        mounts: &Mounts,
    ) -> Result<LayerReport, Failure> {
        let path = mount.path();
        let seen = mounts.at(path)?;
        let recorder = self.machine.recorder();
        let attached = recorder.by_locator(mount.locator());
        Ok(LayerReport {
            source: layer.image.display().to_string(),
            role,
            partition: layer.partition.map(u32::from),
            filesystem: seen.filesystem.clone(),
            transport: mount.locator().transport().to_owned(),
            locator: mount.locator().to_string(),
            device: seen.device.clone(),
            path: path.display().to_string(),
            attach_ms: milliseconds(attached.map_or(Duration::ZERO, |attached| attached.took)),
            mount_ms: milliseconds(recorder.mounted(path).unwrap_or_default()),
            passed_on: recorder.passed_on(&layer.image),
            containers,
        })
    }

    /// Counts files, not names: two names of one image are one image.
    fn distinct_images(&self) -> Result<usize, Failure> {
        use std::os::unix::fs::MetadataExt;
        let images = self
            .layers
            .iter()
            .map(|layer| &layer.image)
            .chain(&self.scratches);
        let mut distinct = BTreeSet::new();
        for image in images {
            let metadata = image
                .metadata()
                .context(|| format!("cannot look at {}", image.display()))?;
            distinct.insert((metadata.dev(), metadata.ino()));
        }
        Ok(distinct.len())
    }
}
