//! Views of a mount of the program: the tree, or a layer of it, at further places.

use std::fmt;

use blockmount::{Disk, MountRequest, Stack, View, ViewRequest};
use serde::Serialize;

use crate::args::{MountArgs, Shown};
use crate::failure::{Failure, printable};
use crate::interrupt::Interrupt;
use crate::machine::{Machine, name_of_view};

/// A view, as it is shown while it is held.
#[derive(Debug, Serialize)]
pub(crate) struct HeldView {
    path: String,
    /// Where what it shows is mounted.
    of: String,
    /// The directory of that; the root if it is empty.
    subpath: String,
    read_only: bool,
}

impl HeldView {
    pub(crate) fn of(view: &View) -> Self {
        let options = view.options();
        HeldView {
            path: view.target().display().to_string(),
            of: view.source().display().to_string(),
            subpath: options.subpath().display().to_string(),
            read_only: options.is_read_only(),
        }
    }
}

impl fmt::Display for HeldView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match self.read_only {
            true => "read-only ",
            false => "",
        };
        let of = std::path::Path::new(&self.of).join(&self.subpath);
        let (of, path) = (printable(of.display()), printable(&self.path));
        write!(f, "{access}view of {of} at {path}")
    }
}

/// Refuses views of layers that are not there, before anything is begun.
pub(crate) fn refuse_absent_layers(args: &MountArgs) -> Result<(), Failure> {
    let layers = args.layers.given.len();
    let numbers = args.views.iter().filter_map(|shown| shown.layer);
    match numbers.map(usize::from).find(|number| *number > layers) {
        None => Ok(()),
        Some(number) => {
            let what = format!("there is no layer {number} for a --view, only {layers}");
            Err(Failure::usage(what).advise("count the layers from the topmost, which is 1"))
        }
    }
}

/// Makes all views, in their order.
pub(crate) async fn make(
    args: &MountArgs,
    layers: &[(Disk, MountRequest)],
    stack: &Stack,
    machine: &mut Machine,
    interrupt: &Interrupt,
) -> Result<Vec<View>, Failure> {
    let mut views = Vec::new();
    for (index, shown) in args.views.iter().enumerate() {
        machine.note_target(&shown.at)?;
        let mut request = ViewRequest::new(&shown.at, shown.options.clone());
        if let Some(name) = &args.name {
            request = request.held_by(name_of_view(name, index)?);
        }
        views.push(view(layers, stack, shown, &request, machine).await?);
        interrupt.check()?;
    }
    Ok(views)
}

async fn view(
    layers: &[(Disk, MountRequest)],
    stack: &Stack,
    shown: &Shown,
    request: &ViewRequest,
    machine: &Machine,
) -> Result<View, Failure> {
    let manager = machine.manager();
    let layer = shown.layer.and_then(|number| layers.get(number.get() - 1));
    let Some((disk, mount)) = layer else {
        return Ok(manager.view(stack, request).await?);
    };
    // It is mounted for the stack, which this is one more share of.
    let mount = manager.add(disk, mount).await?;
    let view = manager.view(&mount, request).await;
    // The stack has the mount too, and so has the view.
    drop(mount);
    Ok(view?)
}
