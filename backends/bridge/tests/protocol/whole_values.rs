//! What is asked for and what is answered arrives as it is.

use std::ffi::OsStr;
use std::num::NonZeroU32;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use blockmount::testing::{Gate, VmStep};
use blockmount::{
    Aead, BackendError, BindMount, Binder, Check, DeviceLocator, DeviceRole, Encryption,
    ErrorCorrection, ErrorKind, Expose, ExtraDevice, Format, FsGroup, FsGroupPolicy, HashAlgorithm,
    IdMap, IdRange, KeySource, LayerCombiner, LuksKey, MountFlag, MountOptions, Mounter,
    OnCorruption, Overlay, OverlayOptions, Presence, Propagation, Unplugger, Usage, Verity,
};
use blockmount_bridge::{BridgeGuest, GuestConnection, GuestServer};
use proptest::prelude::*;
use tokio::io::duplex;

use crate::harness::{bridged, device, dial, vm_with_disks};
use crate::recorder::{Asked, Recorder, TRIMMED, usage};

/// Of every kind that could be given to a kernel.
fn verity() -> impl Strategy<Value = Verity> {
    let sizes = (9u32..=16, 9u32..=16);
    let blocks = (1u64..1 << 40, any::<u16>());
    let algorithms = prop::sample::select(&HashAlgorithm::ALL[..]);
    let salt = "([0-9a-f]{2}){0,32}";
    let more = (
        any::<bool>(),
        any::<bool>(),
        prop::option::of("[!-~]{1,20}"),
    );
    let policies = [
        OnCorruption::Error,
        OnCorruption::Ignore,
        OnCorruption::Restart,
        OnCorruption::Panic,
    ];
    let policies = prop::sample::select(policies.to_vec());
    (
        sizes,
        blocks,
        algorithms,
        salt,
        more,
        policies,
        (any::<u64>(), any::<bool>()),
    )
        .prop_map(
            |(
                (data, hash),
                (data_blocks, gap),
                algorithm,
                salt,
                (once, tasklet, key),
                policy,
                (root, apart),
            )| {
                let root = format!("{root:016x}").repeat(algorithm.digest_size() / 8);
                let mut verity = Verity::new(root, data_blocks);
                (verity.salt, verity.algorithm) = (salt, algorithm);
                (verity.data_block_size, verity.hash_block_size) = (1 << data, 1 << hash);
                let end = data_blocks << data;
                verity.hash_start_block = end.div_ceil(1 << hash) + u64::from(gap);
                verity.separate_tree = apart;
                (verity.check_at_most_once, verity.try_verify_in_tasklet) = (once, tasklet);
                (verity.signature_key, verity.on_corruption) = (key, policy);
                if data == hash {
                    let (first, end) = (verity.hash_start_block, verity.end().unwrap() >> hash);
                    let covered = data_blocks + end - first;
                    verity.error_correction = Some(ErrorCorrection::new(2, covered, end));
                }
                verity
            },
        )
}

fn format() -> impl Strategy<Value = Format> {
    ("[a-z][a-z0-9]{0,8}", any::<bool>()).prop_map(|(filesystem, over)| {
        let format = Format::new(filesystem);
        if over {
            format.overwriting_everything()
        } else {
            format
        }
    })
}

/// Every name of a flag, of a propagation, of an access, and names and values that only a filesystem knows.
fn option() -> impl Strategy<Value = String> {
    let flags = MountFlag::all().iter().map(|flag| flag.name().to_owned());
    let modes = ["private", "shared", "slave", "unbindable"];
    let modes = modes
        .iter()
        .flat_map(|mode| ["", "r"].map(|prefix| format!("{prefix}{mode}")));
    let access = ["ro", "rw", "silent", "suid"].map(str::to_owned);
    let known: Vec<String> = flags.chain(modes).chain(access).collect();
    prop_oneof![
        3 => prop::sample::select(known),
        1 => "[a-z]{2,9}(=[!-+\\--~]{1,20})?",
    ]
}

fn encryption() -> impl Strategy<Value = Encryption> {
    let keyring = "[a-z]{1,9}:[!-~]{1,20}".prop_map(KeySource::Keyring);
    let file = "[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}".prop_map(KeySource::File);
    let source = prop_oneof![keyring, file].boxed();
    let passphrase = source.clone().prop_map(LuksKey::Passphrase);
    let volume = source.clone().prop_map(LuksKey::Volume);
    prop_oneof![
        Just(Encryption::Ephemeral),
        Just(Encryption::EphemeralWithIntegrity),
        prop::sample::select(&Aead::ALL[..]).prop_map(Encryption::EphemeralWithAead),
        source.prop_map(Encryption::Keyed),
        passphrase.prop_map(Encryption::Luks2),
        volume.prop_map(Encryption::Luks2),
    ]
}

