//! A Unix socket between our client and QEMU on which the test does something just before a command goes on.

use std::io::{IoSlice, IoSliceMut, copy};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::net::UnixStream;

/// Passes everything on, with descriptors; calls `hook` before `command` goes to QEMU.
pub fn hooked(
    qemu: UnixStream,
    command: &'static str,
    mut hook: impl FnMut() + Send + 'static,
) -> UnixStream {
    let qemu = qemu.into_std().unwrap();
    qemu.set_nonblocking(false).unwrap();
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let (mut from_qemu, mut to_client) = (qemu.try_clone().unwrap(), theirs.try_clone().unwrap());
    thread::spawn(move || copy(&mut from_qemu, &mut to_client));
    let name = format!("\"execute\":\"{command}\"");
    thread::spawn(move || {
        while let Some((bytes, descriptors)) = receive(&theirs) {
            let text = String::from_utf8_lossy(&bytes);
            if text.contains(&name) {
                hook();
            }
            send(&qemu, &bytes, &descriptors);
        }
    });
    ours.set_nonblocking(true).unwrap();
    UnixStream::from_std(ours).unwrap()
}

fn receive(stream: &StdUnixStream) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut buffers, &mut control, flags).ok()?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    bytes.truncate(received.bytes);
    (!bytes.is_empty()).then_some((bytes, descriptors))
}

fn send(stream: &StdUnixStream, bytes: &[u8], descriptors: &[OwnedFd]) {
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    assert_eq!(sent.unwrap(), bytes.len());
}
