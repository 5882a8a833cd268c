//! Understanding a list of mounts.

use std::path::{Path, PathBuf};

use crate::mkfs::NewImage;
use crate::mount::{InvalidMount, Mount};
use crate::place::Place;
use crate::plan::{Action, Bind, Image, Overlay, Plan, Scratch, Step};
use crate::template::fill;
use crate::words::{OWN, lower_directories};
use crate::{TRANSFORMS, mkdir, mkfs};

/// The longest list, in mounts. The kernel stacks 500 layers.
pub const MAX_MOUNTS: usize = 1_024;
/// The longest list, in bytes of all its words together: 1 MiB.
pub const MAX_BYTES: usize = 1 << 20;

/// Filesystems of block devices that are only read.
const READ_ONLY: [&str; 2] = ["erofs", "squashfs"];
/// Filesystems of block devices that may be written.
const WRITABLE: [&str; 5] = ["ext2", "ext3", "ext4", "xfs", "btrfs"];

/// Understands a list of mounts. `root` is the directory in the guest below which the mount points are, `ROOT/0`,
/// `ROOT/1` and so on: one that nothing else uses.
///
/// The steps are the mounts up to the first that is no business of this crate; that one and all behind it are `system`.
///
/// # Errors
///
/// [`InvalidMount`]: the first mount that makes no sense. Nothing is touched in any case: no file is looked at.
pub fn plan(list: &[Mount], root: &Path) -> Result<Plan, InvalidMount> {
    plan_in(list, root, false)
}

/// The same for a guest that is this host: an `overlay` of directories of the host and of earlier mounts is `system`, as the caller can
/// mount it here.
///
/// # Errors
///
/// As for [`plan`].
pub fn plan_here(list: &[Mount], root: &Path) -> Result<Plan, InvalidMount> {
    plan_in(list, root, true)
}

fn plan_in(list: &[Mount], root: &Path, here: bool) -> Result<Plan, InvalidMount> {
    let at = |index: usize, reason: String| InvalidMount {
        index,
        kind: list[index].kind.clone(),
        reason,
    };
    if list.len() > MAX_MOUNTS {
        let reason = format!("the list has {} mounts, over {MAX_MOUNTS}", list.len());
        return Err(at(MAX_MOUNTS, reason));
    }
    let mut planner = Planner {
        root,
        here,
        steps: Vec::new(),
    };
    let mut total = 0;
    for (index, mount) in list.iter().enumerate() {
        total += check_words(mount).map_err(|reason| at(index, reason))?;
        if total > MAX_BYTES {
            return Err(at(index, format!("the list has over {MAX_BYTES} bytes")));
        }
    }
    for (index, mount) in list.iter().enumerate() {
        let step = planner.step(mount).map_err(|reason| at(index, reason))?;
        if let Some(step) = step {
            planner.steps.push(step);
            continue;
        }
        let first = planner
            .for_the_caller(mount)
            .map_err(|reason| at(index, reason))?;
        let rest = list[index + 1..].iter().cloned();
        let system = std::iter::once(first).chain(rest).collect();
        return Ok(Plan {
            steps: planner.steps,
            system,
        });
    }
    Ok(Plan {
        steps: planner.steps,
        system: Vec::new(),
    })
}

/// How long the words of a mount are together; refuses what no path and no option has.
fn check_words(mount: &Mount) -> Result<usize, String> {
    let words = [&mount.kind, &mount.source, &mount.target];
    let words = words.into_iter().chain(&mount.options);
    let mut total = 0;
    for word in words {
        if word.chars().any(char::is_control) {
            return Err(format!("{word:?} has a control character"));
        }
        total += word.len();
    }
    Ok(total)
}

/// The transforms of a type, and what is left of it: its base, or an unknown transform and all behind it.
pub(crate) fn transforms(kind: &str) -> (Vec<&str>, &str) {
    let (mut transforms, mut base) = (Vec::new(), kind);
    while let Some((transform, rest)) = base.split_once('/') {
        if !TRANSFORMS.contains(&transform) {
            break;
        }
        transforms.push(transform);
        base = rest;
    }
    (transforms, base)
}

struct Planner<'a> {
    root: &'a Path,
    /// Whether paths of the host are paths in the guest.
    here: bool,
    steps: Vec<Step>,
}

