//! Nothing else in the workspace knows the scheme of this transport.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn no_other_crate_names_the_scheme() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap();
    let ours = workspace.join("tests/third_party");
    let (mut read, mut naming) = (0, Vec::new());
    let mut directories: Vec<PathBuf> = [
        "src", "backends", "cli", "tests", "benches", "examples", "fuzz",
    ]
    .map(|name| workspace.join(name))
    .into();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path == ours || path.ends_with("target") {
                continue;
            }
            if path.is_dir() {
                directories.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "rs" || extension == "toml")
            {
                read += 1;
                if fs::read_to_string(&path)
                    .unwrap()
                    .contains(third_party_transport::SCHEME)
                {
                    naming.push(path);
                }
            }
        }
    }
    assert!(read > 300, "only {read} files were read");
    assert_eq!(naming, Vec::<PathBuf>::new());
}
