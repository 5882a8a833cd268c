//! From what a caller says to what it means: the canonical form, or why there is none.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::devices;
use super::flags::decides;
use super::{
    Check, DeviceRole, Encryption, Expose, ExtraDevice, Fields, Format, FsGroup, IdMap,
    InvalidOptions, MountFlag, MountOptions, Propagation, Verity,
};

/// Collects the options of a mount; [`build`](Self::build) checks them and brings them into canonical form.
///
/// It is also how [`MountOptions`] travel: what is at its default is left out, and a field that the
/// reader does not know is an error. An older agent refuses a newer option in place of ignoring it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MountOptionsBuilder {
    #[serde(skip_serializing_if = "Option::is_none")]
    partition: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    filesystem: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    options: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verity: Option<Verity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encryption: Option<Encryption>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Check>,
    #[serde(skip_serializing_if = "Expose::is_filesystem")]
    expose: Expose,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<ExtraDevice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id_map: Option<IdMap>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fs_group: Option<FsGroup>,
}

impl MountOptionsBuilder {
    /// Mounts partition `number` (from 1) in place of the whole disk.
    #[must_use]
    pub fn partition(mut self, number: NonZeroU32) -> Self {
        self.partition = Some(number);
        self
    }

    /// Names the filesystem, in place of finding out.
    #[must_use]
    pub fn filesystem(mut self, kernel_name: impl Into<String>) -> Self {
        self.filesystem = Some(kernel_name.into());
        self
    }

    /// Refuses writes through the mount.
    #[must_use]
    pub fn read_only(self) -> Self {
        self.option("ro")
    }

    /// Adds an option by its name in mount(8): `noatime`, `rslave`, or one for the filesystem, such
    /// as `dax=always`. Names that are not known here are passed to the filesystem. The label of an option of SELinux, such
    /// as `context=system_u:object_r:svirt_sandbox_file_t:s0:c1,c2`, may have commas, and quotes around it.
    #[must_use]
    pub fn option(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }

