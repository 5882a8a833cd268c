//! Mounts a device or an overlay at a target.

pub(crate) mod attempt;
pub(crate) mod directory;
pub(crate) mod expose;
pub(crate) mod extra_devices;
pub(crate) mod fscontext;
pub(crate) mod id_map;
pub(crate) mod kernel_log;
pub(crate) mod mount_id;
pub mod mountinfo;
pub(crate) mod mounting;
pub(crate) mod overlay;
pub(crate) mod owners;
pub(crate) mod parents;
pub(crate) mod permission;
pub(crate) mod target;
pub(crate) mod unmount;
pub(crate) mod users;
pub(crate) mod view;
pub(crate) mod volume;
pub(crate) mod writes;
