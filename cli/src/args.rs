//! What can be said on the command line.

mod layers;
mod serve;
mod values;
mod views;
mod vm;

use std::ffi::OsString;
use std::path::PathBuf;

use blockmount::{HashAlgorithm, HolderName};
use blockmount_agent::LogFilter;
use blockmount_verity::Parameters;
use clap::{ArgGroup, Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::guest::{GuestKind, Socket, Transports};
use crate::terminal::Colour;
use values::{Salt, parse_disks, parse_rounds, parse_salt};

pub(crate) use values::{Integrity, parse_size};

pub(crate) use layers::{Layer, OptionalLayers, RequiredLayers};
pub(crate) use serve::{ServeArgs, Served};
pub(crate) use views::Shown;
pub(crate) use vm::VmArgs;

/// The filesystems that a guest makes on a scratch disk.
pub(crate) const FORMATS: [&str; 2] = ["ext4", "xfs"];

/// Mounts disk images as the layers of a container, shares them, and takes them out exactly once.
#[derive(Debug, Parser)]
#[command(name = "blockmount", version, term_width = 80, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Cmd,

    /// Say more on stderr: -v the steps, -vv their details, -vvv everything
    #[arg(short, long, global = true, help_heading = EVERYWHERE, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// Log filter for stderr, such as "info" or "blockmount=debug,blockmount_linux=trace"; overrides -v
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "FILTER", value_parser = log_filter)]
    pub(crate) log: Option<String>,

    /// Say nothing on stderr but errors and what is waited for
    #[arg(short, long, global = true, help_heading = EVERYWHERE, conflicts_with = "verbose")]
    pub(crate) quiet: bool,

    /// Whether there are colours: always, never, or on a terminal where NO_COLOR is not set
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "WHEN", value_enum, default_value_t = Colour::Auto)]
    pub(crate) color: Colour,
}

/// What every command takes is listed apart.
const EVERYWHERE: &str = "Options of all commands";

/// A filter that the log will take.
fn log_filter(text: &str) -> Result<String, String> {
    LogFilter::parse(text).map(|_| text.to_owned())
}

const EXAMPLES: &str = "\
Examples:
  sudo blockmount demo          the whole way of many layers, on this machine
  sudo blockmount mount --layer app.erofs --scratch 1G --at /mnt/tree
  sudo blockmount status        how what is held is doing
  blockmount inspect base.img   what is in an image (no root needed)
  blockmount seal app.erofs     a hash tree for it
  sudo blockmount bench         how long disks take here
  sudo blockmount cleanup       remove what a killed run has left
  blockmount agent              in a guest: do what its host asks for

Exit status: 0 if all is well, also for a mount that a signal ends while it \
holds; 1 after a failure; 2 if the command line makes no sense; 130 if a signal \
interrupted it (after everything was released).";

#[derive(Debug, Subcommand)]
pub(crate) enum Cmd {
    /// Show the main job: two containers that share all layers, checked file by file
    Demo(DemoArgs),
    /// Mount a stack of layers and hold it until Ctrl-C or SIGTERM
    Mount(MountArgs),
    /// Offer containerd's Mounts service on a socket: clients in any language activate lists of mounts
    Serve(ServeArgs),
    /// Show how mounts and servers are doing: slots, disks, mounts, what is pending and why, how long each step takes
    Status(StatusArgs),
    /// Say what is in images: filesystem, sizes, partitions, label, UUID
    Inspect(InspectArgs),
    /// Give an image a hash tree of dm-verity, and say what vouches for it
    Seal(SealArgs),
    /// Measure how long disks take, step by step, beside the least that they can take
    Bench(BenchArgs),
    /// Find and remove what killed runs of this program have left
    Cleanup(CleanupArgs),
    /// Serve this machine, a guest, to its host: mount and unplug what the host asks for
    #[command(disable_help_flag = true)]
    Agent(AgentArgs),
    /// Print a script that completes the words of this program in a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write those of all commands
    Man(ManArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  blockmount completions bash > /etc/bash_completion.d/blockmount
  blockmount completions zsh > /usr/local/share/zsh/site-functions/_blockmount
  blockmount completions fish > ~/.config/fish/completions/blockmount.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  blockmount man | man -l -
  sudo blockmount man --to /usr/local/share/man/man1")]
pub(crate) struct ManArgs {
    /// Write a page for each command into this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
}

/// What the program `blockmount-agent` reads for itself.
#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS"
    )]
    words: Vec<OsString>,
}

