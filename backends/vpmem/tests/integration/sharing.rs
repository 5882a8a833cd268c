//! One disk for many, through a manager: attached once, taken out once, and never used when it is not
//! mounted.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use crate::common::guest::Guest;
use crate::common::{Answer, Event, GIB, MODES, address, disk, two_addresses, vpmem};
use blockmount::{Disk, ErrorKind, MountOptions, MountRequest};
use blockmount_vpmem::Mode;

fn request() -> MountRequest {
    MountRequest::new(MountOptions::read_only())
}

#[tokio::test]
async fn v01_a_disk_that_the_guest_has_let_go_of_is_mounted_again() {
    for mode in MODES {
        let (vm, vpmem, [at, _]) = two_addresses(mode);
        let at = format!("vpmem:{at}");
        let guest = Guest::default();
        let (manager, log) = guest.manager(vec![vpmem.clone()]);
        let mount = manager.add(&disk(0), &request()).await.unwrap();
        log.take();
        vm.next(Answer::Fail(ErrorKind::Busy));
        let failed = mount.release().await.unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Busy);
        let unplug = format!("unplug {at}");
        assert_eq!(log.take(), ["unmount", &unplug, "detach: busy"]);

        // Nothing is mounted, so whoever asks again gets a new mount and not an old path.
        let mount = manager.add(&disk(0), &request()).await.unwrap();
        let [attach, mounted] = ["attach", "mount"].map(|verb| format!("{verb} {at}"));
        assert_eq!(log.take(), ["detach", &attach, &mounted]);
        assert_eq!(guest.device_at(mount.path()), Some(at));
        mount.release().await.unwrap();
        assert_eq!((guest.mounts(), vm.present()), (0, vec![]));
        assert!(manager.drain().await.is_clean());
    }
}

#[tokio::test]
async fn v02_a_release_takes_nobody_elses_share() {
    for mode in MODES {
        let (vm, vpmem, _) = two_addresses(mode);
        let guest = Guest::default();
        let (manager, _) = guest.manager(vec![vpmem.clone()]);
        let one = manager.add(&disk(0), &request()).await.unwrap();
        let two = manager.add(&disk(0), &request()).await.unwrap();
        one.release().await.unwrap();
        assert_eq!((guest.mounts(), vm.present().len()), (1, 1));
        vm.next(Answer::Fail(ErrorKind::Other));
        let failed = two.release().await.unwrap_err();
        // The second release of one handle, when somebody else has the disk by now.
        let three = manager.add(&disk(0), &request()).await.unwrap();
        failed.retry().await.unwrap();
        assert!(guest.device_at(three.path()).is_some());
        assert_eq!(vm.present().len(), 1);
        three.release().await.unwrap();
        assert_eq!((guest.mounts(), vm.present()), (0, vec![]));
    }
}

#[tokio::test]
async fn v08_a_disk_under_two_names_is_one_device() {
    for mode in MODES {
        // The VM boots from device 0, whatever its disk is called.
        let (vm, vpmem) = vpmem(mode, 4, GIB, &[0]);
        let link = Disk::virtual_disk("0.vhd").read_only();
        vm.link(&link, &disk(0));
        let guest = Guest::default();
        let (manager, _) = guest.manager(vec![vpmem.clone()]);
        let by_path = manager.add(&disk(0), &request()).await.unwrap();
        let by_name = manager.add(&link, &request()).await.unwrap();
        assert_eq!(by_path.locator(), by_name.locator());
        assert!(by_path.locator().as_str().starts_with("vpmem:1"));
        assert_eq!((vm.log().len(), guest.mounts()), (1, 1));
        by_path.release().await.unwrap();
        by_name.release().await.unwrap();
        assert_eq!(vm.present(), []);
    }
}

#[tokio::test]
async fn the_same_layer_128_times_is_one_device() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 64, 4 * GIB, &[]);
        let guest = Guest::default();
        let (manager, log) = guest.manager(vec![vpmem.clone()]);
        let mut mounts = Vec::new();
        for _ in 0..128 {
            mounts.push(manager.add(&disk(7), &request()).await.unwrap());
        }
        let path = mounts[0].path().to_owned();
        assert!(mounts.iter().all(|mount| mount.path() == path));
        assert_eq!((vpmem.slot_map().len(), log.take().len()), (1, 2));
        for mount in mounts {
            assert_eq!(vm.present().len(), 1);
            mount.release().await.unwrap();
        }
        assert_eq!(log.take().len(), 3);
        assert_eq!((vpmem.slot_map(), vm.present()), (vec![], vec![]));
    }
}

#[tokio::test]
async fn v03_the_first_disk_of_a_packed_device_is_mapped_like_all_others() {
    let (vm, vpmem) = vpmem(Mode::Packed, 4, GIB, &[]);
    let guest = Guest::default();
    let (manager, _) = guest.manager(vec![vpmem.clone()]);
    let mut mounts = Vec::new();
    for number in 0..3 {
        mounts.push(manager.add(&disk(number), &request()).await.unwrap());
    }
    let mapped = ["0@0+1048576", "0@1048576+1048576", "0@2097152+1048576"];
    let attach = |(number, at)| Event::Attach(address(at), disk(number));
    let expected: Vec<Event> = mapped.into_iter().enumerate().map(attach).collect();
    assert_eq!(vm.log(), expected);
    for mount in mounts {
        mount.release().await.unwrap();
    }
    let expected = mapped.map(|at| Event::Detach(address(at)));
    assert_eq!(vm.log()[3..], expected);
}
