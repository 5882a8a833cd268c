//! What a host remembers of its mounts, because the protocol wants them described again.

use blockmount::{ErrorKind, MountOptions, Mounter};

use crate::harness::{bridged, device, dial, vm_with_disks};

#[tokio::test]
async fn f01_what_could_not_be_undone_without_a_connection_keeps_its_target() {
    let vm = vm_with_disks(2).await;
    let (guest, server) = bridged(&vm).await;
    let (target, options) = ("/m".as_ref(), MountOptions::read_only());
    guest.mount(&device(0), target, &options).await.unwrap();
    guest.channel().close();
    let error = guest.unmount(target).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain);
    // Still no connection: nothing is forgotten.
    let error = guest.mount(&device(1), target, &options).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Conflict);
    let stream = dial(&server).stream;
    guest.channel().reconnect(stream).await.unwrap();
    guest.unmount(target).await.unwrap();
    guest.mount(&device(1), target, &options).await.unwrap();
    assert_eq!(vm.device_at("/m").unwrap().as_str(), "fake:1");
    guest.unmount(target).await.unwrap();
    vm.check().unwrap();
    assert_eq!(vm.device_at("/m"), None);
}