impl AgentArgs {
    /// With those that stand before the subcommand, and mean the same to the agent.
    pub(crate) fn words(self, verbose: u8, log: Option<String>) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["-v".into(); verbose.into()];
        words.extend(log.map(|filter| format!("--log={filter}").into()));
        words.extend(self.words);
        words
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Without --layer, demo images are made from directories of this machine, with the mkfs tools that \
are installed (mkfs.erofs, mksquashfs, mkfs.ext4, mkfs.xfs).

Examples:
  sudo blockmount demo
  sudo blockmount demo --guest qemu           in a virtual machine, with SCSI disks
  sudo blockmount demo --guest qemu --transport auto
                                              and with layers on VPMEM where they fit
  sudo blockmount demo --json | jq .digest_mismatches
  sudo blockmount demo --layer app.erofs --layer base.img --partition 2

Ctrl-C at any moment releases everything first.")]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    pub(crate) layers: OptionalLayers,

    /// Where the containers run [default: local]
    #[arg(long, value_enum)]
    pub(crate) guest: Option<GuestKind>,

    #[command(flatten)]
    pub(crate) vm: VmArgs,

    /// With --vm: where "blockmount checker" in its guest is reached, which digests the files there
    #[arg(long, value_name = "unix:PATH|vsock:CID:PORT", requires = "vm")]
    pub(crate) checker: Option<Socket>,

    /// How disks get into a virtual machine; scsi by default
    #[arg(long, value_parser = Transports::parser())]
    pub(crate) transport: Option<Transports>,

    /// Take layers in qcow2 images that are differences to other files: whatever these name is opened
    #[arg(long)]
    pub(crate) allow_backing: bool,

    /// Print the result as one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Layers are raw images or block devices, and by their names .qcow2, .vhd and .vhdx \
(on this machine through qemu-storage-daemon and FUSE). They are always read-only. Without --scratch the tree is read-only; what \
is written to a scratch ends with the mount. A mount with a --name outlives a \
program that is killed, scratch included, and another program goes on with it; \
with --keep-vm, so does its virtual machine.

What is said of a layer (--partition, --fs, --verity, --key, --luks, --option, \
--map-ids) follows its --layer. An --option or --map-ids before the first --layer is for \
all of them.

A --file has the stack in TOML: at, name, guest, transport, keep-vm, \
allow-backing, options (of all layers), overlay-options, map-ids, view, a table [scratch] with \
size, encrypt, integrity and format, and for each layer, the topmost first, a table \
[[layer]] with image, partition, fs, verity, verity-tree, key, luks, map-ids, devices and options. Paths in it \
start at its directory. The command line wins where both say one thing; its \
layers are above those of the file, and lists are joined.

Examples:
  sudo blockmount mount --layer app.erofs --layer base.img --at /mnt/tree
  sudo blockmount mount -o nodev --layer disk.img --partition 2 --at /mnt/tree
  sudo blockmount mount --layer app.erofs --layer a.xfs -o nouuid --at /mnt/tree
  sudo blockmount mount --layer /dev/sdb --scratch 512M --at /mnt/tree
  sudo blockmount mount --guest qemu --layer app.erofs --at /mnt/tree
  sudo blockmount mount --layer merged.erofs --device app.blob \\
                        --device base.blob --at /mnt/tree
  sudo blockmount mount --guest qemu --layer app.erofs \\
                        --verity app.erofs.dmverity --at /mnt/tree
  sudo blockmount mount --guest qemu --layer app.erofs --scratch 1G --encrypt \\
                        --at /mnt/tree
  sudo blockmount mount --guest qemu --layer volume.img \\
                        --luks file=passphrase \\
                        --at /mnt/tree
  sudo blockmount mount --file blockmount.toml
  sudo blockmount mount --map-ids 0:100000:65536 --layer app.erofs \\
                        --at /mnt/tree --view /mnt/etc:ro,subpath=etc
  sudo blockmount mount --name web --layer app.erofs --scratch 1G --at /mnt/web
  sudo blockmount mount --resume web

A guest of QEMU is started for the mount and ends with it; DIR is a path in it, below /mnt or \
/run/mounts.

If somebody still uses the tree at the end, blockmount says who and waits for them; a further \
signal makes it give up, say what stays mounted, and exit with status 1. With a guest of QEMU a \
further signal kills its virtual machine. One that dies, stops or meets errors of its disks makes \
the exit status 1.")]
// A file can say these as well.
#[command(group(ArgGroup::new("a_scratch").args(["scratch", "file"]).multiple(true)))]
#[command(group(ArgGroup::new("a_name").args(["name", "file"]).multiple(true)))]
pub(crate) struct MountArgs {
    #[command(flatten)]
    pub(crate) layers: RequiredLayers,

