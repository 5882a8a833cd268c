//! Which options of a mount can be combined, tried in a real guest, and compared with the table in `docs/mounts.md`.

use std::fs::{self, File};
use std::path::Path;

use blockmount::testing::AttachIdentified as _;
use blockmount::{
    DeviceLocator, DeviceRole, Disk, Expose, ExtraDevice, FsGroup, InvalidOptions, KeySource,
    LuksKey, MountOptions, Transport, Unplugger,
};
use blockmount_debug_agent::kit::{images, luks};
use blockmount_debug_agent::trial::Trial;
use blockmount_verity::{Parameters, seal};
use serde_json::json;

use crate::devices::merged;
use crate::exercise::{START, Tried, partitioned};
use crate::rig::{KEYS, Rig};

/// An option of a mount, as the table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    ReadOnly,
    Partition,
    Range,
    Verity,
    Encryption,
    Luks,
    Format,
    Check,
    Devices,
    IdMap,
    Group,
    Exposed,
}

use Choice::*;

const ALL: [(Choice, &str); 12] = [
    (ReadOnly, "`ro`"),
    (Partition, "`partition`"),
    (Range, "byte range"),
    (Verity, "`verity`"),
    (Encryption, "`encryption`"),
    (Luks, "LUKS2"),
    (Format, "`format`"),
    (Check, "`check`"),
    (Devices, "`device`"),
    (IdMap, "`id_map`"),
    (Group, "`fs_group`"),
    (Exposed, "`expose`"),
];

/// What is on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Ext4,
    Sealed,
    Merged,
    Blank,
    /// A volume of LUKS2 with an ext4 in it.
    Volume,
}

/// The disks that are tried: each content on all of a disk, and in a partition.
struct Disks {
    tried: Vec<(Content, [Tried; 2])>,
    verity: blockmount::Verity,
    blobs: Vec<(Disk, DeviceLocator)>,
}

impl Disks {
    async fn new(rig: &Rig) -> Self {
        let [ext4, sealed, blank, volume] =
            ["c-ext4", "c-sealed", "c-blank", "c-ext4-volume"].map(|name| rig.path(name));
        images::image("ext4", &ext4, &[("file", "text")]);
        images::image("ext4", &sealed, &[("file", "text")]);
        let open = File::options().read(true).write(true).open(&sealed);
        // As large as those of the filesystem.
        let parameters = Parameters {
            data_block_size: 1024,
            ..Parameters::default()
        };
        let made = seal(&open.unwrap(), &parameters, &|_| true).unwrap();
        let verity = made.superblock.options(&made.root_digest, made.hash_offset);
        File::create(&blank).unwrap().set_len(16 << 20).unwrap();
        // With blocks as large as what is encrypted at once.
        let inner = rig.path("c-inner");
        File::create(&inner).unwrap().set_len(8 << 20).unwrap();
        let mut mkfs = images::tool("mkfs.ext4");
        mkfs.args(["-q", "-F", "-b", "4096"]).arg(&inner);
        images::run_tool(mkfs);
        luks::volume_with(&volume, &fs::read(&inner).unwrap());
        let [merged, blobs @ ..] = merged(rig);
        let mut tried = Vec::new();
        for (content, path) in [
            (Content::Ext4, &*ext4),
            (Content::Sealed, &*sealed),
            (Content::Merged, merged.source()),
            (Content::Blank, &*blank),
            (Content::Volume, &*volume),
        ] {
            let part = path.with_extension("part");
            partitioned(&part, &fs::read(path).unwrap());
            let used = fs::metadata(path).unwrap().len();
            let whole = Tried::attach(rig, path, used).await;
            tried.push((content, [whole, Tried::attach(rig, &part, used).await]));
        }
        let mut attached = Vec::new();
        for blob in blobs {
            let locator = rig.scsi.attach_identified(&blob).await.unwrap();
            attached.push((blob, locator));
        }
        Disks {
            tried,
            verity: verity.unwrap(),
            blobs: attached,
        }
    }

    async fn take_out(self, rig: &Rig) {
        let tried = self.tried.into_iter().flat_map(|(_, tried)| tried);
        let tried = tried.map(|tried| (tried.disk, tried.locator));
        for (disk, locator) in tried.chain(self.blobs) {
            rig.guest.unplug(&locator).await.unwrap();
            rig.scsi.detach(&disk).await.unwrap();
        }
    }