    /// Adds several options, in any order.
    #[must_use]
    pub fn options<S: Into<String>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.options.extend(options.into_iter().map(Into::into));
        self
    }

    /// Checks the device's integrity with dm-verity.
    #[must_use]
    pub fn verity(mut self, verity: Verity) -> Self {
        self.verity = Some(verity);
        self
    }

    /// Decrypts what is read from the device, and encrypts what is written to it.
    #[must_use]
    pub fn encryption(mut self, encryption: Encryption) -> Self {
        self.encryption = Some(encryption);
        self
    }

    /// Makes a filesystem before mounting.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// Checks the filesystem before mounting.
    #[must_use]
    pub fn check(mut self, check: Check) -> Self {
        self.check = Some(check);
        self
    }

    /// Chooses what appears at the target. The node of a block device has the mode 0600 (0400 if it is read-only) and
    /// belongs to root; the options `mode=0660`, `uid=1000` and `gid=6` say otherwise.
    #[must_use]
    pub fn expose(mut self, expose: Expose) -> Self {
        self.expose = expose;
        self
    }

    /// Adds a device that the filesystem has beside the one that is mounted, after those that are there. It must be
    /// attached for as long as the mount lives: [`MountRequest::with_device`](super::MountRequest::with_device) attaches it.
    /// The whole device is used.
    #[must_use]
    pub fn device(mut self, device: ExtraDevice) -> Self {
        self.devices.push(device);
        self
    }

    /// Has the files appear with other owners, for a container with a user namespace. Layers of a stack are mapped by
    /// themselves, before they are stacked; the scratch is not, because its files are written by whom they appear as.
    #[must_use]
    pub fn id_map(mut self, map: IdMap) -> Self {
        self.id_map = Some(map);
        self
    }

    /// Gives all files to a group before they appear. For volumes that are written to.
    #[must_use]
    pub fn fs_group(mut self, group: FsGroup) -> Self {
        self.fs_group = Some(group);
        self
    }

    /// Brings everything that was said into canonical form.
    ///
    /// # Errors
    ///
    /// [`InvalidOptions`] where two options exclude each other (`ro` and `rw`, a format of a
    /// read-only mount, `data=ordered` and `data=journal`, further devices and `device=`), where one does not apply to the mount of a
    /// device (`bind`), or where one could not be given to a kernel.
    pub fn build(self) -> Result<MountOptions, InvalidOptions> {
        let mut words = Words::default();
        for option in &self.options {
            words.add(option)?;
        }
        let read_only = words.chosen.get("access").is_some_and(|word| word == "ro");
        if let Some(name) = &self.filesystem {
            well_formed_filesystem(name)?;
        }
        self.check_combination(read_only, &words)?;
        let verity = self.verity.map(Verity::canonical).transpose()?;
        Ok(MountOptions::from_fields(Fields {
            partition: self.partition,
            filesystem: self.filesystem,
            read_only,
            flags: words
                .chosen
                .values()
                .filter_map(|word| MountFlag::from_name(word))
                .collect(),
            data: words.data.into_values().collect(),
            propagation: words
                .chosen
                .get("propagation")
                .and_then(|word| Propagation::from_name(word)),
            verity: verity.map(Box::new),
            encryption: self.encryption.map(Box::new),
            format: self.format.map(Box::new),
            check: self.check,
            expose: self.expose,
            devices: devices::canonical(self.devices)?,
            id_map: self.id_map.map(Box::new),
            fs_group: self.fs_group,
        }))
    }

    fn check_combination(&self, read_only: bool, words: &Words) -> Result<(), InvalidOptions> {
        if let Some(format) = &self.format {
            format.validate()?;
            if read_only {
                return contradiction("format", "ro");
            }
        }
        if self.check == Some(Check::Repair) && read_only {
            return contradiction("check with repair", "ro");
        }
        if self.check.is_some() && self.expose == Expose::BlockDevice {
            return contradiction("check", "expose as block device");
        }
        self.check_owners(read_only)?;
        if self.encryption.is_some() && self.verity.is_some() {
            return contradiction("encryption", "verity");
        }
        if let Some(encryption) = &self.encryption {
            encryption.validate()?;
            if encryption.is_ephemeral() && read_only {
                return contradiction("encryption with a new key", "ro");
            }
            if encryption.has_integrity() && !self.expose.is_filesystem() {
                return contradiction("encryption with integrity", "expose as block device");
            }
        }
        if self.verity.is_some() && !read_only {
            return contradiction("verity", "rw");
        }
        if let (Some(format), Some(named)) = (&self.format, &self.filesystem)
            && format.filesystem != *named
        {
            return contradiction(&format!("format {}", format.filesystem), named);
        }
        let (trees, others): (Vec<_>, Vec<_>) = self
            .devices
            .iter()
            .partition(|device| device.role == DeviceRole::HashTree);
        let has_separate_tree = self.verity.as_ref().is_some_and(|it| it.separate_tree);
        if !trees.is_empty() && !has_separate_tree {
            return contradiction("hash tree device", "no verity with a separate tree");
        }
        if let Some(device) = others.first() {
            let device = format!("{} device {}", device.role.name(), device.locator);
            let named = words
                .data
                .values()
                .find(|option| devices::is_named_by(option));
            let excludes = [
                (self.verity.is_some(), "verity"),
                (self.encryption.is_some(), "encryption"),
                (self.format.is_some(), "format"),
                (!self.expose.is_filesystem(), "expose as block device"),
            ];
            let excluded = excludes.iter().find(|(is_given, _)| *is_given);
            if let Some(other) = excluded
                .map(|(_, name)| *name)
                .or(named.map(String::as_str))
            {
                return contradiction(&device, other);
            }
        }
        // Who may use the node of a device is all that can be said of it.
        let is_of_node = |name: &str| matches!(name, "mode" | "uid" | "gid");
        let mut of_filesystem = words.data.iter().filter(|(name, _)| !is_of_node(name));
        let of_filesystem = of_filesystem.next().map(|(_, option)| option);
        match (self.expose, of_filesystem.or(self.filesystem.as_ref())) {
            (Expose::BlockDevice, Some(option)) => contradiction("expose as block device", option),
            _ => Ok(()),
        }
    }

    /// Files have owners, and a device that is exposed has no files.
    fn check_owners(&self, read_only: bool) -> Result<(), InvalidOptions> {
        if let Some(group) = self.fs_group {
            group.validate()?;
        }
        let named = match (self.fs_group, &self.id_map) {
            (Some(_), _) if read_only => return contradiction("fs_group", "ro"),
            (Some(_), _) => "fs_group",
            (None, Some(_)) => "id map",
            (None, None) => return Ok(()),
        };
        match self.expose {
            Expose::BlockDevice => contradiction(named, "expose as block device"),
            _ => Ok(()),
        }
    }
}

