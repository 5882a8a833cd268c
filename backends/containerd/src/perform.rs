//! Performing a plan through a manager, and taking it back.
//!
//! What a plan comes to is a few handles of the manager: one for each bind, each overlay, and each image that no overlay has; the
//! images of an overlay belong to its stack. Each has a name made of that of the whole, by which it is found again after a
//! restart.

mod error;
mod prepare;
mod released;
mod source;

use std::path::{Path, PathBuf};

use blockmount::{
    Attachment, Held, HolderName, InvalidHolderName, Manager, Mount, MountRequest, NewDirectory,
    OverlayOptions, StackRequest, View, ViewOptions, ViewRequest, Viewable, blocking,
};

use crate::mkdir::Directory;
use crate::plan::{Action, Bind, Overlay, Plan};

use error::At;
pub use error::PerformError;
use prepare::Prepared;
pub use released::{Lost, Performed, Unreleased};
use source::{Source, is_taken, source, stack_sources, stacked};

/// The names under which the handles of a plan are held, by the name of the whole.
///
/// # Errors
///
/// If the name is too long for that.
pub fn holders(plan: &Plan, name: &str) -> Result<Vec<HolderName>, InvalidHolderName> {
    let stacked = stacked(plan).into_iter().enumerate();
    let held = stacked.filter(|(_, stacked)| !stacked);
    held.map(|(step, _)| holder(name, step)).collect()
}

fn holder(name: &str, step: usize) -> Result<HolderName, InvalidHolderName> {
    HolderName::new(format!("{name}/{step}"))
}

/// Does what a plan says, all or nothing. Its handles are held by the names that [`holders`] tells.
///
/// Images that others have mounted with the same options are shared: [`Performed::points`] says where each mount is.
///
/// # Errors
///
/// [`PerformError::Invalid`] for what this crate does not do, before anything is attached; [`PerformError::Failed`] for what the
/// host or the guest answers. What was done until then is undone, and a file that `mkfs/` made is removed; what cannot be undone at
/// once is pending in the manager.
///
/// # Cancel safety
///
/// None: run it in a task of its own. Dropped, it is taken back in the background, except for files that were made.
///
/// # Panics
///
/// Outside of a tokio runtime.
pub async fn perform(
    manager: &Manager,
    plan: &Plan,
    name: &str,
) -> Result<Performed, PerformError> {
    source::validate(plan)?;
    let mut performer = Performer {
        manager,
        plan,
        name,
        stacked: stacked(plan),
        images: prepare_all(plan).await?,
        held: Vec::new(),
        borrowed: Vec::new(),
        points: vec![None; plan.steps.len()],
    };
    let done = performer.all().await;
    for (_, mount) in std::mem::take(&mut performer.borrowed) {
        if let Err(error) = mount.release().await {
            tracing::warn!(error = %error.error(), "a share of a mount could not be released");
        }
    }
    match done {
        Ok(()) => Ok(performer.performed()),
        Err(error) => {
            performer.undo().await;
            Err(error)
        }
    }
}

/// Makes the images of a plan ready, all or nothing.
async fn prepare_all(plan: &Plan) -> Result<Vec<Option<Prepared>>, PerformError> {
    let mut images = Vec::with_capacity(plan.steps.len());
    for (step, planned) in plan.steps.iter().enumerate() {
        let Action::Image(image) = &planned.action else {
            images.push(None);
            continue;
        };
        let image = image.clone();
        match blocking(move || prepare::prepare(&image)).await {
            Ok(prepared) => images.push(Some(prepared)),
            Err(error) => {
                remove_made(&images).await;
                return Err(At { plan, step }.failed_here(error));
            }
        }
    }
    Ok(images)
}

async fn remove_made(images: &[Option<Prepared>]) {
    let made = images
        .iter()
        .flatten()
        .filter_map(|image| image.made.clone());
    let made: Vec<PathBuf> = made.collect();
    let removed = blocking(move || {
        made.iter().for_each(|path| prepare::remove(path));
        Ok(())
    });
    if let Err(error) = removed.await {
        tracing::warn!(%error, "files that were made for a mount that has failed may be left");
    }
}

