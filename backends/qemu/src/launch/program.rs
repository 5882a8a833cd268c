//! The program that a guest runs, with all that it needs to run there: nothing, if it is static; else its
//! loader and its libraries.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use object::Endianness;
use object::elf::{FileHeader64, PT_INTERP, PT_LOAD};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use tokio::process::Command;

use super::error::VmError;

/// How long the loader may take to list the libraries of a program; it takes milliseconds.
const LISTING: Duration = Duration::from_secs(10);

/// A program of this machine, to be run in a guest with the same kind of processor.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// The file without what only debuggers read.
    pub(super) executable: Vec<u8>,
    /// Libraries and the loader, each with the path at which the program looks for it.
    pub(super) libraries: Vec<(String, Vec<u8>)>,
}

type Header = FileHeader64<Endianness>;

impl Program {
    /// Reads a program and what it is linked to.
    pub(super) async fn read(path: &Path) -> Result<Self, VmError> {
        let bytes = read(path).await?;
        let unfit = |error: object::Error| {
            VmError::new(format!("{} is no program for a guest", path.display())).because(error)
        };
        let (interpreter, length) = examine(&bytes).map_err(unfit)?;
        let mut libraries = Vec::new();
        if let Some(interpreter) = interpreter {
            for library in libraries_of(path, &interpreter).await? {
                let content = read(Path::new(&library)).await?;
                libraries.push((library, content));
            }
            let content = read(Path::new(&interpreter)).await?;
            libraries.push((interpreter, content));
        }
        Ok(Program {
            executable: without_sections(bytes, length).map_err(unfit)?,
            libraries,
        })
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, VmError> {
    tokio::fs::read(path)
        .await
        .map_err(|error| VmError::new(format!("cannot read {}", path.display())).because(error))
}

/// The loader that a program asks for, and how much of the file is loaded.
fn examine(bytes: &[u8]) -> object::Result<(Option<String>, usize)> {
    let header = Header::parse(bytes)?;
    let endian = header.endian()?;
    let (mut interpreter, mut length) = (None, 0);
    for part in header.program_headers(endian, bytes)? {
        let (offset, size) = part.file_range(endian);
        if part.p_type(endian) == PT_LOAD {
            length = length.max(offset.saturating_add(size));
        }
        if part.p_type(endian) == PT_INTERP {
            let name = part.data(endian, bytes).unwrap_or_default();
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            interpreter = Some(String::from_utf8_lossy(name).into_owned());
        }
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    Ok((interpreter, length.min(bytes.len())))
}

/// Cuts off the sections behind what is loaded: symbols and debug information, most of the file. The kernel
/// and the loader go by the program headers alone.
fn without_sections(mut bytes: Vec<u8>, length: usize) -> object::Result<Vec<u8>> {
    /// Where a header of an ELF file of 64 bits has the offset of the section headers, their number, and
    /// the index of the one with their names.
    const SECTION_OFFSET: std::ops::Range<usize> = 0x28..0x30;
    const SECTION_COUNTS: std::ops::Range<usize> = 0x3c..0x40;
    bytes.truncate(length);
    bytes[SECTION_OFFSET].fill(0);
    bytes[SECTION_COUNTS].fill(0);
    Header::parse(&*bytes)?;
    Ok(bytes)
}

/// Has the loader say which libraries it would load. It prints lines such as
/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f...)`.
async fn libraries_of(program: &Path, interpreter: &str) -> Result<Vec<String>, VmError> {
    let what = || {
        VmError::new(format!(
            "cannot list the libraries of {}",
            program.display()
        ))
    };
    let mut command = Command::new(interpreter);
    command.arg("--list").arg(program).stdin(Stdio::null());
    let output = tokio::time::timeout(LISTING, command.kill_on_drop(true).output())
        .await
        .map_err(|elapsed| what().because(elapsed))?
        .map_err(|error| what().because(error))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(what().because(said));
    }
    let listed = String::from_utf8_lossy(&output.stdout);
    Ok(listed.lines().filter_map(found_at).collect())
}

fn found_at(line: &str) -> Option<String> {
    let (_, found) = line.split_once(" => ")?;
    let (path, _) = found.rsplit_once(" (")?;
    path.starts_with('/').then(|| path.to_owned())
}

/// The program that is running, as a file: what a guest runs when nothing else is said.
pub(super) fn running() -> Result<PathBuf, VmError> {
    // Not the link: the loader of a program wants a name that it can open.
    std::env::current_exe()
        .map_err(|error| VmError::new("cannot find the program that is running").because(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_is_smaller_and_runs_as_before() {
        use std::os::unix::fs::PermissionsExt;
        let own = running().unwrap();
        let program = Program::read(&own).await.unwrap();
        assert!(program.executable.len() < own.metadata().unwrap().len() as usize);
        let names: Vec<&str> = program.libraries.iter().map(|(name, _)| &**name).collect();
        assert!(
            names.iter().any(|name| name.contains("libc.so")),
            "{names:?}"
        );

        let room = tempfile::tempdir().unwrap();
        let copy = room.path().join("copy");
        std::fs::write(&copy, &program.executable).unwrap();
        std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).unwrap();
        let output = Command::new(&copy).arg("--list").output().await.unwrap();
        assert!(output.status.success());
        let listed = String::from_utf8(output.stdout).unwrap();
        assert!(listed.contains("a_program_is_smaller_and_runs_as_before"));
    }

    #[tokio::test]
    async fn what_is_no_program_is_refused() {
        let room = tempfile::tempdir().unwrap();
        let file = room.path().join("file");
        for content in [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x02\x01\x01", &[0; 64]] {
            std::fs::write(&file, content).unwrap();
            let error = Program::read(&file).await.unwrap_err().to_string();
            assert!(error.contains("is no program for a guest"), "{error}");
        }
        assert!(Program::read(&room.path().join("absent")).await.is_err());
    }

    #[test]
    fn reads_what_a_loader_prints() {
        let line = "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)";
        assert_eq!(found_at(line).unwrap(), "/lib/x86_64-linux-gnu/libc.so.6");
        for line in [
            "\tlinux-vdso.so.1 (0x0)",
            "libx.so => not found",
            "",
            "statically linked",
        ] {
            assert_eq!(found_at(line), None);
        }
    }
}
