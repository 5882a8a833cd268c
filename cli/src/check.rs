//! Comparing what containers see with what they should.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmount_checker::tree::{Comparison, Node, Tree, digest_bytes};
use futures_util::future::join_all;

use crate::failure::Failure;
use crate::guest::Guest;
use crate::interrupt::Interrupt;
use crate::terminal::Progress;

/// Everything that was compared so far.
#[derive(Debug, Default)]
pub(crate) struct Check {
    /// Files whose digest was compared, counted each time.
    pub(crate) files: u64,
    /// One line for each difference.
    pub(crate) mismatches: Vec<String>,
}

/// One look at some trees.
#[derive(Debug)]
pub(crate) struct Pass<const N: usize>([(PathBuf, Comparison); N]);

impl<const N: usize> Pass<N> {
    /// How many files were compared in each tree.
    pub(crate) fn files(&self) -> [u64; N] {
        std::array::from_fn(|index| self.0[index].1.files)
    }
}

impl Check {
    pub(crate) fn add<const N: usize>(&mut self, pass: Pass<N>) {
        for (root, comparison) in pass.0 {
            self.files += comparison.files;
            let lines = comparison.mismatches.into_iter();
            self.mismatches
                .extend(lines.map(|line| format!("{}: {line}", root.display())));
        }
    }
}

/// Reads trees, all at once, and compares each with what it should be.
pub(crate) async fn trees<const N: usize>(
    guest: &Guest,
    interrupt: &Interrupt,
    progress: &Progress,
    roots: &[PathBuf; N],
    expected: [&Arc<Tree>; N],
) -> Result<Pass<N>, Failure> {
    let readers = roots
        .iter()
        .map(|root| guest.tree(root, interrupt, progress));
    // All readers have ended before the failure of one is told: nothing is torn down under another.
    let seen = join_all(readers).await;
    let mut compared = Vec::with_capacity(N);
    for ((root, expected), seen) in std::iter::zip(roots, expected).zip(seen) {
        compared.push((root.clone(), expected.compare(&seen?)));
    }
    Ok(Pass(
        compared.try_into().expect("there is one comparison a root"),
    ))
}

/// Has each container add a file, change one and remove one, never the same ones, and returns what each
/// should see then: its own changes and nothing of the other's.
pub(crate) async fn write(
    guest: &Guest,
    interrupt: &Interrupt,
    targets: &[PathBuf; 2],
    before: &Arc<Tree>,
) -> Result<[Arc<Tree>; 2], Failure> {
    let victims = victims(before);
    let mut after = Vec::new();
    for (index, target) in targets.iter().enumerate() {
        let mut tree = (**before).clone();
        let text = format!("written in container {index}\n");
        let new = format!("new-in-{index}");
        put(guest, interrupt, target, &mut tree, Path::new(&new), &text).await?;
        if let Some([one, other]) = &victims {
            let (changed, removed) = if index == 0 {
                (one, other)
            } else {
                (other, one)
            };
            put(guest, interrupt, target, &mut tree, changed, &text).await?;
            guest.remove(interrupt, &target.join(removed)).await?;
            tree.remove(removed);
        }
        after.push(Arc::new(tree));
    }
    Ok(after.try_into().expect("there is one tree a container"))
}

/// Two files to change and remove: as far apart as there are, and so likely of different layers.
fn victims(tree: &Tree) -> Option<[PathBuf; 2]> {
    let mut files = tree.files().map(|(name, _)| name);
    let (first, last) = (files.next()?, files.next_back()?);
    Some([first.to_owned(), last.to_owned()])
}

async fn put(
    guest: &Guest,
    interrupt: &Interrupt,
    root: &Path,
    tree: &mut Tree,
    name: &Path,
    text: &str,
) -> Result<(), Failure> {
    guest.write(interrupt, &root.join(name), text).await?;
    tree.insert(name, Node::File(digest_bytes(text.as_bytes())));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use blockmount_loopback::LoopTransport;

    use super::*;

    #[tokio::test]
    async fn a_file_that_leaks_into_the_other_container_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let roots = ["a", "b"].map(|name| directory.path().join(name));
        let guest = Guest::Local(Arc::new(LoopTransport::builder().build().unwrap()));
        let (interrupt, progress) = (Interrupt::new(), Progress::new());
        let mut tree = Tree::default();
        for root in &roots {
            fs::create_dir(root).unwrap();
            for name in ["x", "y", "z"] {
                put(&guest, &interrupt, root, &mut tree, Path::new(name), name)
                    .await
                    .unwrap();
            }
        }
        let before = Arc::new(tree);
        let after = write(&guest, &interrupt, &roots, &before).await.unwrap();
        let look = || {
            trees(
                &guest,
                &interrupt,
                &progress,
                &roots,
                [&after[0], &after[1]],
            )
        };

        let mut check = Check::default();
        check.add(look().await.unwrap());
        assert_eq!((check.files, &check.mismatches), (6, &Vec::new()));

        fs::write(roots[1].join("new-in-0"), "leaked").unwrap();
        fs::write(roots[0].join("y"), "changed").unwrap();
        check.add(look().await.unwrap());
        let expected = [
            format!("{}: y has another content", roots[0].display()),
            format!("{}: new-in-0 should not be there", roots[1].display()),
        ];
        assert_eq!(check.mismatches, expected);
    }
}
