//! Virtual machines that come and go while the service goes on.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockmount::{BackendError, Recovery};

use super::super::vm::{Vm, VmName};
use super::deactivating::release_unclaimed;
use super::recover::{Left, in_both, is_kept};
use super::{Activations, Options};

impl Activations {
    /// Takes one more virtual machine in, as [`recover_in_vms`](Self::recover_in_vms) takes several. While what an earlier process has
    /// activated there is taken over, calls that change something wait.
    ///
    /// # Errors
    ///
    /// `Conflict` if the service is for one guest without a name, has a machine of this name, or has an activation of a name that one
    /// there has; or if the records cannot be read, or the service has been left. Nothing is changed then.
    ///
    /// # Cancel safety
    ///
    /// What was taken over until then may be neither here nor there before the next process.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn add_vm(
        &self,
        name: VmName,
        recovery: Recovery,
        options: Options,
    ) -> Result<(), BackendError> {
        let (vm, records) = Vm::load(Some(name.clone()), &recovery, &options).await?;
        // Nobody takes one of their names meanwhile.
        let alone = match records.is_empty() {
            true => None,
            false => Some(self.0.is_left.write().await),
        };
        let is_left = match &alone {
            Some(is_left) => **is_left,
            None => *self.0.is_left.read().await,
        };
        if is_left {
            return Err(BackendError::other("the service is ending"));
        }
        self.ensure_new(&name)?;
        for record in records.iter().filter(|record| is_kept(record)) {
            if let Some(other) = self.table().get(&record.info.key()) {
                return Err(in_both(record, &other.vm, &vm));
            }
        }
        let vm = Arc::new(vm);
        let mut taken = HashMap::new();
        let left = Left {
            vm: vm.clone(),
            recovery,
            records,
        };
        left.take_over(&mut taken).await;
        {
            let mut table = self.table();
            for (key, entry) in taken {
                table.entry(key).or_insert(entry);
            }
        }
        let mut vms = self.vms();
        let at = vms.partition_point(|other| other.name < vm.name);
        vms.insert(at, vm);
        drop(vms);
        if let Some(grace) = options.grace {
            let shared = Arc::downgrade(&self.0);
            tokio::spawn(release_unclaimed(shared, Some(name), grace));
        }
        Ok(())
    }

    fn ensure_new(&self, name: &VmName) -> Result<(), BackendError> {
        let vms = self.vms();
        if vms.iter().any(|vm| vm.name.is_none()) {
            let message = "the service is for one guest, which has no name";
            return Err(BackendError::conflict(message));
        }
        match vms.iter().any(|vm| vm.name.as_ref() == Some(name)) {
            true => {
                let message = format!("the service has a virtual machine {name} already");
                Err(BackendError::conflict(message))
            }
            false => Ok(()),
        }
    }

    /// Says that what is activated in a virtual machine is lost, and why; it stays listed, and nothing more is activated there
    /// (`UNAVAILABLE`). Nothing happens if there is no such machine, or if that was said before.
    pub fn lose_vm(&self, name: Option<&VmName>, why: &str) {
        if let Some(vm) = self.vms().iter().find(|vm| vm.name.as_ref() == name) {
            vm.lost.get_or_init(|| why.to_owned());
        }
    }

    /// Has these virtual machines, and no others, take nothing more (`UNAVAILABLE`), so that they can be removed when what is
    /// activated in them has gone: see [`vacated`](Self::vacated).
    pub fn retire_only(&self, names: &[VmName]) {
        for vm in self.vms().iter() {
            let is_named = vm.name.as_ref().is_some_and(|name| names.contains(name));
            vm.is_retired.store(is_named, Ordering::Relaxed);
        }
        self.0.ended.notify_waiters();
    }

    /// Waits until nothing is activated any more in a virtual machine that is to go, removes it as
    /// [`remove_vm`](Self::remove_vm) does, and tells which it is. The last machine of a service stays.
    ///
    /// # Cancel safety
    ///
    /// Nothing is removed without being told.
    pub async fn vacated(&self) -> VmName {
        let mut ended = pin!(self.0.ended.notified());
        loop {
            // What ends from now on is not missed.
            ended.as_mut().enable();
            let retired: Vec<VmName> = {
                let vms = self.vms();
                let retired = vms
                    .iter()
                    .filter(|vm| vm.is_retired.load(Ordering::Relaxed));
                retired.filter_map(|vm| vm.name.clone()).collect()
            };
            let mut retired = retired.into_iter();
            if let Some(name) = retired.find(|name| self.remove_vm(name).is_ok()) {
                return name;
            }
            ended.as_mut().await;
            ended.set(self.0.ended.notified());
        }
    }

    /// Leaves a virtual machine out, in which nothing is activated. Its manager is the caller's to end.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is none of this name; `Busy` while something is activated there, or is about to be; `Invalid` for the last
    /// one. Nothing is changed then.
    pub fn remove_vm(&self, name: &VmName) -> Result<(), BackendError> {
        let mut vms = self.vms();
        let at = vms.iter().position(|vm| vm.name.as_ref() == Some(name));
        let Some(at) = at else {
            let message = format!("the service has no virtual machine {name}");
            return Err(BackendError::not_found(message));
        };
        // Each activation has the machine that it is in, from the moment on at which that is chosen under this lock.
        if Arc::strong_count(&vms[at]) > 1 {
            let within = |entry: &&super::Entry| entry.vm.name.as_ref() == Some(name);
            let message = match self.table().values().filter(within).count() {
                0 => format!("something is being activated in the virtual machine {name}"),
                count => format!("{count} activated in the virtual machine {name}"),
            };
            return Err(BackendError::busy(message));
        }
        if vms.len() == 1 {
            let message = format!("{name} is the only virtual machine of the service");
            return Err(BackendError::invalid(message));
        }
        drop(vms.remove(at));
        Ok(())
    }
}
