//! Devices whose integrity is checked (dm-verity): each is made once, for all who mount it.
//!
//! Nothing but the request says how: neither a superblock nor anything else is read from the device.

use std::path::{Path, PathBuf};

use blockmount::{BackendError, ErrorCorrection, OnCorruption, Verity};
use rustix::io::Errno;

use crate::device::mapper::{Access, DeviceMapper, Names, SECTOR, Target};
use crate::device::node::Measured;
use crate::device::number::DeviceNumber;
use crate::device::partition::sequence;
use crate::device::{mapped, node};
use crate::errno::errno_of;
use crate::undo::ledger::UndoList;
use crate::undo::step::{TreeStep, Undo, VerityStep};

const KIND: &str = "verity";
/// The format of the tree: the salt is before each block. It has nothing to do with the version of a superblock.
const HASH_TYPE: u32 = 1;
/// So many digits of the root digest are part of a name: enough to tell all images apart, and short enough for the kernel.
const DIGITS: usize = 32;

impl VerityStep {
    /// From the number of the device and the root digest that was asked for: at most 69 bytes with our mark.
    pub(crate) fn names(&self) -> Names {
        let DeviceNumber { major, minor } = self.backing;
        let digits: String = self.verity.root_digest.chars().take(DIGITS).collect();
        let suffix = format!("verity-{major}.{minor}-{digits}");
        Names::new(&suffix, self.mark.as_deref())
    }
}

/// What was made of a device, for whoever has to explain an error of reading it.
#[derive(Debug, Clone)]
pub(crate) struct Checked {
    step: VerityStep,
    /// The node of the device below.
    below: PathBuf,
    /// The node of the device with the hash tree, if it is another one.
    tree: Option<PathBuf>,
}

/// Makes a device that checks another, or takes the one that there is for the same request, and names its node. Blocks.
///
/// # Errors
///
/// `Invalid` if the tree cannot be where it is said to be, or the device cannot have such blocks; `Unsuitable` if this
/// kernel cannot do what was asked, with the name of what it cannot; `Conflict` if somebody else has made a device of the
/// name, or it was made for another request; `Busy` and others as they come.
pub(crate) fn open(
    list: &UndoList<'_>,
    below: &Path,
    tree: Option<&Path>,
    verity: &Verity,
) -> Result<(PathBuf, Checked), BackendError> {
    let device = node::measure(below)?;
    let tree_device = tree.map(node::measure).transpose()?;
    validate((below, &device), tree.zip(tree_device.as_ref()), verity)?;
    let backing = device.number;
    let tree_step = |device: Measured| TreeStep {
        device: device.number,
        sequence: sequence(device.number),
    };
    let step = VerityStep {
        backing,
        sequence: sequence(backing),
        verity: verity.clone(),
        tree: tree_device.map(tree_step),
        mark: list.device_mark(),
    };
    let table = table(&step)?;
    let undo = Undo::CloseVerity(Box::new(step.clone()));
    let made = mapped::open(list, &step.names(), undo, |mapper, names| {
        let made = mapper.create_mapped(names, &table, Access::ReadOnly);
        made.map_err(|error| explain_refusal(mapper, error, verity))
    });
    let checked = Checked {
        step,
        below: below.to_owned(),
        tree: tree.map(Path::to_owned),
    };
    Ok((made?, checked))
}

/// Removes the device that checks another. Blocks.
///
/// # Errors
///
/// `Busy` while somebody uses it.
pub(crate) fn undo(step: &VerityStep) -> Result<(), BackendError> {
    if is_corrupt(step) {
        tracing::error!(
            device = %step.backing,
            root_digest = %step.verity.root_digest,
            "dm-verity has found corrupt blocks on a device; whoever read them got an error"
        );
    }
    mapped::remove(&step.names())
}

/// The node of the device that checks another. Blocks.
pub(crate) fn node(step: &VerityStep) -> Option<PathBuf> {
    mapped::node(&step.names())
}

impl Checked {
    /// Adds to an error of reading or mounting that blocks were found to be corrupt, if they were. Blocks.
    pub(crate) fn explained(&self, error: BackendError) -> BackendError {
        if !is_corrupt(&self.step) {
            return error;
        }
        let (device, digest) = (self.below.display(), &self.step.verity.root_digest);
        let on = match &self.tree {
            Some(tree) => format!(", which is on {},", tree.display()),
            None => String::new(),
        };
        let message = format!(
            "{}: data or hash tree of {device}{on} are not what root digest {digest} says",
            error.message()
        );
        BackendError::invalid(message).with_source(error)
    }
}

/// Whether the kernel has found a corrupt block. One that cannot be asked has not.
fn is_corrupt(step: &VerityStep) -> bool {
    let status = DeviceMapper::open().and_then(|mapper| mapper.status(&step.names().uuid));
    let targets = status.ok().flatten().unwrap_or_default();
    targets
        .iter()
        .any(|target| target.kind == KIND && target.parameters.starts_with('C'))
}