struct Performer<'a> {
    manager: &'a Manager,
    plan: &'a Plan,
    name: &'a str,
    /// For each step whether it is an image of a stack.
    stacked: Vec<bool>,
    /// What the images are attached and mounted by, for each step that is one.
    images: Vec<Option<Prepared>>,
    /// What is held in the end, by its step, in the order in which it was made.
    held: Vec<(usize, Held)>,
    /// Shares of the mounts of a stack, for as long as this runs.
    borrowed: Vec<(usize, Mount)>,
    points: Vec<Option<PathBuf>>,
}

impl Performer<'_> {
    async fn all(&mut self) -> Result<(), PerformError> {
        for (step, planned) in self.plan.steps.iter().enumerate() {
            for (number, directory) in planned.directories.iter().enumerate() {
                if !is_made_anyway(&planned.action, directory) {
                    self.make_directory(step, number, directory).await?;
                }
            }
            match &planned.action {
                Action::Image(_) if self.stacked[step] => {}
                Action::Image(_) if is_taken(self.plan, step) => {
                    let attachment = self.attach(step).await?;
                    self.points[step] = Some(PathBuf::new());
                    self.held.push((step, Held::Attachment(attachment)));
                }
                Action::Image(_) => {
                    let mount = self.add(step, Some(self.holder(step)?)).await?;
                    self.points[step] = Some(mount.path().to_owned());
                    self.held.push((step, Held::Mount(mount)));
                }
                Action::Bind(bind) => self.bind(step, bind, &planned.directories).await?,
                Action::Overlay(overlay) => self.stack(step, overlay).await?,
            }
        }
        Ok(())
    }

    fn at(&self, step: usize) -> At<'_> {
        At {
            plan: self.plan,
            step,
        }
    }

    fn holder(&self, step: usize) -> Result<HolderName, PerformError> {
        let invalid = |error: InvalidHolderName| self.at(step).invalid(error.to_string());
        holder(self.name, step).map_err(invalid)
    }

    fn image(&self, step: usize) -> &Prepared {
        self.images[step]
            .as_ref()
            .expect("every image is prepared before the first is attached")
    }

    async fn add(&self, step: usize, holder: Option<HolderName>) -> Result<Mount, PerformError> {
        let Prepared { disk, request, .. } = self.image(step);
        let request = match holder {
            Some(name) => request.clone().held_by(name),
            None => request.clone(),
        };
        let added = self.manager.add(disk, &request).await;
        added.map_err(|error| self.at(step).failed(error))
    }

    async fn attach(&self, step: usize) -> Result<Attachment, PerformError> {
        let (disk, holder) = (&self.image(step).disk, self.holder(step)?);
        let attached = self.manager.attach_held_by(disk, &holder).await;
        attached.map_err(|error| self.at(step).failed(error))
    }

    /// Makes a directory in what an earlier mount has, by a view of it that goes at once.
    async fn make_directory(
        &mut self,
        step: usize,
        number: usize,
        directory: &Directory,
    ) -> Result<(), PerformError> {
        let source = source(self.plan, &directory.place);
        let mut target = self.plan.steps[step].mount_point.clone().into_os_string();
        target.push(format!(".mkdir{number}"));
        let options = making(ViewOptions::default(), &source.subpath, directory);
        let options = options.map_err(|error| self.at(step).invalid(error.to_string()))?;
        let request = ViewRequest::new(PathBuf::from(target), options);
        let view = self.view(step, &source, &request).await?;
        let released = view.release().await;
        released.map_err(|error| self.at(step).failed(error.error().clone()))
    }

    async fn bind(
        &mut self,
        step: usize,
        bind: &Bind,
        directories: &[Directory],
    ) -> Result<(), PerformError> {
        let source = source(self.plan, &bind.source);
        let read_only = (bind.read_only || source.read_only).then(|| "ro".to_owned());
        let words = source
            .options
            .iter()
            .chain(&bind.options)
            .cloned()
            .chain(read_only);
        let invalid = |error: blockmount::InvalidOptions| self.at(step).invalid(error.to_string());
        let mut options = ViewOptions::new(words).map_err(invalid)?;
        options = match directories.iter().find(|new| new.place == bind.source) {
            Some(directory) => making(options, &source.subpath, directory),
            None => options.with_subpath(&source.subpath),
        }
        .map_err(invalid)?;
        let target = &self.plan.steps[step].mount_point;
        let request = ViewRequest::new(target, options).held_by(self.holder(step)?);
        let view = self.view(step, &source, &request).await?;
        self.points[step] = Some(view.target().to_owned());
        self.held.push((step, Held::View(view)));
        Ok(())
    }

    async fn view(
        &mut self,
        step: usize,
        source: &Source,
        request: &ViewRequest,
    ) -> Result<View, PerformError> {
        if self.viewable(source.step).is_none() {
            let mount = self.add(source.step, None).await?;
            self.borrowed.push((source.step, mount));
        }
        let of = self.viewable(source.step);
        let of = of.ok_or_else(|| {
            self.at(step)
                .invalid("what it shows is no mount and no overlay")
        })?;
        let view = self.manager.view(of, request).await;
        view.map_err(|error| self.at(step).failed(error))
    }

    fn viewable(&self, step: usize) -> Option<Viewable<'_>> {
        let borrowed = self.borrowed.iter().find(|(of, _)| *of == step);
        if let Some((_, mount)) = borrowed {
            return Some(mount.into());
        }
        let (_, held) = self.held.iter().find(|(of, _)| *of == step)?;
        match held {
            Held::Mount(mount) => Some(mount.into()),
            Held::Stack(stack) => Some(stack.into()),
            _ => None,
        }
    }

    async fn stack(&mut self, step: usize, overlay: &Overlay) -> Result<(), PerformError> {
        let sources = stack_sources(self.plan, overlay);
        let invalid = |error: blockmount::InvalidOptions| self.at(step).invalid(error.to_string());
        // A tree without a scratch is read-only by itself.
        let words = overlay
            .options
            .iter()
            .filter(|word| !["ro", "rw"].contains(&word.as_str()));
        let options = OverlayOptions::new(words.cloned()).map_err(invalid)?;
        let mut request = StackRequest::new(&self.plan.steps[step].mount_point)
            .options(options)
            .held_by(self.holder(step)?);
        for lower in &sources.lower {
            let (disk, mount) = self.image_of_stack(*lower);
            request = request.layer(disk, mount);
        }
        if let Some((scratch, directory)) = &sources.scratch {
            let (disk, mount) = self.image_of_stack(*scratch);
            request = request.scratch(disk, mount).scratch_directory(directory);
        }
        let stack = self.manager.stack(&request).await;
        let stack = stack.map_err(|error| self.at(step).failed(error))?;
        for (lower, layer) in sources.lower.iter().zip(stack.layers()) {
            self.points[*lower] = Some(layer.path().to_owned());
        }
        if let (Some((step, _)), Some(scratch)) = (&sources.scratch, stack.scratch()) {
            self.points[*step] = Some(scratch.path().to_owned());
        }
        self.points[step] = Some(stack.target().to_owned());
        self.held.push((step, Held::Stack(stack)));
        Ok(())
    }

    fn image_of_stack(&self, step: usize) -> (blockmount::Disk, MountRequest) {
        let image = self.image(step);
        (image.disk.clone(), image.request.clone())
    }

    fn performed(self) -> Performed {
        let planned = self.plan.steps.iter().map(|step| &step.mount_point);
        let points = self.points.into_iter().zip(planned);
        let points = points.map(|(point, planned)| point.unwrap_or_else(|| planned.clone()));
        Performed::new(
            points.collect(),
            self.held.into_iter().map(|(_, held)| held).collect(),
        )
    }

    async fn undo(mut self) {
        let held = std::mem::take(&mut self.held)
            .into_iter()
            .map(|(_, held)| held);
        match Performed::new(Vec::new(), held.collect()).release().await {
            Ok(()) => remove_made(&self.images).await,
            // The files stay with what uses them.
            Err(error) => {
                tracing::error!(%error, "a list of mounts that has failed is not all undone");
            }
        }
    }
}

/// Whether an overlay makes a directory by itself, where nobody sees its mode.
fn is_made_anyway(action: &Action, directory: &Directory) -> bool {
    match action {
        Action::Overlay(overlay) => {
            let scratch = overlay.scratch.as_ref();
            scratch.is_some_and(|scratch| scratch.work == directory.place)
        }
        // A view makes the one that it shows.
        Action::Bind(bind) => bind.source == directory.place,
        Action::Image(_) => false,
    }
}

fn making(
    options: ViewOptions,
    subpath: &Path,
    directory: &Directory,
) -> Result<ViewOptions, blockmount::InvalidOptions> {
    let (user, group) = directory.owner.unwrap_or((0, 0));
    let mode = directory.mode;
    let new = NewDirectory { mode, user, group };
    options.with_subpath(subpath)?.with_new_directory(new)
}