fn id_map() -> impl Strategy<Value = IdMap> {
    let ranges = || {
        let range = (0u32..1 << 16, 0u32..1 << 16, 1u32..1 << 16);
        prop::collection::vec(range, 0..4).prop_map(|all| {
            let apart = |(index, (stored, shown, count)): (usize, _)| {
                let first = (index as u32) << 18;
                IdRange {
                    stored: first + stored,
                    shown: first + shown,
                    count,
                }
            };
            all.into_iter().enumerate().map(apart).collect::<Vec<_>>()
        })
    };
    (ranges(), ranges()).prop_filter_map("a map has ranges", |(users, groups)| {
        IdMap::new(users, groups).ok()
    })
}

fn fs_group() -> impl Strategy<Value = FsGroup> {
    let policies = [FsGroupPolicy::Always, FsGroupPolicy::OnRootMismatch];
    (0..u32::MAX, prop::sample::select(policies.to_vec()))
        .prop_map(|(gid, policy)| FsGroup::new(gid).policy(policy))
}

/// What is done to a filesystem before it appears.
fn preparation() -> impl Strategy<Value = (Option<IdMap>, Option<FsGroup>, Option<Check>)> {
    let checks = prop::sample::select(vec![Check::Verify, Check::Repair]);
    (
        prop::option::weighted(0.3, id_map()),
        prop::option::weighted(0.3, fs_group()),
        prop::option::weighted(0.2, checks),
    )
}

fn options() -> impl Strategy<Value = MountOptions> {
    let fields = (
        prop::option::weighted(0.3, 1..=u32::MAX),
        prop::option::weighted(0.3, "[a-z][a-z0-9]{0,8}"),
        prop::collection::vec(option(), 0..5),
        prop::option::weighted(0.2, verity()),
        prop::option::weighted(0.2, encryption()),
        prop::option::weighted(0.2, format()),
        prop::bool::weighted(0.2),
        preparation(),
    );
    fields.prop_filter_map(
        "contradictions are not built",
        |(partition, filesystem, options, verity, encryption, format, exposed, preparation)| {
            let mut builder = MountOptions::builder().options(options);
            if let Some(number) = partition.and_then(NonZeroU32::new) {
                builder = builder.partition(number);
            }
            if let Some(filesystem) = filesystem {
                builder = builder.filesystem(filesystem);
            }
            if let Some(verity) = verity {
                if verity.separate_tree {
                    let locator = DeviceLocator::new("scsi", "0/7").ok()?;
                    let tree = ExtraDevice::new(DeviceRole::HashTree, locator);
                    builder = builder.device(tree);
                }
                builder = builder.read_only().verity(verity);
            }
            if let Some(encryption) = encryption {
                builder = builder.encryption(encryption);
            }
            if let Some(format) = format {
                builder = builder.format(format);
            }
            if exposed {
                builder = builder.expose(Expose::BlockDevice);
            }
            let (map, group, check) = preparation;
            builder = map.into_iter().fold(builder, |all, it| all.id_map(it));
            builder = group.into_iter().fold(builder, |all, it| all.fs_group(it));
            builder = check.into_iter().fold(builder, |all, it| all.check(it));
            builder.build().ok()
        },
    )
}

fn path() -> impl Strategy<Value = PathBuf> {
    "(/\\PC{1,12}){1,6}".prop_map(PathBuf::from)
}

fn locator() -> impl Strategy<Value = DeviceLocator> {
    ("[a-z][a-z0-9-]{0,10}", "[!-~]{1,40}")
        .prop_map(|(scheme, address)| DeviceLocator::new(&scheme, address).unwrap())
}

fn overlay() -> impl Strategy<Value = Overlay> {
    let layers = prop::collection::vec(path(), 0..20);
    let options = ["volatile", "metacopy=on", "xino=auto", "context=a:b:c0,c1"];
    let options = prop::sample::subsequence(options.to_vec(), 0..=options.len());
    let fields = (layers, prop::option::of(path()), path(), options);
    fields.prop_map(|(layers, scratch, target, options)| {
        let overlay = Overlay::new(layers, target);
        let overlay = overlay.with_options(OverlayOptions::new(options).unwrap());
        match scratch {
            Some(scratch) => overlay.with_scratch(scratch),
            None => overlay,
        }
    })
}

/// What a guest is asked for when its host has these calls.
fn asked(call: impl AsyncFnOnce(&BridgeGuest) -> Result<(), BackendError>) -> Vec<Asked> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let recorder = Recorder::default();
        let server = GuestServer::new(recorder.clone());
        let (host_end, guest_end) = duplex(1 << 10);
        tokio::spawn(async move { server.serve(guest_end).await });
        let guest = BridgeGuest::new(GuestConnection::connect(host_end).await.unwrap());
        call(&guest).await.unwrap();
        recorder.take()
    })
}

proptest! {
    #[test]
    fn every_field_of_every_request_arrives_equal(
        locator in locator(),
        target in path(),
        options in options(),
        overlay in overlay(),
        bytes in any::<u64>(),
    ) {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let done = asked(async |guest| {
            guest.mount(&locator, &target, &options).await?;
            guest.unmount(&target).await?;
            guest.combine(&overlay).await?;
            guest.separate(&overlay.target).await?;
            assert_eq!(guest.usage(&target).await?, usage());
            assert_eq!(guest.trim(&target).await?, TRIMMED);
            guest.grow(&target, bytes).await?;
            guest.unplug(&locator).await
        });
        let expected = [
            Asked::Mount(locator.to_string(), text(&target), options),
            Asked::Unmount(text(&target)),
            Asked::Combine(overlay.clone()),
            Asked::Separate(text(&overlay.target)),
            Asked::Usage(text(&target)),
            Asked::Trim(text(&target)),
            Asked::Grow(text(&target), bytes),
            Asked::Unplug(locator.to_string()),
        ];
        prop_assert_eq!(done, expected);
    }
}

