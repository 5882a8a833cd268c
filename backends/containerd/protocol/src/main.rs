//! Makes the Rust of containerd's Mounts service.

use std::fs;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let service = here.join("proto/containerd/services/mounts/v1/mounts.proto");
    let descriptors = protox::compile([service], [here.join("proto")])?;
    let out = here.join("target/generated");
    fs::create_dir_all(&out)?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_transport(false)
        .include_file("protocol.rs")
        .emit_rerun_if_changed(false)
        .out_dir(&out)
        .compile_fds(descriptors)?;
    let read = |package: &str| fs::read_to_string(out.join(format!("{package}.rs")));
    let (types, service) = (read("containerd.types")?, read("containerd.services.mounts.v1")?);
    let text = format!(
        "// Made by backends/containerd/protocol from the files in its proto/; do not edit.\n\n\
         pub mod types {{\n{types}\n}}\n\npub mod mounts {{\n{service}\n}}\n"
    )
    .replace("super::super::super::types", "super::types")
    .replace("super::super::super::super::types", "super::types");
    let target = here.join("../src/service/protocol.rs");
    fs::write(target, text)?;
    Ok(())
}