fn contradiction(one: &str, other: &str) -> Result<(), InvalidOptions> {
    Err(InvalidOptions::Contradiction(
        one.to_owned(),
        other.to_owned(),
    ))
}

/// The words that were said, by what they decide.
#[derive(Default)]
struct Words {
    /// One word for each thing that the kernel decides for every filesystem, such as `access`: `ro`.
    chosen: BTreeMap<&'static str, String>,
    /// The filesystem's own options by name, so that they are sorted and none is there twice.
    data: BTreeMap<String, String>,
}

impl Words {
    fn add(&mut self, option: &str) -> Result<(), InvalidOptions> {
        let malformed = |reason| Err(InvalidOptions::Malformed(option.to_owned(), reason));
        if option.is_empty() || option.starts_with('=') {
            return malformed("it has no name");
        }
        if option.chars().any(char::is_control) {
            return malformed("it has control characters");
        }
        let unquoted = unquoted_label(option);
        if unquoted.as_deref().is_some_and(|label| label.contains('"')) {
            return malformed("it has a quote within the security label");
        }
        if unquoted.is_none() && option.contains(',') {
            return malformed("it has a comma; give each option by itself");
        }
        let option = unquoted.as_deref().unwrap_or(option);
        if let "bind" | "rbind" | "remount" | "move" = option {
            let reason = "the mount of a device is always a new one";
            return Err(InvalidOptions::Inapplicable(option.to_owned(), reason));
        }
        match decides(option) {
            Some(decided) => put(&mut self.chosen, decided, option),
            None if option == "defaults" => Ok(()),
            None => {
                let name = option.split('=').next().unwrap_or(option).to_owned();
                put(&mut self.data, name, option)
            }
        }
    }
}

/// The options of SELinux, whose labels may have commas: `system_u:object_r:svirt_sandbox_file_t:s0:c1,c2`.
const LABELS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// An option of SELinux without the quotes that mount(8) wants around its label; nothing if it is another option.
pub(super) fn unquoted_label(option: &str) -> Option<String> {
    let (name, label) = option
        .split_once('=')
        .filter(|(name, _)| LABELS.contains(name))?;
    let inner = label
        .strip_prefix('"')
        .and_then(|label| label.strip_suffix('"'));
    Some(format!("{name}={}", inner.unwrap_or(label)))
}

/// Puts an answer where none is, or the same.
fn put<K: Ord>(
    answers: &mut BTreeMap<K, String>,
    key: K,
    option: &str,
) -> Result<(), InvalidOptions> {
    let answer = answers.entry(key).or_insert_with(|| option.to_owned());
    if answer == option {
        return Ok(());
    }
    Err(InvalidOptions::Contradiction(
        option.to_owned(),
        answer.clone(),
    ))
}

/// A filesystem's name ends up in a request to the kernel and in log lines.
pub(super) fn well_formed_filesystem(name: &str) -> Result<(), InvalidOptions> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !name.is_empty() && name.len() <= 32 && name.chars().all(fits) {
        return Ok(());
    }
    let reason = "a filesystem has a name of at most 32 letters, digits, '.', '_' and '-'";
    Err(InvalidOptions::Malformed(name.to_owned(), reason))
}

impl TryFrom<MountOptionsBuilder> for MountOptions {
    type Error = InvalidOptions;

    fn try_from(builder: MountOptionsBuilder) -> Result<Self, InvalidOptions> {
        builder.build()
    }
}

impl From<MountOptions> for MountOptionsBuilder {
    fn from(options: MountOptions) -> Self {
        let fields = options.0.fields.clone();
        let mut words: Vec<String> = fields.flags.iter().map(|flag| flag.name().into()).collect();
        words.extend(fields.read_only.then(|| "ro".into()));
        words.extend(
            fields
                .propagation
                .map(|propagation| propagation.to_string()),
        );
        words.extend(fields.data);
        MountOptionsBuilder {
            partition: fields.partition,
            filesystem: fields.filesystem,
            options: words,
            verity: fields.verity.map(|verity| *verity),
            encryption: fields.encryption.map(|encryption| *encryption),
            format: fields.format.map(|format| *format),
            check: fields.check,
            expose: fields.expose,
            devices: fields.devices.into(),
            id_map: fields.id_map.map(|map| *map),
            fs_group: fields.fs_group,
        }
    }
}
