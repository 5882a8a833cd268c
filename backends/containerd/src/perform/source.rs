//! What the places of a plan come to: the image or the overlay behind them.

use std::path::{Path, PathBuf};

use super::error::{At, PerformError};
use crate::place::Place;
use crate::plan::{Action, Image, Overlay, Plan, Scratch};

/// What a guest makes ([`blockmount::Format`]).
const MADE: [&str; 2] = ["ext4", "xfs"];

/// What is seen at a place, through all binds on the way.
#[derive(Debug)]
pub(super) struct Source {
    /// The step of the image or overlay.
    pub(super) step: usize,
    /// Where in it.
    pub(super) subpath: PathBuf,
    /// Whether a bind on the way is read-only.
    pub(super) read_only: bool,
    /// The options of the binds on the way.
    pub(super) options: Vec<String>,
}

pub(super) fn source(plan: &Plan, place: &Place) -> Source {
    let mut source = Source {
        step: place.step,
        subpath: place.subpath.clone(),
        read_only: false,
        options: Vec::new(),
    };
    // Each bind shows what comes before it, so this ends.
    while let Action::Bind(bind) = &plan.steps[source.step].action {
        source.step = bind.source.step;
        source.subpath = bind.source.subpath.join(&source.subpath);
        source.read_only |= bind.read_only;
        source.options.extend(bind.options.iter().cloned());
    }
    source
}

/// The images of an overlay, by their steps; the scratch with the directory that has `upper` and `work`.
pub(super) struct StackSources {
    pub(super) lower: Vec<usize>,
    pub(super) scratch: Option<(usize, PathBuf)>,
}

pub(super) fn stack_sources(plan: &Plan, overlay: &Overlay) -> StackSources {
    let scratch = overlay.scratch.as_ref().map(|scratch| {
        let upper = source(plan, &scratch.upper);
        let directory = upper.subpath.parent().unwrap_or(Path::new(""));
        (upper.step, directory.to_owned())
    });
    StackSources {
        lower: overlay
            .lower
            .iter()
            .map(|lower| source(plan, lower).step)
            .collect(),
        scratch,
    }
}

/// For each step whether it is an image that belongs to a stack.
pub(super) fn stacked(plan: &Plan) -> Vec<bool> {
    let mut stacked = vec![false; plan.steps.len()];
    for planned in &plan.steps {
        if let Action::Overlay(overlay) = &planned.action {
            let StackSources { lower, scratch } = stack_sources(plan, overlay);
            let scratch = scratch.map(|(scratch, _)| scratch);
            lower
                .into_iter()
                .chain(scratch)
                .for_each(|step| stacked[step] = true);
        }
    }
    stacked
}

/// Whether a step is a `loop` whose disk a later mount takes: nobody else may see the device of a filesystem that is mounted.
pub(super) fn is_taken(plan: &Plan, step: usize) -> bool {
    let Some(image) = plan.steps[step].action.as_loop() else {
        return false;
    };
    plan.steps[step + 1..]
        .iter()
        .any(|later| match &later.action {
            Action::Image(mounted) => mounted.filesystem.is_some() && mounted.path == image.path,
            _ => false,
        })
}

/// Refuses what can be planned and is not done here, before anything is touched.
pub(super) fn validate(plan: &Plan) -> Result<(), PerformError> {
    for (step, planned) in plan.steps.iter().enumerate() {
        let refused = |reason: String| Err(At { plan, step }.invalid(reason));
        let overlay = match &planned.action {
            Action::Overlay(overlay) => overlay,
            Action::Image(Image {
                create: Some(new), ..
            }) => {
                if !MADE.contains(&new.filesystem.as_str()) {
                    let made = MADE.join(" and ");
                    return refused(format!("guests make {made}, and no {}", new.filesystem));
                }
                continue;
            }
            _ => continue,
        };
        for lower in &overlay.lower {
            let found = source(plan, lower);
            let is_image = matches!(plan.steps[found.step].action, Action::Image(_));
            if !is_image || !found.subpath.as_os_str().is_empty() {
                return refused(format!(
                    "{lower} is no whole image; those are what is stacked"
                ));
            }
        }
        let Some(scratch) = &overlay.scratch else {
            continue;
        };
        if !is_scratch(plan, scratch) {
            return refused(format!(
                "upperdir is {} and workdir is {}; they must be directories of one image that are called upper and work",
                scratch.upper, scratch.work
            ));
        }
        if overlay.options.iter().any(|option| option == "ro") {
            return refused("it is ro, and has an upperdir to write to".to_owned());
        }
    }
    Ok(())
}

fn is_scratch(plan: &Plan, scratch: &Scratch) -> bool {
    let (upper, work) = (source(plan, &scratch.upper), source(plan, &scratch.work));
    matches!(plan.steps[upper.step].action, Action::Image(_))
        && upper.step == work.step
        && !upper.read_only
        && !work.read_only
        && upper.subpath.ends_with("upper")
        && work.subpath.ends_with("work")
        && upper.subpath.parent() == work.subpath.parent()
}