impl Planner<'_> {
    fn filled(&self, mount: &Mount) -> Result<Mount, String> {
        let options = mount.options.iter().map(|option| fill(option, &self.steps));
        Ok(Mount {
            kind: mount.kind.clone(),
            source: fill(&mount.source, &self.steps)?,
            target: fill(&mount.target, &self.steps)?,
            options: options.collect::<Result<_, _>>()?,
        })
    }

    /// The first mount that is left for the caller: only its templates are filled in.
    fn for_the_caller(&self, mount: &Mount) -> Result<Mount, String> {
        let (transforms, base) = transforms(&mount.kind);
        if !transforms.contains(&"format") {
            return Ok(mount.clone());
        }
        let mut filled = self.filled(mount)?;
        let left = transforms
            .into_iter()
            .filter(|transform| *transform != "format");
        filled.kind = left.chain([base]).collect::<Vec<_>>().join("/");
        Ok(filled)
    }

    /// What is done for a mount; `None` if that is no business of ours.
    fn step(&self, mount: &Mount) -> Result<Option<Step>, String> {
        let (transforms, base) = transforms(&mount.kind);
        let mut done = match transforms.contains(&"format") {
            true => self.filled(mount)?,
            false => mount.clone(),
        };
        base.clone_into(&mut done.kind);
        let places = self.places(&done)?;
        let of_both = base == "overlay" && places.iter().any(Option::is_none);
        if !is_ours(base, &places) || self.here && of_both {
            return Ok(None);
        }
        let creates = transforms.contains(&"mkfs");
        let create = match creates {
            true => Some(mkfs::take(&mut done.options)?),
            false => None,
        };
        let directories = match transforms.contains(&"mkdir") {
            true => mkdir::take(&mut done.options, self.root, self.steps.len())?,
            false => Vec::new(),
        };
        let action = match base {
            "bind" => Action::Bind(bind(&done, places)?),
            "overlay" => Action::Overlay(self.overlay(&done)?),
            _ => Action::Image(self.image(&done, create, places)?),
        };
        if creates && !matches!(action, Action::Image(_)) {
            return Err(format!("mkfs/ makes images, and {base} mounts none"));
        }
        Ok(Some(Step {
            mount_point: self.root.join(self.steps.len().to_string()),
            mount: done,
            directories,
            action,
        }))
    }

    /// The places in earlier mounts that a mount is made of: its source, or the directories of an overlay.
    fn places(&self, mount: &Mount) -> Result<Vec<Option<Place>>, String> {
        let of = |path: &str| Place::of(path, self.root, self.steps.len());
        if mount.kind != "overlay" {
            return Ok(vec![of(&mount.source)?]);
        }
        let mut places = Vec::new();
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", value)) => {
                    for directory in lower_directories(value) {
                        places.push(of(&directory)?);
                    }
                }
                Some(("upperdir" | "workdir", value)) => places.push(of(value)?),
                _ => {}
            }
        }
        Ok(places)
    }

    fn image(
        &self,
        mount: &Mount,
        create: Option<NewImage>,
        places: Vec<Option<Place>>,
    ) -> Result<Image, String> {
        let filesystem = (mount.kind != "loop").then(|| mount.kind.clone());
        let mut image = match places.into_iter().flatten().next() {
            Some(place) => self.image_at(&place)?,
            None => Image {
                path: host_path(&mount.source)?,
                devices: Vec::new(),
                create: None,
                verity: None,
                filesystem: None,
                read_only: false,
                options: Vec::new(),
            },
        };
        if let (Some(new), Some(wanted)) = (&create, &filesystem)
            && new.filesystem != *wanted
        {
            return Err(format!(
                "mkfs/ makes {}, and {wanted} is mounted",
                new.filesystem
            ));
        }
        let loops = self.steps.iter().filter_map(|step| step.action.as_loop());
        let mut same = loops.filter(|earlier| earlier.path == image.path);
        image.create = create
            .or(image.create)
            .or_else(|| same.next()?.create.clone());
        image.read_only |= READ_ONLY.contains(&mount.kind.as_str());
        image.filesystem = filesystem;
        for option in &mount.options {
            match option.split_once('=') {
                Some(("device", path)) if mount.kind == "erofs" => {
                    image.devices.push(host_path(path)?)
                }
                Some((name, path)) if name.strip_prefix(OWN) == Some("dmverity") => {
                    image.verity = Some(host_path(path)?);
                }
                _ if option.starts_with(OWN) => return Err(unknown(option)),
                None if option == "ro" => image.read_only = true,
                None if option == "loop" || option == "rw" => {}
                _ => image.options.push(option.clone()),
            }
        }
        if image.create.is_some() && image.read_only {
            return Err("mkfs/ makes an image to write to, and it is mounted read-only".to_owned());
        }
        if image.verity.is_some() && !image.read_only {
            return Err(format!(
                "{OWN}dmverity needs ro: what is verified cannot be written"
            ));
        }
        Ok(image)
    }

    /// The image that an earlier mount of type `loop` has attached.
    fn image_at(&self, place: &Place) -> Result<Image, String> {
        match &self.steps[place.step].action {
            // By its mount point, which is the device.
            Action::Image(image)
                if image.filesystem.is_none() && place.subpath == Path::new("") =>
            {
                Ok(image.clone())
            }
            _ => Err(format!(
                "the source is {place}, in the guest; images are attached from the host, or are mounts of type loop"
            )),
        }
    }

    fn overlay(&self, mount: &Mount) -> Result<Overlay, String> {
        let place = |path: &str| {
            Place::of(path, self.root, self.steps.len())?.ok_or_else(|| {
                format!(
                    "{path:?} is on the host, and other directories of the overlay are in the guest"
                )
            })
        };
        let (mut lower, mut upper, mut work) = (Vec::new(), None, None);
        let mut options = Vec::new();
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", value)) => {
                    for directory in lower_directories(value) {
                        lower.push(self.directory(place(&directory)?)?);
                    }
                }
                Some(("upperdir", value)) => upper = Some(self.directory(place(value)?)?),
                Some(("workdir", value)) => work = Some(self.directory(place(value)?)?),
                _ if option.starts_with(OWN) => return Err(unknown(option)),
                _ => options.push(option.clone()),
            }
        }
        let scratch = match (upper, work) {
            (None, None) => None,
            (Some(upper), Some(work)) => {
                let nested = upper.subpath.starts_with(&work.subpath)
                    || work.subpath.starts_with(&upper.subpath);
                if upper.step != work.step || nested {
                    return Err(format!(
                        "upperdir is {upper} and workdir is {work}; \
                         the kernel wants two directories beside each other in one mount"
                    ));
                }
                Some(Scratch { upper, work })
            }
            _ => return Err("upperdir and workdir need each other".to_owned()),
        };
        if lower.is_empty() {
            return Err("an overlay needs lowerdir=".to_owned());
        }
        Ok(Overlay {
            lower,
            scratch,
            options,
        })
    }

    /// A place that is a directory, as far as that is known.
    fn directory(&self, place: Place) -> Result<Place, String> {
        match &self.steps[place.step].action {
            Action::Image(image) if image.filesystem.is_none() => Err(format!(
                "mount {} is a block device and has no directories",
                place.step
            )),
            _ => Ok(place),
        }
    }
}

