//! Tests of the crate from outside. They are one program, since each takes seconds to compile and link.

mod kit;
#[path = "../../../../tests/common/merged_erofs.rs"]
mod merged_erofs;

mod hostile_images;
mod root_blkid;
mod root_damage;
mod root_dax;
mod root_devices;
mod root_expose;
mod root_filesystems;
mod root_format;
mod root_incomplete;
mod root_order;
mod root_overlay;
mod root_partitions;
mod root_propagation;
mod root_ranges;
mod root_restart;
mod root_targets;
mod root_unmount;
mod root_views;
mod root_volumes;
