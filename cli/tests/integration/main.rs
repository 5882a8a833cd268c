//! Tests of the program that need no VM. They are one program themselves, since each takes seconds to compile and link.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../../tests/common/merged_erofs.rs"]
mod merged_erofs;

mod inspect;
mod root_bad_input;
mod root_container;
mod root_demo;
mod root_interrupt;
mod root_mount;
mod root_page;
mod root_resume;
mod root_serve;
mod root_shortages;
mod root_status;
mod seal;
mod texts;
mod usage;