    /// Read the stack from a file, such as blockmount.toml, or from stdin (-); what else is said here is added to it, or wins
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,

    /// Where the tree is to be mounted [default: local]
    #[arg(long, value_enum)]
    pub(crate) guest: Option<GuestKind>,

    #[command(flatten)]
    pub(crate) vm: VmArgs,

    /// How disks get into a virtual machine; scsi by default
    #[arg(long, value_parser = Transports::parser())]
    pub(crate) transport: Option<Transports>,

    /// Take layers in qcow2 images that are differences to other files: whatever these name is opened
    #[arg(long)]
    pub(crate) allow_backing: bool,

    /// Make the tree writable, with an empty scratch disk of this size: 64M, 10G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) scratch: Option<u64>,

    /// Encrypt the scratch disk with a key that only the guest's kernel has: what is written ends with the mount
    #[arg(long, requires = "a_scratch")]
    pub(crate) encrypt: bool,

    /// Notice what is changed on the encrypted scratch disk, where reading is an error then; by another cipher if one is given
    #[arg(
        long,
        requires = "encrypt",
        value_name = "CIPHER",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "hmac-sha256"
    )]
    pub(crate) integrity: Option<Integrity>,

    /// Have the guest make this filesystem on the scratch disk, in place of an ext4 that is made here
    #[arg(long, value_name = "FILESYSTEM", requires = "a_scratch", value_parser = FORMATS)]
    pub(crate) format: Option<String>,

    /// Option of the overlay, such as volatile, metacopy=on or verity=require; repeatable
    #[arg(long = "overlay-option", value_name = "OPTION")]
    pub(crate) overlay_options: Vec<String>,

    /// The directory where the tree appears: made if it is not there, otherwise empty
    #[arg(long, value_name = "DIR", required_unless_present_any = ["resume", "file"])]
    pub(crate) at: Option<PathBuf>,

    /// Show the tree at DIR too, with ro, nosuid, nodev, noexec, noatime or a subpath=PATH of it, or with layer=N (the topmost is 1) that layer;
    /// repeatable
    #[arg(long = "view", value_name = "DIR[:OPTION,...]")]
    pub(crate) views: Vec<Shown>,

    /// Remember the mount under this name until the next boot, so that it can be resumed should this program be killed; a
    /// guest of QEMU needs --keep-vm for that
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<HolderName>,

    /// Let the virtual machine live on if this program is killed, so that --resume finds it
    #[arg(long, requires = "a_name")]
    pub(crate) keep_vm: bool,

    /// Go on with the mount of this name, whose program was killed
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = [
            "layer", "partition", "fs", "verity", "verity_tree", "key", "luks", "device", "option", "map_ids", "guest", "transport",
            "allow_backing", "scratch", "encrypt", "integrity", "format", "overlay_options", "at", "views", "name",
            "keep_vm", "file", "vm", "agent", "agent_token", "controllers",
        ]
    )]
    pub(crate) resume: Option<HolderName>,

    /// Print where everything is as one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Runs of this user that hold something are shown: of \"blockmount mount\" and \
\"blockmount serve\". --json prints an object with a list of them, each a tree \
that has all that the tables have, and more; with --watch such an object in each \
line. The exit status is 1 if there is a --name, and it holds nothing.

