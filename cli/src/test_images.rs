//! Images for the demo, made from real directories of this machine.

use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use blockmount::Manager;
use blockmount_checker::tree::{self, Node, Tree};
use tokio::task::JoinSet;

use crate::args::Layer;
use crate::failure::{Context, Failure};
use crate::image_sources::{self, Limits};
use crate::images::{self, Maker};
use crate::interrupt::{Interrupt, Stop};
use crate::terminal::Progress;

/// A layer, and what is in it.
#[derive(Debug)]
pub(crate) struct TestImage {
    pub(crate) layer: Layer,
    pub(crate) tree: Tree,
}

/// There are at least so many whole-disk layers; one with partitions comes on top.
const MIN_LAYERS: usize = 4;

/// What one image is made of.
#[derive(Debug, Clone)]
struct Recipe {
    /// Its place in the stack, from 0 for the topmost.
    index: usize,
    maker: Maker,
    partitioned: bool,
    source: PathBuf,
    limits: Limits,
    work_dir: PathBuf,
}

/// Makes the layers below `work_dir`, the topmost first. They overlap on purpose: each has
/// `layer.txt`, which the topmost must win, and layer K and those below have `common/K`, which layer
/// K must win.
pub(crate) async fn make(
    work_dir: &Path,
    limits: Limits,
    manager: &Manager,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Vec<TestImage>, Failure> {
    progress.stage("looking for mkfs tools");
    let (makers, missing) = images::available(interrupt).await?;
    missing
        .iter()
        .for_each(|line| progress.note(&format!("note: {line}")));
    if !makers.contains(&Maker::Ext4) {
        let advice =
            "apt-get install e2fsprogs erofs-utils squashfs-tools xfsprogs, or load the modules";
        let what = "no ext4 can be made and mounted here, which the scratch disks need";
        return Err(Failure::new(what)
            .because(missing.join("; "))
            .advise(advice));
    }
    let recipes = recipes(work_dir, limits, &makers)?;
    progress.stage(format!("making {} images", recipes.len()));
    let mut making = JoinSet::new();
    for recipe in recipes {
        let (manager, interrupt) = (manager.clone(), interrupt.clone());
        making.spawn(async move { (recipe.index, recipe.make(&manager, &interrupt).await) });
    }
    let mut made_images = Vec::new();
    let mut failed = None;
    // All makers end before the failure of one is returned: none loses its files meanwhile.
    while let Some(made) = making.join_next().await {
        match made.context(|| "a maker of images was lost".to_owned())? {
            (index, Ok(image)) => made_images.push((index, image)),
            (_, Err(failure)) => failed = failed.or(Some(failure)),
        }
    }
    if let Some(failure) = failed {
        return Err(failure);
    }
    made_images.sort_by_key(|(index, _)| *index);
    Ok(made_images.into_iter().map(|(_, image)| image).collect())
}

fn recipes(work_dir: &Path, limits: Limits, makers: &[Maker]) -> Result<Vec<Recipe>, Failure> {
    let whole = makers.len().max(MIN_LAYERS);
    let of = whole + 1;
    let sources = image_sources::choose(of);
    if sources.is_empty() {
        let what = "this machine has no directory with enough files for images";
        return Err(Failure::new(what).advise("give images of your own with --layer"));
    }
    let recipe = |index: usize| Recipe {
        index,
        maker: if index == whole {
            Maker::Ext4
        } else {
            makers[index % makers.len()]
        },
        partitioned: index == whole,
        // With too few directories, layers share one; the topmost wins all the same.
        source: sources[index % sources.len()].clone(),
        limits,
        work_dir: work_dir.to_owned(),
    };
    Ok((0..of).map(recipe).collect())
}

impl Recipe {
    async fn make(self, manager: &Manager, interrupt: &Interrupt) -> Result<TestImage, Failure> {
        let content = self.path("content");
        let recipe = self.clone();
        let mut tree = interrupt.blocking(move |stop| recipe.gather(stop)).await?;
        if self.maker == Maker::Ext4 {
            tree.insert(Path::new("lost+found"), Node::Directory);
        }
        let image = self.path(self.maker.filesystem());
        interrupt.check()?;
        self.maker
            .make(&image, &content, manager, interrupt)
            .await?;
        let recipe = self.clone();
        let written = interrupt
            .blocking(move |stop| {
                let mut written = image.clone();
                if recipe.partitioned {
                    written = recipe.path("disk");
                    images::partitioned(&image, &written, stop)?;
                    remove(&image, fs::remove_file)?;
                }
                // Written back now, so that an attachment is timed and not the writing of its image.
                flush(&written)?;
                remove(&content, fs::remove_dir_all)?;
                Ok(written)
            })
            .await?;
        let partition = NonZeroU32::new(if self.partitioned { 2 } else { 0 });
        Ok(TestImage {
            layer: Layer {
                partition,
                ..Layer::of(written)
            },
            tree,
        })
    }

    fn path(&self, extension: &str) -> PathBuf {
        self.work_dir
            .join(format!("layer{}.{extension}", self.index))
    }

    /// Copies the source, and adds the files in which layers overlap.
    fn gather(&self, stop: &Stop) -> Result<Tree, Failure> {
        let content = self.path("content");
        let name = self.source.strip_prefix("/").unwrap_or(&self.source);
        let mut tree = image_sources::copy(&self.source, &content, name, self.limits, stop)?;
        let common = (0..=self.index).map(|winner| format!("common/{winner}"));
        for name in common.chain(["layer.txt".to_owned()]) {
            let text = format!("{name} as layer {} has it\n", self.index);
            let path = content.join(&name);
            let parent = path.parent().expect("it is below the content");
            fs::create_dir_all(parent)
                .and_then(|()| fs::write(&path, &text))
                .context(|| format!("cannot write {}", path.display()))?;
            tree.insert(
                Path::new(&name),
                Node::File(tree::digest_bytes(text.as_bytes())),
            );
        }
        Ok(tree)
    }
}

fn flush(image: &Path) -> Result<(), Failure> {
    let flushed = fs::File::open(image).and_then(|file| file.sync_all());
    flushed.context(|| format!("cannot write {} to the disk", image.display()))
}

fn remove(path: &Path, how: fn(PathBuf) -> std::io::Result<()>) -> Result<(), Failure> {
    how(path.to_owned()).context(|| format!("cannot remove {}", path.display()))
}
