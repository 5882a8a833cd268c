//! What is done with disks while they are mounted: growing, trimming, asking how full they are.

use crate::release::give_back;
use crate::{Attachment, Error, Manager, Mount, Step, Usage};

impl Manager {
    /// Grows an attached disk to at least `bytes`, and everything of it that this manager has mounted: the image on the host,
    /// the device in the guest, the mapped devices and the filesystem on it, which stay in use meanwhile.
    ///
    /// What has the size already stays as it is, so that the call can be repeated after an error. Calls for one disk are made
    /// one after the other.
    ///
    /// # Errors
    ///
    /// `Invalid` if the disk is larger already, or read-only; `Unsuitable` if the hypervisor, or something between the disk and
    /// its filesystem, cannot grow, as a partition; others as the backends answer. The disk may have grown by then, and the
    /// filesystem on it not.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; what is under way is finished in the background.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn resize(&self, attachment: &Attachment, bytes: u64) -> Result<(), Error> {
        let running = self.mounts().enter()?.in_task();
        let (disk, id) = (attachment.disk().clone(), attachment.id().clone());
        let (attachments, mounts) = (self.attachments().clone(), self.mounts().clone());
        // A share of it, so that nobody detaches the disk meanwhile.
        let attachment = attachment.again();
        let resize = async move {
            let done = async {
                attachments.resize(&attachment, bytes).await?;
                for mount in mounts.shares_of(attachment.locator()) {
                    let grown = mounts.grow(&mount, bytes).await;
                    give_back(mount.releasing()).await;
                    grown?;
                }
                Ok(())
            };
            let done: Result<(), Error> = done.await;
            give_back(attachment.releasing()).await;
            drop(running);
            Ok(done)
        };
        let cut_off = |cause| Error::new(Step::Resize, cause).on_disk(&disk);
        self.resizing.run(id, resize).await.map_err(cut_off)?
    }

    /// How much of the filesystem of a mount is used.
    ///
    /// # Errors
    ///
    /// Those of [`Mounter::usage`](crate::Mounter::usage).
    pub async fn usage(&self, mount: &Mount) -> Result<Usage, Error> {
        self.mounts().usage(mount).await
    }

    /// Tells the disk of a mount which of its blocks the filesystem does not use, and answers how many bytes those are: where
    /// the disk is a sparse file or thinly provisioned, they are free again on the host.
    ///
    /// # Errors
    ///
    /// Those of [`Mounter::trim`](crate::Mounter::trim).
    pub async fn trim(&self, mount: &Mount) -> Result<u64, Error> {
        self.mounts().trim(mount).await
    }
}
