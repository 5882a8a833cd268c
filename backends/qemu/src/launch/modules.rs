//! Kernel modules that a guest loads, each after those that it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use object::{Object as _, ObjectSection as _};
use walkdir::WalkDir;

use super::error::VmError;

/// The modules of a kernel: a directory such as `/lib/modules/6.1.0-56-cloud-amd64`.
#[derive(Debug)]
pub(super) struct Modules {
    directory: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module, ready to be loaded.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

impl Modules {
    /// Reads which modules there are. Blocks.
    pub(super) fn in_directory(directory: &Path) -> Result<Self, VmError> {
        let mut files = BTreeMap::new();
        for entry in WalkDir::new(directory).sort_by_file_name() {
            let entry = entry.map_err(|error| {
                VmError::new(format!("cannot list modules in {}", directory.display()))
                    .because(error)
            })?;
            let file_name = entry.file_name().to_string_lossy();
            if let Some((stem, _)) = file_name.split_once(".ko") {
                files.insert(normal(stem), entry.into_path());
            }
        }
        // Not there for every kernel; what is missing then is missing as a module.
        let builtin = fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
        let stem = |line: &str| {
            let name = line.rsplit('/').next().unwrap_or(line);
            normal(name.split(".ko").next().unwrap_or(name))
        };
        Ok(Modules {
            directory: directory.to_owned(),
            files,
            builtin: builtin.lines().map(stem).collect(),
        })
    }

    /// Whether there is a module of this name, or the kernel has it built in.
    pub(super) fn has(&self, name: &str) -> bool {
        let name = normal(name);
        self.files.contains_key(&name) || self.builtin.contains(&name)
    }

    /// The modules of these names and all that they need, in an order in which they can be loaded. What is
    /// built into the kernel is left out. Blocks.
    pub(super) fn in_order(&self, names: &[&str]) -> Result<Vec<Module>, VmError> {
        let (mut seen, mut ordered) = (BTreeSet::new(), Vec::new());
        for name in names {
            self.add(&normal(name), &mut seen, &mut ordered)?;
        }
        Ok(ordered)
    }

    /// Depth first; a circle, which no kernel has, ends at what was seen.
    fn add(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        ordered: &mut Vec<Module>,
    ) -> Result<(), VmError> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            let directory = self.directory.display();
            return Err(VmError::new(format!(
                "there is no module {name} in {directory}"
            )));
        };
        let content = fs::read(path).map_err(|error| {
            VmError::new(format!("cannot read module {}", path.display())).because(error)
        })?;
        for needed in needed_by(path, &content)? {
            self.add(&needed, seen, ordered)?;
        }
        ordered.push(Module {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }
}

/// The kernel takes `-` and `_` in the name of a module for the same.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// What a module needs, by the field `depends` of its section `.modinfo`.
fn needed_by(path: &Path, content: &[u8]) -> Result<Vec<String>, VmError> {
    let unfit = || {
        VmError::new(format!(
            "{} is no module that can be read; a compressed one has to be unpacked first",
            path.display()
        ))
    };
    let file = object::File::parse(content).map_err(|error| unfit().because(error))?;
    let section = file.section_by_name(".modinfo").ok_or_else(unfit)?;
    let fields = section.data().map_err(|error| unfit().because(error))?;
    let mut fields = fields.split(|byte| *byte == 0);
    let depends = fields.find_map(|field| field.strip_prefix(b"depends="));
    let depends = String::from_utf8_lossy(depends.unwrap_or_default()).into_owned();
    let names = depends.split(',').filter(|name| !name.is_empty());
    Ok(names.map(normal).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestKernel;

    fn modules() -> Modules {
        let kernel = GuestKernel::find().expect("tests/setup.sh fetches a kernel");
        Modules::in_directory(kernel.modules()).unwrap()
    }

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let ordered = modules()
            .in_order(&["dm-verity", "sd_mod", "dm_mod"])
            .unwrap();
        let names: Vec<&str> = ordered.iter().map(|module| &*module.name).collect();
        let place = |name| names.iter().position(|other| *other == name);
        assert!(
            place("dm_mod").unwrap() < place("dm_bufio").unwrap(),
            "{names:?}"
        );
        assert!(
            place("dm_bufio").unwrap() < place("dm_verity").unwrap(),
            "{names:?}"
        );
        let distinct: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(distinct.len(), names.len());
    }

    #[test]
    fn what_is_built_in_needs_no_file_and_what_is_not_there_is_named() {
        assert!(modules().in_order(&["ext4"]).is_ok());
        let error = modules()
            .in_order(&["no-such-module"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("no module no_such_module in "), "{error}");
    }

    #[test]
    fn what_is_no_module_is_an_error() {
        for content in [&b""[..], b"\xfd7zXZ\0", &[0x7f; 100]] {
            let error = needed_by(Path::new("/m/x.ko.xz"), content).unwrap_err();
            assert!(
                error.to_string().contains("/m/x.ko.xz is no module"),
                "{error}"
            );
        }
    }
}
