//! The words of a list once it is known where everything is mounted.

use std::path::PathBuf;

use crate::list::transforms;
use crate::mount::{InvalidMount, Mount};
use crate::plan::{Plan, Step};
use crate::template::fill;
use crate::words::is_of_transform;

impl Plan {
    /// The same plan with the mount points that there are in place of those that were planned: mounts are shared, and the
    /// second who asks for one gets that of the first. `list` is what was planned, `points` has one for each step.
    ///
    /// # Errors
    ///
    /// [`InvalidMount`] if a template becomes too long by that.
    ///
    /// # Panics
    ///
    /// If `list` is another list, or there are less points than steps.
    pub fn placed(&self, list: &[Mount], points: &[PathBuf]) -> Result<Plan, InvalidMount> {
        let mut placed = Plan {
            steps: Vec::with_capacity(self.steps.len()),
            system: self.system.clone(),
        };
        for (index, step) in self.steps.iter().enumerate() {
            let mount = refilled(&list[index], &step.mount, &placed.steps);
            placed.steps.push(Step {
                mount: mount.map_err(|reason| invalid(list, index, reason))?,
                mount_point: points[index].clone(),
                ..step.clone()
            });
        }
        if let Some(first) = placed.system.first_mut() {
            let index = self.steps.len();
            let mount = refilled(&list[index], first, &placed.steps);
            *first = mount.map_err(|reason| invalid(list, index, reason))?;
        }
        Ok(placed)
    }
}

fn invalid(list: &[Mount], index: usize, reason: String) -> InvalidMount {
    let kind = list[index].kind.clone();
    InvalidMount {
        index,
        kind,
        reason,
    }
}

/// A mount of the list with its templates filled in by what is there; its type and which options it has are those of the plan.
fn refilled(given: &Mount, planned: &Mount, earlier: &[Step]) -> Result<Mount, String> {
    let (transforms, _) = transforms(&given.kind);
    if !transforms.contains(&"format") {
        return Ok(planned.clone());
    }
    let is_done = |transform| {
        let left = planned.kind.split('/').any(|left| left == transform);
        transforms.contains(&transform) && !left
    };
    let options = given.options.iter().filter(|option| {
        let of_done = |transform| is_done(transform) && is_of_transform(option, transform);
        !of_done("mkfs") && !of_done("mkdir")
    });
    Ok(Mount {
        kind: planned.kind.clone(),
        source: fill(&given.source, earlier)?,
        target: fill(&given.target, earlier)?,
        options: options
            .map(|option| fill(option, earlier))
            .collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::plan;

    #[test]
    fn templates_name_what_is_there() {
        let list = [
            Mount::new("erofs", "/1.erofs"),
            Mount::new("mkfs/ext4", "/rw.img").option("X-containerd.mkfs.size=1MiB"),
            Mount::new("format/mkdir/overlay", "overlay")
                .option("X-containerd.mkdir.path={{ mount 1 }}/upper")
                .option("upperdir={{ mount 1 }}/upper")
                .option("workdir={{ mount 1 }}/work")
                .option("lowerdir={{ mount 0 }}"),
            Mount::new("format/mkdir/tmpfs", "{{ mount 2 }}")
                .option("X-containerd.mkdir.path={{ mount 2 }}/tmp"),
        ];
        let plan = plan(&list, Path::new("/planned")).unwrap();
        let points = ["/shared/a", "/shared/b", "/planned/2"].map(PathBuf::from);
        let placed = plan.placed(&list, &points).unwrap();
        let options = [
            "upperdir=/shared/b/upper",
            "workdir=/shared/b/work",
            "lowerdir=/shared/a",
        ];
        assert_eq!(placed.steps[2].mount.options, options);
        assert_eq!(placed.steps[1].mount_point, Path::new("/shared/b"));
        assert_eq!(placed.steps[1].mount, plan.steps[1].mount);
        let mkdir = Mount::new("mkdir/tmpfs", "/planned/2")
            .option("X-containerd.mkdir.path=/planned/2/tmp");
        assert_eq!(placed.system, [mkdir]);
        assert_eq!(
            plan.placed(&list, &[0, 1, 2].map(|n| plan.steps[n].mount_point.clone())),
            Ok(plan)
        );
    }
}