/// Whether a mount of this base type, made of these places, is done here.
fn is_ours(base: &str, places: &[Option<Place>]) -> bool {
    match base {
        "bind" | "overlay" => places.iter().any(Option::is_some),
        "loop" => true,
        filesystem => READ_ONLY.contains(&filesystem) || WRITABLE.contains(&filesystem),
    }
}

fn bind(mount: &Mount, places: Vec<Option<Place>>) -> Result<Bind, String> {
    let source = places.into_iter().flatten().next();
    let mut bind = Bind {
        source: source.ok_or("the source is on the host")?,
        recursive: false,
        read_only: false,
        options: Vec::new(),
    };
    for option in &mount.options {
        match option.as_str() {
            "bind" | "rw" => {}
            "rbind" => bind.recursive = true,
            "ro" => bind.read_only = true,
            own if own.starts_with(OWN) => return Err(unknown(own)),
            other => bind.options.push(other.to_owned()),
        }
    }
    Ok(bind)
}

/// A file or device of the host.
fn host_path(path: &str) -> Result<PathBuf, String> {
    let absolute = Path::new(path);
    match absolute.is_absolute() {
        true => Ok(absolute.to_owned()),
        false if path.contains("{{") => Err(format!(
            "{path:?} is a template; the type must begin with format/ for it to be filled in"
        )),
        false => Err(format!("{path:?} is no absolute path")),
    }
}

fn unknown(option: &str) -> String {
    format!(
        "{option:?} is unknown here; mkfs. options need mkfs/ in the type, mkdir. options need mkdir/"
    )
}
