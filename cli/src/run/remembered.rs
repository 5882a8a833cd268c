//! A mount with a name: what the program that resumes it has to know.

use std::fs;
use std::io;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Mutex;

use blockmount::HolderName;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{
    ENGINE, Name, Run, RunPaths, STATE, cannot_make, create, files, is_id, lock, open_runs, runs,
    sudo, work,
};
use crate::args::Layer;
use crate::failure::{Context, Failure, printable};
use crate::guest::{ForeignVm, GuestKind, kept_vm};

/// Whether a run that has ended is kept, and why.
#[derive(Debug)]
pub(crate) enum Kept {
    /// It has no name.
    No,
    Resumable(Box<Remembered>),
    /// It cannot be resumed, for this reason. Its scratch may be all that is left of somebody's work.
    Lost(String),
}

/// What was asked for. It is in the run's directory from before the first disk until after the last.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Remembered {
    pub(crate) name: HolderName,
    target: Name,
    layers: Vec<RememberedLayer>,
    /// Whether it is in a virtual machine that lives on.
    keeps_vm: bool,
    /// How many views of it there are.
    #[serde(default)]
    pub(crate) views: usize,
    /// Whether it is no mount, but the activations of a server with this name; the target is the server's socket then.
    #[serde(default)]
    pub(crate) is_server: bool,
    /// The name of the server, where it has several virtual machines: each has a run of its own then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    server: Option<HolderName>,
    /// What the server was started with: the words of its command line, without those about its messages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    words: Vec<String>,
    /// The virtual machine of somebody else in which it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) vm: Option<ForeignVm>,
    /// Whether nobody has given it a name: it is remembered for a clean-up alone, which the kernel's tables of this machine do not
    /// help.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_anonymous: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct RememberedLayer {
    image: Name,
    partition: Option<NonZeroU32>,
}

impl Remembered {
    pub(crate) fn new(name: HolderName, target: &Path, layers: &[Layer], guest: GuestKind) -> Self {
        let layer = |layer: &Layer| RememberedLayer {
            image: Name::of(&layer.image),
            partition: layer.partition,
        };
        Remembered {
            name,
            target: Name::of(target),
            layers: layers.iter().map(layer).collect(),
            keeps_vm: guest == GuestKind::Qemu,
            views: 0,
            is_server: false,
            server: None,
            words: Vec::new(),
            vm: None,
            is_anonymous: false,
        }
    }

    /// The same in a virtual machine of somebody else.
    pub(crate) fn in_vm(self, vm: Option<ForeignVm>) -> Self {
        Remembered { vm, ..self }
    }

    /// What nobody has given a name, in a virtual machine of somebody else.
    pub(crate) fn anonymous(target: &Path, vm: ForeignVm) -> Self {
        let name = format!("process {}", std::process::id());
        let name = HolderName::new(name).expect("it is a few plain characters");
        Remembered {
            is_anonymous: true,
            vm: Some(vm),
            ..Remembered::new(name, target, &[], GuestKind::Foreign)
        }
    }

    /// The activations of a server at this address.
    pub(crate) fn of_server(name: HolderName, address: &Path, guest: GuestKind) -> Self {
        Remembered {
            is_server: true,
            words: std::env::args_os()
                .skip_while(|word| word != "serve")
                .map(|word| word.to_string_lossy().into_owned())
                .collect(),
            ..Remembered::new(name, address, &[], guest)
        }
    }

    /// The same in one of several virtual machines of a server with this name.
    pub(crate) fn for_one_of_several(self, server: HolderName) -> Self {
        Remembered {
            server: Some(server),
            ..self
        }
    }

    /// Whether a user calls it so: by its own name, or by that of its server.
    pub(crate) fn is_called(&self, name: &HolderName) -> bool {
        self.name == *name || self.server.as_ref() == Some(name)
    }

    /// The command that goes on with it.
    pub(crate) fn resuming(&self) -> String {
        let name = &self.name;
        if !self.is_server {
            return format!("{}blockmount mount --resume {name}", sudo());
        }
        // What it serves, and what is activated where, is in these or in the file that they name.
        let words = self.words.iter().map(String::as_str);
        match shlex::try_join(words) {
            Ok(words) if !words.is_empty() => format!("{}blockmount {}", sudo(), printable(words)),
            _ => {
                let name = self.server.as_ref().unwrap_or(name);
                format!("{}blockmount serve --name {name}", sudo())
            }
        }
    }

    /// The same with so many views.
    pub(crate) fn with_views(mut self, views: usize) -> Self {
        self.views = views;
        self
    }

    pub(crate) fn guest(&self) -> GuestKind {
        match (&self.vm, self.keeps_vm) {
            (Some(_), _) => GuestKind::Foreign,
            (None, true) => GuestKind::Qemu,
            (None, false) => GuestKind::Local,
        }
    }