/// The strategy makes every field, so that the test above says something.
#[test]
fn the_options_that_are_tried_have_every_field() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen = [0; 14];
    let (mut flags, mut modes) = (std::collections::BTreeSet::new(), Vec::<Propagation>::new());
    for _ in 0..4_000 {
        let options = options().new_tree(&mut runner).unwrap().current();
        flags.extend(options.flags().iter());
        modes.extend(options.propagation().filter(|mode| !modes.contains(mode)));
        let there = [
            options.partition().is_some(),
            options.filesystem().is_some(),
            options.is_read_only(),
            options.flags().iter().next().is_some(),
            !options.data().is_empty(),
            options.propagation().is_some(),
            options.verity().is_some(),
            options.encryption().is_some(),
            options.format().is_some(),
            options.expose() == Expose::BlockDevice,
            !options.devices().is_empty(),
            options.id_map().is_some(),
            options.fs_group().is_some(),
            options.check().is_some(),
        ];
        for (count, there) in seen.iter_mut().zip(there) {
            *count += usize::from(there);
        }
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
    assert_eq!((flags.len(), modes.len()), (MountFlag::all().len(), 8));
}

#[tokio::test]
async fn an_error_crosses_with_its_kind_and_the_guest_never_says_gone() {
    use ErrorKind::*;
    let vm = vm_with_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    let device = device(0);
    for kind in [
        Uncertain, Busy, Full, Unsuitable, NotFound, Conflict, Invalid, Other,
    ] {
        vm.gate_next(VmStep::Mount, 1, Gate::Err(kind));
        let options = MountOptions::default();
        let outcome = guest.mount(&device, "/m".as_ref(), &options).await;
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        guest.unmount("/m".as_ref()).await.unwrap();
    }
    // What answers is not gone.
    vm.gate_next(VmStep::Mount, 1, Gate::Err(Gone));
    let options = MountOptions::default();
    let outcome = guest.mount(&device, "/m".as_ref(), &options).await;
    assert_eq!(outcome.unwrap_err().kind(), Uncertain);
}

/// A guest whose errors cannot be written as they are.
struct Unwritable(BackendError);

#[async_trait]
impl Mounter for Unwritable {
    async fn mount(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<(), BackendError> {
        Err(self.0.clone())
    }
    async fn unmount(&self, _: &Path) -> Result<(), BackendError> {
        Err(self.0.clone())
    }

    async fn usage(&self, _: &Path) -> Result<Usage, BackendError> {
        Err(self.0.clone())
    }

    async fn trim(&self, _: &Path) -> Result<u64, BackendError> {
        Err(self.0.clone())
    }

    async fn grow(&self, _: &Path, _: u64) -> Result<(), BackendError> {
        Err(self.0.clone())
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Err(self.0.clone())
    }
}

#[async_trait]
impl Unplugger for Unwritable {
    async fn unplug(&self, _: &DeviceLocator) -> Result<(), BackendError> {
        Err(self.0.clone())
    }
}

#[async_trait]
impl LayerCombiner for Unwritable {
    async fn combine(&self, _: &Overlay) -> Result<(), BackendError> {
        Err(self.0.clone())
    }
    async fn separate(&self, _: &Path) -> Result<(), BackendError> {
        Err(self.0.clone())
    }

    async fn adopt(&self, _: &Overlay) -> Result<Presence, BackendError> {
        Err(self.0.clone())
    }
}

#[async_trait]
impl Binder for Unwritable {
    async fn bind(&self, _: &BindMount) -> Result<(), BackendError> {
        Err(self.0.clone())
    }

    async fn unbind(&self, _: &Path) -> Result<(), BackendError> {
        Err(self.0.clone())
    }

    async fn adopt(&self, _: &BindMount) -> Result<Presence, BackendError> {
        Err(self.0.clone())
    }
}

#[tokio::test]
async fn an_error_of_any_content_arrives() {
    let path = Path::new(OsStr::from_bytes(b"/m\xff"));
    for error in [
        BackendError::busy("in use").with_path(path),
        BackendError::busy("\u{1}".repeat(1 << 20)),
    ] {
        let server = GuestServer::new(Unwritable(error.clone()));
        let connection = GuestConnection::connect(dial(&server).stream)
            .await
            .unwrap();
        let guest = BridgeGuest::new(connection);
        let said = guest.unmount("/m".as_ref()).await.unwrap_err();
        assert_eq!(said.kind(), ErrorKind::Busy);
        assert!(error.message().starts_with(said.message()));
        assert!(!said.message().is_empty());
    }
}
