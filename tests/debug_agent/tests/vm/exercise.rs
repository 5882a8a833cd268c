//! Each step of a mount fails once, or is the last of its process, in every combination of layers.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use blockmount::testing::AttachIdentified as _;
use blockmount::{DeviceLocator, Disk, Transport, Unplugger, Verity};
use blockmount_debug_agent::exercise::{Appears, Exercise, Fault, Layer, Place, combinations};
use blockmount_debug_agent::kit::{images, luks};
use blockmount_verity::{Parameters, seal};
use serde_json::json;

use crate::combinations;
use crate::rig::{KEYS, Rig};
use crate::verity::sealed_apart;

/// Where partition 1 is, in bytes: as large as what is to be in it.
pub const START: u64 = 1 << 20;
const BLANK: u64 = 4 << 20;

/// A disk with one partition, which holds this content.
pub fn partitioned(path: &Path, content: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(2 * START + content.len() as u64).unwrap();
    let mut sfdisk = images::tool("sfdisk")
        .arg("-q")
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let table = format!("label: gpt\nstart=2048,size={}\n", content.len() / 512);
    let mut input = sfdisk.stdin.take().unwrap();
    input.write_all(table.as_bytes()).unwrap();
    drop(input);
    assert!(sfdisk.wait().unwrap().success());
    file.write_all_at(content, START).unwrap();
}

/// A disk, its sizes in bytes, and where it is.
pub struct Tried {
    pub disk: Disk,
    pub whole: u64,
    pub used: u64,
    pub locator: DeviceLocator,
}

impl Tried {
    /// Attaches an image, of which so many bytes are used.
    pub async fn attach(rig: &Rig, image: &Path, used: u64) -> Self {
        let mut disk = Disk::virtual_disk(image);
        let name = image.file_name().unwrap().to_str().unwrap();
        if !name.contains("blank") && !name.contains("ext4") {
            disk = disk.read_only();
        }
        Tried {
            whole: fs::metadata(image).unwrap().len(),
            used,
            locator: rig.scsi.attach_identified(&disk).await.unwrap(),
            disk,
        }
    }

    /// Its address in the guest, whose controllers have the numbers of the host's.
    pub fn address(&self) -> String {
        Self::address_of(&self.locator)
    }

    pub fn address_of(locator: &DeviceLocator) -> String {
        let (controller, lun) = locator.address().split_once('/').unwrap();
        format!("{controller}:0:0:{lun}")
    }
}

/// The disks: whole and partitioned, sealed and blank, one with a tree for the first, and a volume of LUKS2.
async fn disks(rig: &Rig) -> (Vec<Tried>, [Verity; 2]) {
    let sealed = rig.path("sealed");
    images::image("erofs", &sealed, &[("file", "text")]);
    let open = File::options().read(true).write(true).open(&sealed);
    let made = seal(&open.unwrap(), &Parameters::default(), &|_| true).unwrap();
    let verity = made.superblock.options(&made.root_digest, made.hash_offset);
    let content = fs::read(&sealed).unwrap();
    let tree = rig.path("tree");
    let apart = sealed_apart(&sealed, &tree);
    let blank = rig.path("blank");
    File::create(&blank).unwrap().set_len(BLANK).unwrap();
    for (name, content) in [
        ("sealed-part", &content),
        ("blank-part", &vec![0; BLANK as usize]),
    ] {
        partitioned(&rig.path(name), content);
    }
    let volume = rig.path("volume");
    luks::volume_with(&volume, &content[..content.len() / luks::UNIT * luks::UNIT]);
    let key = json!({ "path": Path::new(KEYS).join("luks"), "bytes": luks::PASSPHRASE.as_bytes() });
    rig.ask(json!({ "write_key": key })).await;
    let mut tried = Vec::new();
    for (name, used) in [
        ("sealed", content.len() as u64),
        ("sealed-part", content.len() as u64),
        ("blank", BLANK),
        ("blank-part", BLANK),
        ("tree", fs::metadata(&tree).unwrap().len()),
        ("volume", fs::metadata(&volume).unwrap().len()),
    ] {
        tried.push(Tried::attach(rig, &rig.path(name), used).await);
    }
    (tried, [verity.unwrap(), apart])
}

/// The steps that are tried of a combination: all, or every fifth, where the next combinations have the others: an emulated guest is slow.
fn steps(combination: u32) -> (u32, u32) {
    match std::env::var_os("BLOCKMOUNT_EVERY_STEP") {
        Some(_) => (0, 1),
        None => (combination % 5, 5),
    }
}

async fn exercise(fault: Fault) {
    let rig = Rig::start().await;
    let (disks, [verity, apart]) = disks(&rig).await;
    let mut tried = 0;
    for (place, layer, appears) in combinations() {
        let is_written = layer.is_written() || appears == Appears::NewFilesystem;
        let disk = match layer {
            Layer::Luks => &disks[5],
            _ => &disks[2 * usize::from(is_written) + usize::from(place != Place::Whole)],
        };
        let (start, end) = match place {
            Place::Whole => (0, disk.used),
            Place::Partition | Place::Range => (START, START + disk.used),
            Place::PartitionOfRange => (0, disk.whole),
        };
        let exercise = Exercise {
            place,
            layer,
            appears,
            fault,
            steps: steps(tried),
            disk: disk.address().into(),
            range: (start, end),
            verity: match layer {
                Layer::Verity => Some(verity.clone()),
                Layer::VerityApart => Some(apart.clone()),
                _ => None,
            },
            tree: (layer == Layer::VerityApart).then(|| disks[4].address().into()),
            directory: "/run/exercise".into(),
            keys: Some(KEYS.into()),
        };
        let steps = rig.ask(json!({ "exercise": exercise })).await["steps"].clone();
        let steps = steps.as_u64().unwrap();
        assert!(steps > 8, "{exercise:?} had {steps} steps");
        tried += 1;
    }
    assert_eq!(tried, 25);
    for Tried { disk, locator, .. } in &disks {
        rig.guest.unplug(locator).await.unwrap();
        rig.scsi.detach(disk).await.unwrap();
    }
    if fault == Fault::Fails {
        combinations::compare_with_the_docs(&rig).await;
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_each_step_fails_once_in_every_combination_of_layers_and_nothing_is_left() {
    exercise(Fault::Fails).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_process_killed_at_steps_of_every_combination_leaves_nothing() {
    exercise(Fault::Killed).await;
}