Examples:
  sudo blockmount status
  sudo blockmount status --watch --name vm1
  sudo blockmount status --json | jq '.runs[].manager.attachments'")]
pub(crate) struct StatusArgs {
    /// Only the mount or the server of this name
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<HolderName>,

    /// Show it again each second, until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,

    /// Print it as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  blockmount inspect base.img
  blockmount inspect --json *.img /dev/sda | jq
  blockmount inspect --verity app.erofs       its hash tree, and whether each block is intact")]
pub(crate) struct InspectArgs {
    /// Image files or block devices
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,

    /// Say which hash tree each image has at its end, and check each block of it and of the data
    #[arg(long)]
    pub(crate) verity: bool,

    /// Print the answers as one JSON array on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The tree is appended to the image, whose data stays as it is, and IMAGE.dmverity is written, which containerd \
reads as well. The root digest is printed: keep it where nobody can change it. A seal that is interrupted or \
killed is taken back, by the next one if need be.

Examples:
  blockmount seal app.erofs
  blockmount seal --tree app.tree app.erofs   for veritysetup open app.erofs NAME app.tree DIGEST")]
pub(crate) struct SealArgs {
    /// A raw image file; with --tree also a block device
    #[arg(value_name = "IMAGE")]
    pub(crate) image: PathBuf,

    /// Write superblock and tree to this new file, and leave the image alone
    #[arg(long, value_name = "FILE")]
    pub(crate) tree: Option<PathBuf>,

    /// What digests the blocks: sha256, sha384 or sha512
    #[arg(long, value_name = "NAME", default_value_t = HashAlgorithm::Sha256)]
    algorithm: HashAlgorithm,

    /// Bytes in a data block, 512 to 4096 for most kernels [default: 4096, or those of the filesystem if smaller]
    #[arg(long, value_name = "BYTES")]
    pub(crate) block_size: Option<u32>,

    /// Hexadecimal digits that are digested with each block [default: 32 zero bytes]
    #[arg(long, value_name = "DIGITS", value_parser = parse_salt)]
    salt: Option<Salt>,

    /// Print the result as one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

impl SealArgs {
    /// How blocks are digested, unless the filesystem needs smaller ones.
    pub(crate) fn parameters(&self) -> Parameters {
        let default = Parameters::default();
        Parameters {
            algorithm: self.algorithm,
            salt: self.salt.clone().map_or(default.salt, |Salt(bytes)| bytes),
            ..default
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
All disks of a number are added at once, and then released. The floor of the \
same run is what a program would need that does nothing but bind and mount: \
system calls on this machine, commands for QEMU and mounts in its guest.

With --linger each number is also measured with a manager that keeps what is \
released: the second time that the disks are added, and released.

Examples:
  sudo blockmount bench --linger
  blockmount bench --guest qemu --plot bench.svg
  blockmount bench --guest qemu --disks 1,256 --rounds 3 --json")]
pub(crate) struct BenchArgs {
    /// Where the disks are mounted
    #[arg(long, value_enum, default_value_t = GuestKind::Local)]
    pub(crate) guest: GuestKind,

    /// How many disks at once, each number by itself: from 1 to 256
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8,64,256", value_parser = parse_disks)]
    pub(crate) disks: Vec<usize>,

    /// How often each number is measured: from 1 to 1,000
    #[arg(long, value_name = "N", default_value = "5", value_parser = parse_rounds)]
    pub(crate) rounds: usize,

    /// Also measure disks that linger after their release, beside those that do not
    #[arg(long)]
    pub(crate) linger: bool,

    /// Draw the medians into this file, which is replaced: FILE.svg, or FILE.png in
    /// a program built with the feature png
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,

    /// Print the result as one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Only what carries the mark of a run that /run/blockmount knows is touched, and nothing that a \
living run holds. A mark of another run is reported and left: that run may be alive in another \
container.

Examples:
  sudo blockmount cleanup --dry-run
  sudo blockmount cleanup")]
pub(crate) struct CleanupArgs {
    /// Only show what would be removed
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,

    /// Also remove the mount of a killed run with this name (of all that have names if none is given), with all that
    /// was written to it
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true)]
    pub(crate) resumable: Option<Option<HolderName>>,

    /// Print the result as one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
