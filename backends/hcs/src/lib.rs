//! Hyper-V as hypervisor for blockmount: SCSI and VPMEM disks by documents of the Host Compute Service.
