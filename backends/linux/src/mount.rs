//! Mounts a device or an overlay at a target.

pub(crate) mod fscontext;
pub mod mountinfo;
pub(crate) mod mounting;
pub(crate) mod overlay;
pub(crate) mod places;
pub(crate) mod target;
pub(crate) mod users;