/// Whether a device can have such a tree, which is on itself or on another one. What is wrong for every device was refused
/// with the request.
fn validate(
    data: (&Path, &Measured),
    tree: Option<(&Path, &Measured)>,
    verity: &Verity,
) -> Result<(), BackendError> {
    let (path, data_device) = data;
    let (tree_path, tree_device) = tree.unwrap_or(data);
    let refused = |why: String| {
        let message = format!("cannot check the integrity of {}: {why}", path.display());
        Err(BackendError::invalid(message))
    };
    let (block, hash_block) = (verity.data_block_size, verity.hash_block_size);
    let why = unfit_blocks("data", block, data_device);
    if let Some(why) = why.or_else(|| unfit_blocks("hash", hash_block, tree_device)) {
        return refused(why);
    }
    let fits = |end: Option<u64>, size: u64| end.is_some_and(|end| end <= size);
    let (size, tree_size) = (data_device.size, tree_device.size);
    if !fits(verity.data_bytes(), size) {
        let blocks = verity.data_blocks;
        return refused(format!("it has {size} bytes, and not {blocks} data blocks"));
    }
    let whose = match tree {
        Some(_) => format!("{} has {tree_size} bytes", tree_path.display()),
        None => format!("it has {tree_size} bytes"),
    };
    if !fits(verity.end(), tree_size) {
        let start = verity.hash_start_block;
        return refused(format!(
            "{whose}, and no whole hash tree from hash block {start} on"
        ));
    }
    let parity = |parity: &ErrorCorrection| {
        let start = parity.start.checked_mul(verity.data_block_size.into());
        start.is_some_and(|start| start < tree_size)
    };
    match verity.error_correction.as_ref().is_none_or(parity) {
        true => Ok(()),
        false => refused(format!("{whose}, and no parity behind them")),
    }
}

/// Why a device cannot have blocks of a size.
fn unfit_blocks(what: &str, block: u32, device: &Measured) -> Option<String> {
    let (smallest, page) = (device.block_size, rustix::param::page_size());
    if block < smallest {
        return Some(format!(
            "{what} blocks of {block} bytes are smaller than those of the device, {smallest} bytes"
        ));
    }
    (block as usize > page).then(|| {
        format!(
            "{what} blocks of {block} bytes are larger than a page of this kernel, {page} bytes"
        )
    })
}

/// The device with the hash tree.
fn tree_of(step: &VerityStep) -> DeviceNumber {
    step.tree.as_ref().map_or(step.backing, |tree| tree.device)
}

fn table(step: &VerityStep) -> Result<Target, BackendError> {
    let (verity, backing, tree) = (&step.verity, step.backing, tree_of(step));
    let bytes = verity.data_bytes();
    let bytes = bytes.ok_or_else(|| BackendError::invalid("no device has so many data blocks"))?;
    let Verity {
        data_block_size,
        hash_block_size,
        data_blocks,
        hash_start_block,
        algorithm,
        root_digest,
        ..
    } = verity;
    let salt = match verity.salt.as_str() {
        "" => "-",
        salt => salt,
    };
    let mut parameters = format!(
        "{HASH_TYPE} {backing} {tree} {data_block_size} {hash_block_size} {data_blocks} {hash_start_block} \
         {algorithm} {root_digest} {salt}"
    );
    let arguments = arguments(tree, verity);
    let words: Vec<String> = arguments
        .into_iter()
        .flat_map(|argument| argument.words)
        .collect();
    if !words.is_empty() {
        parameters += &format!(" {} {}", words.len(), words.join(" "));
    }
    Ok(Target {
        start: 0,
        length: bytes / SECTOR,
        kind: KIND.to_owned(),
        parameters,
    })
}