    pub(crate) fn target(&self) -> std::path::PathBuf {
        self.target.clone().into_path()
    }

    pub(crate) fn layers(&self) -> Vec<Layer> {
        let layer = |layer: &RememberedLayer| Layer {
            partition: layer.partition,
            // It is mounted, and all else that was said of it is with the mount.
            ..Layer::of(layer.image.clone().into_path())
        };
        self.layers.iter().map(layer).collect()
    }
}

impl RunPaths {
    pub(super) fn remembered_file(&self) -> std::path::PathBuf {
        self.dir.join("mount.json")
    }

    /// The file while it is written.
    pub(super) fn remembered_draft(&self) -> std::path::PathBuf {
        self.dir.join("mount.json.new")
    }

    /// Whether the run was started with a name, also where the name itself cannot be read any more.
    pub(crate) fn is_named(&self) -> bool {
        let [state, engine] = [STATE, ENGINE].map(|name| self.dir.join(name));
        let signs = [state, engine, self.remembered_file()];
        signs.iter().any(|path| path.symlink_metadata().is_ok())
    }

    pub(crate) fn remembered(&self) -> Option<Remembered> {
        let text = files::read(&self.remembered_file()).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Says that nobody holds the mount: it is being set up, or released because its user asked for that.
    pub(super) fn unheld_file(&self) -> std::path::PathBuf {
        self.dir.join("unheld")
    }

    /// Whether the run was killed while nobody held its mount: nobody has written to it, or whoever did has given it up.
    fn is_abandoned(&self) -> io::Result<bool> {
        Ok(self.unheld_file().symlink_metadata().is_ok() && !self.is_alive()?)
    }

    /// Says why the run is kept though it cannot be resumed.
    pub(super) fn lost_file(&self) -> std::path::PathBuf {
        self.dir.join("lost")
    }

    /// Whether a clean-up keeps the run.
    pub(crate) fn kept(&self) -> Kept {
        let lost = |why: &str| Kept::Lost(why.to_owned());
        if let Ok(why) = files::read(&self.lost_file()) {
            return match why.is_empty() {
                // There was space for its name only.
                true => lost("it has lost writes, or could not be resumed"),
                false => Kept::Lost(String::from_utf8_lossy(&why).into_owned()),
            };
        }
        match self.remembered() {
            _ if self.unheld_file().symlink_metadata().is_ok() => Kept::No,
            None if !self.is_named() => Kept::No,
            None => lost("it has a name that cannot be read"),
            Some(found) if found.keeps_vm && kept_vm(&self.work).is_none() => {
                lost("its virtual machine has ended or cannot be found")
            }
            Some(found) => Kept::Resumable(Box::new(found)),
        }
    }
}

impl Run {
    /// Starts a run that can be resumed by its name, which no other run has.
    pub(crate) fn start_named(remembered: &Remembered) -> Result<Run, Failure> {
        let opened = open_runs().context(cannot_make)?;
        // Nobody else takes the name meanwhile.
        lock(&opened, FlockOperation::NonBlockingLockExclusive)?;
        if let Some((other, named)) = named(&remembered.name).context(cannot_make)? {
            let name = &remembered.name;
            let failure =
                Failure::new(format!("there is a mount or a server with the name {name}"));
            return Err(match other.is_alive().context(cannot_make)? {
                true => failure
                    .because(format!("{} holds it", other.process_in_words()))
                    .advise("choose another name, or end that process"),
                false => {
                    let again = named.resuming();
                    failure.advise(format!("choose another name, or go on with it: {again}"))
                }
            });
        }
        let mut run = Run::make()?;
        run.is_anonymous = remembered.is_anonymous;
        let text = serde_json::to_vec(remembered).context(cannot_make)?;
        create(&run.paths.unheld_file()).context(cannot_make)?;
        // Whole or not at all: a run has its name, or has nothing yet that is worth keeping.
        let (draft, file) = (run.paths.remembered_draft(), run.paths.remembered_file());
        let written = create(&draft).and_then(|mut file| io::Write::write_all(&mut file, &text));
        let written = written.and_then(|()| fs::rename(&draft, &file));
        written.context(|| format!("cannot write {}", file.display()))?;
        Ok(run)
    }

    /// Starts a run without a name. What it leaves in a virtual machine of somebody else when it is killed is found again by what is
    /// remembered of it.
    pub(crate) fn start_anonymous(target: &Path, vm: Option<&ForeignVm>) -> Result<Run, Failure> {
        match vm {
            None => Run::start(),
            Some(vm) => Run::start_named(&Remembered::anonymous(target, vm.clone())),
        }
    }

