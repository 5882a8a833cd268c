//! The guest's side: from `vpmem:2` to the `/dev/pmemN` that it is, and unplugging it.

mod pmem;
mod resolver;
mod unplugger;

pub use pmem::PmemId;
pub use resolver::VpmemResolver;
pub use unplugger::VpmemUnplugger;