/// Something that not every kernel knows.
struct Argument {
    words: Vec<String>,
    /// The version of the target that knows it first, and the kernel that has it.
    since: ([u32; 3], &'static str),
}

/// The optional arguments of a table; the parity is on the device with the hash tree. (Source of the versions: cryptsetup, `lib/libdevmapper.c`, and Linux)
fn arguments(tree: DeviceNumber, verity: &Verity) -> Vec<Argument> {
    let mut arguments = Vec::new();
    let mut add = |words: &[&str], minor, kernel| {
        arguments.push(Argument {
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            since: ([1, minor, 0], kernel),
        });
    };
    match verity.on_corruption {
        OnCorruption::Ignore => add(&["ignore_corruption"], 2, "4.1"),
        OnCorruption::Restart => add(&["restart_on_corruption"], 2, "4.1"),
        OnCorruption::Panic => add(&["panic_on_corruption"], 7, "5.9"),
        _ => {}
    }
    if let Some(parity) = &verity.error_correction {
        let device = tree.to_string();
        let [roots, blocks, start] = [u64::from(parity.roots), parity.blocks, parity.start];
        let [roots, blocks, start] = [roots, blocks, start].map(|number| number.to_string());
        let words = [
            "use_fec_from_device",
            &device,
            "fec_roots",
            &roots,
            "fec_blocks",
            &blocks,
            "fec_start",
            &start,
        ];
        add(&words, 3, "4.5");
    }
    if verity.check_at_most_once {
        add(&["check_at_most_once"], 4, "4.17");
    }
    if let Some(key) = &verity.signature_key {
        add(&["root_hash_sig_key_desc", key], 5, "5.4");
    }
    if verity.try_verify_in_tasklet {
        add(&["try_verify_in_tasklet"], 9, "6.0");
    }
    arguments
}

/// Says why the kernel refuses a table that is well-formed: it answers numbers, and logs the rest.
fn explain_refusal(mapper: &DeviceMapper, error: BackendError, verity: &Verity) -> BackendError {
    let errno = errno_of(&error);
    let unsuitable = |what: String| {
        let message = format!("{}: {what}", error.message());
        BackendError::unsuitable(message).with_source(error.clone())
    };
    let Ok(version) = mapper.version_of(KIND) else {
        return error;
    };
    let Some(version) = version else {
        return unsuitable("this kernel has no dm-verity (is its module loaded?)".to_owned());
    };
    let no_device = DeviceNumber { major: 0, minor: 0 };
    for Argument { words, since } in arguments(no_device, verity) {
        let (first, kernel) = since;
        if version < first {
            let [name, ..] = words.as_slice() else {
                continue;
            };
            return unsuitable(format!(
                "this kernel's dm-verity has no {name}, which Linux {kernel} has"
            ));
        }
    }
    match errno {
        Some(Errno::NOENT) => unsuitable(format!("this kernel has no digest {}", verity.algorithm)),
        Some(errno) if verity.signature_key.is_some() && is_about_keys(errno) => {
            let message = format!(
                "{}: the signature of the root digest is refused",
                error.message()
            );
            BackendError::invalid(message).with_source(error)
        }
        _ => error,
    }
}

fn is_about_keys(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOKEY
            | Errno::KEYREJECTED
            | Errno::KEYEXPIRED
            | Errno::KEYREVOKED
            | Errno::BADMSG
            | Errno::NOPKG
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DeviceNumber = DeviceNumber {
        major: 8,
        minor: 16,
    };

    fn step(verity: Verity) -> VerityStep {
        VerityStep {
            backing: DISK,
            sequence: None,
            verity,
            tree: None,
            mark: None,
        }
    }

    fn parameters(change: impl FnOnce(&mut Verity)) -> String {
        let mut verity = Verity::new("ab".repeat(32), 256);
        change(&mut verity);
        table(&step(verity)).unwrap().parameters
    }

    #[test]
    fn a_table_is_what_the_kernels_documentation_says() {
        let root = "ab".repeat(32);
        let plain = format!("1 8:16 8:16 4096 4096 256 257 sha256 {root} 1234");
        let start = |verity: &mut Verity| {
            verity.hash_start_block = 257;
            verity.salt = "1234".into();
        };
        assert_eq!(parameters(start), plain);
        let all = parameters(|verity| {
            start(verity);
            verity.on_corruption = OnCorruption::Panic;
            verity.check_at_most_once = true;
            verity.try_verify_in_tasklet = true;
            verity.signature_key = Some("key".into());
            verity.error_correction = Some(ErrorCorrection::new(2, 259, 260));
        });
        let arguments = "13 panic_on_corruption use_fec_from_device 8:16 fec_roots 2 fec_blocks 259 fec_start 260 \
                         check_at_most_once root_hash_sig_key_desc key try_verify_in_tasklet";
        assert_eq!(all, format!("{plain} {arguments}"));
        let none = parameters(|_| {});
        assert!(none.ends_with(&format!("{root} -")), "{none}");
        assert_eq!(table(&step(Verity::new("ab", 256))).unwrap().length, 2048);
    }

    #[test]
    fn tree_and_parity_can_be_on_another_device() {
        let mut verity = Verity::new("ab".repeat(32), 256).with_separate_tree(1);
        verity.error_correction = Some(ErrorCorrection::new(2, 259, 4));
        let device = DeviceNumber { major: 8, minor: 0 };
        let tree = TreeStep {
            device,
            sequence: None,
        };
        let step = VerityStep {
            tree: Some(tree),
            ..step(verity)
        };
        let root = "ab".repeat(32);
        let expected = format!(
            "1 8:16 8:0 4096 4096 256 1 sha256 {root} - 8 use_fec_from_device 8:0 fec_roots 2 fec_blocks 259 fec_start 4"
        );
        assert_eq!(table(&step).unwrap().parameters, expected);
    }

    #[test]
    fn g14_the_longest_name_of_a_checked_device_fits_and_follows_from_the_request() {
        let step = VerityStep {
            backing: DeviceNumber {
                major: u32::MAX,
                minor: u32::MAX,
            },
            mark: Some("m".repeat(40)),
            ..step(Verity::new("f".repeat(128), 1))
        };
        let Names { name, uuid } = step.names();
        assert!(name.len().max(uuid.len()) <= 127, "{name}");
        assert!(name.starts_with("blockmount-verity-") && uuid.starts_with("BLKMNT-verity-"));
    }
}