    /// The mount is up, and its user is about to be told so: from now on it is kept.
    pub(crate) fn mark_held(&self) -> Result<(), Failure> {
        if self.is_anonymous {
            return Ok(());
        }
        let file = self.paths.unheld_file();
        files::absent_is_done(fs::remove_file(&file))
            .context(|| format!("cannot remove {}", file.display()))
    }

    /// The user has asked for the end of the mount: should this program not get to it, a clean-up does.
    pub(crate) fn mark_unheld(&self) {
        if self.is_named()
            && let Err(error) = create(&self.paths.unheld_file())
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            tracing::warn!(%error, "a clean-up will not know that the run was to end");
        }
    }

    /// Says for a clean-up why the run cannot be resumed; it keeps the files until they are discarded.
    pub(crate) fn mark_lost(&self, why: &str) {
        let file = self.paths.lost_file();
        if let Err(error) = fs::write(&file, why) {
            tracing::warn!(%error, file = %blockmount::printable(file.display()), "a clean-up will not know that the run is lost");
        }
    }

    /// The run can be resumed after all.
    pub(crate) fn unmark_lost(&self) {
        // There is nothing to be removed unless it was lost.
        let _ = fs::remove_file(self.paths.lost_file());
    }

    /// Whether a program was killed while nobody held what it had begun under this name.
    pub(crate) fn has_abandoned(name: &HolderName) -> Result<bool, Failure> {
        let found = all_named(name).and_then(|mut found| {
            found.try_fold(false, |any, run| Ok(any | run?.0.is_abandoned()?))
        });
        found.context(cannot_make)
    }

    /// Whether there is a run with this name, dead or alive, and what it was started for.
    pub(crate) fn find(name: &HolderName) -> Result<Option<Remembered>, Failure> {
        let opened = open_runs().context(cannot_make)?;
        lock(&opened, FlockOperation::NonBlockingLockShared)?;
        let found = named(name).context(cannot_make)?;
        Ok(found.map(|(_, remembered)| remembered))
    }

    /// Takes over a run by its name, whose program has ended without releasing its mount.
    pub(crate) fn resume(name: &HolderName) -> Result<(Run, Remembered), Failure> {
        let what = || {
            format!(
                "cannot look for a mount with the name {name} in {}",
                runs().display()
            )
        };
        let opened = open_runs().context(what)?;
        lock(&opened, FlockOperation::NonBlockingLockShared)?;
        let Some((paths, remembered)) = named(name).context(what)? else {
            return Err(
                Failure::new(format!("there is no mount with the name {name}")).advise(format!(
                    "see what can be resumed with: {}blockmount cleanup --dry-run",
                    sudo()
                )),
            );
        };
        let run = Self::take_over(&paths, &remembered)?;
        Ok((run, remembered))
    }

    /// Takes over the run of a program that has ended, for a clean-up.
    pub(crate) fn resume_dead(paths: &RunPaths, remembered: &Remembered) -> Result<Run, Failure> {
        let opened = open_runs().context(cannot_make)?;
        lock(&opened, FlockOperation::NonBlockingLockShared)?;
        Self::take_over(paths, remembered)
    }

    fn take_over(paths: &RunPaths, remembered: &Remembered) -> Result<Run, Failure> {
        let name = &remembered.name;
        let what = || format!("cannot take over the run of {name} in {}", runs().display());
        let open =
            |path: std::path::PathBuf| files::open_file(&path, fs::File::options().append(true));
        let lock_file = open(paths.lock()).context(what)?;
        match flock(&lock_file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let process = paths.process_in_words();
                return Err(Failure::new(format!(
                    "the program that holds {name} is alive: {process}"
                ))
                .advise("end it before its mount is resumed"));
            }
            Err(errno) => return Err(Failure::new(what()).because(errno)),
        }
        let journal = open(paths.journal()).context(what)?;
        let mut run = Run::over(paths, journal, lock_file);
        run.work = Mutex::new(work::relock(&paths.work).context(what)?);
        run.resumed = true;
        run.is_anonymous = remembered.is_anonymous;
        Ok(run)
    }
}

/// The run with this name, dead or alive. One that nobody held when it was killed has left its name to others.
fn named(name: &HolderName) -> io::Result<Option<(RunPaths, Remembered)>> {
    for found in all_named(name)? {
        let found = found?;
        if !found.0.is_abandoned()? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn all_named(
    name: &HolderName,
) -> io::Result<impl Iterator<Item = io::Result<(RunPaths, Remembered)>>> {
    let found = |entry: io::Result<fs::DirEntry>| {
        let id = match entry {
            Ok(entry) => entry.file_name(),
            Err(error) => return Some(Err(error)),
        };
        let paths = RunPaths::of(id.to_str().filter(|id| is_id(id))?);
        let remembered = paths.remembered()?;
        (remembered.name == *name).then_some(Ok((paths, remembered)))
    };
    Ok(fs::read_dir(runs())?.filter_map(found))
}