    /// The options of a choice alone or of two, as good as they can be together.
    fn options(&self, choices: &[Choice]) -> Result<MountOptions, InvalidOptions> {
        let has = |choice| choices.contains(&choice);
        let mut options = MountOptions::builder();
        // An encrypted disk holds nothing, so a filesystem is made on it.
        let is_formatted = has(Format) || has(Encryption);
        let is_written = is_formatted || has(Group);
        if has(ReadOnly) || !is_written && (has(Verity) || has(Range)) {
            options = options.read_only();
        }
        if has(Partition) {
            options = options.partition(std::num::NonZeroU32::MIN);
        }
        if has(Verity) {
            options = options.verity(self.verity.clone());
        }
        if has(Encryption) {
            options = options.encryption(blockmount::Encryption::Ephemeral);
        }
        if has(Luks) {
            // The exercise has placed it.
            let passphrase = LuksKey::Passphrase(KeySource::File("luks".to_owned()));
            options = options.encryption(blockmount::Encryption::Luks2(passphrase));
        }
        if is_formatted {
            options = options.format(blockmount::Format::new("ext4").overwriting_everything());
        }
        if has(Check) {
            options = options.check(blockmount::Check::Verify);
        }
        if has(Devices) {
            for (_, locator) in &self.blobs {
                let address = Tried::address_of(locator);
                let blob = DeviceLocator::new("exercise", address).unwrap();
                options = options.device(ExtraDevice::new(DeviceRole::Data, blob));
            }
        }
        if has(IdMap) {
            options = options.id_map("0:100000:65536".parse().unwrap());
        }
        if has(Group) {
            options = options.fs_group(FsGroup::new(2000));
        }
        if has(Exposed) {
            options = options.expose(Expose::BlockDevice);
        }
        options.build()
    }

    fn trial(&self, choices: &[Choice], options: MountOptions) -> Trial {
        let has = |choice| choices.contains(&choice);
        let content = match () {
            () if has(Devices) => Content::Merged,
            () if has(Luks) => Content::Volume,
            () if has(Format) || has(Encryption) => Content::Blank,
            // The data of that is the same, and its disk is attached read-only.
            () if has(Verity) || has(ReadOnly) => Content::Sealed,
            () => Content::Ext4,
        };
        let tried = self.tried.iter().find(|(there, _)| *there == content);
        let (_, tried) = tried.unwrap();
        let disk = &tried[usize::from(has(Partition) || has(Range))];
        let range = match (has(Range), has(Partition)) {
            (false, _) => None,
            (true, false) => Some((START, START + disk.used)),
            (true, true) => Some((0, disk.whole)),
        };
        Trial {
            disk: disk.address().into(),
            range,
            options,
            directory: "/run/trial".into(),
            keys: Some(KEYS.into()),
        }
    }
}

/// What the table says of a combination.
async fn outcome(rig: &Rig, disks: &Disks, choices: &[Choice]) -> &'static str {
    // Both are values of one option.
    if choices == [Luks, Encryption] {
        return "no";
    }
    let options = match disks.options(choices) {
        Ok(options) => options,
        Err(error) => {
            println!("{choices:?}: {error}");
            return "no";
        }
    };
    let trial = disks.trial(choices, options);
    let answer = rig.ask(json!({ "try": trial })).await;
    match answer["refused"].as_str() {
        None => "yes",
        Some(why) => {
            println!("{choices:?}: {why}");
            "guest"
        }
    }
}

const BEGIN: &str = "<!-- what can be combined: made by a test -->\n";
const END: &str = "<!-- end of what can be combined -->";

/// Tries each option with each other one, and compares the table with that.
pub async fn compare_with_the_docs(rig: &Rig) {
    let disks = Disks::new(rig).await;
    let mut table = String::from("| |");
    for (_, name) in ALL {
        table.push_str(&format!(" {name} |"));
    }
    table.push_str(&format!("\n|---{}|\n", "|---".repeat(ALL.len())));
    for (row, (one, name)) in ALL.iter().enumerate() {
        table.push_str(&format!("| {name} |"));
        for (column, (other, _)) in ALL.iter().enumerate() {
            let cell = match column {
                column if column > row => "",
                column if column == row => outcome(rig, &disks, &[*one]).await,
                _ => outcome(rig, &disks, &[*one, *other]).await,
            };
            table.push_str(&format!(" {cell} |"));
        }
        table.push('\n');
    }
    disks.take_out(rig).await;
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/mounts.md");
    let docs = fs::read_to_string(docs).unwrap();
    let (_, after) = docs.split_once(BEGIN).expect("the docs have the table");
    let (there, _) = after.split_once(END).expect("the table ends");
    assert!(
        there == table,
        "docs/mounts.md has not what was tried; paste:\n{table}"
    );
}
