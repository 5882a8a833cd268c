//! Arguments in files and on the kernel's command line.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// A word of the kernel's command line that is an argument of the agent.
const WORD: &[u8] = b"blockmount.arg=";

/// The lines of a file; empty ones are left out, and those that begin with `#`.
pub(super) fn lines(text: &[u8]) -> Vec<OsString> {
    text.split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .map(|line| OsString::from_vec(line.to_vec()))
        .collect()
}

/// The arguments among the words of a kernel's command line.
pub(super) fn words(command_line: &[u8]) -> Vec<OsString> {
    command_line
        .split(u8::is_ascii_whitespace)
        .filter_map(|word| word.strip_prefix(WORD))
        .filter(|argument| !argument.is_empty())
        .map(|argument| OsString::from_vec(argument.to_vec()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_lines_and_words() {
        let file = b"--root\n/run/layers of mine\n\n# why\n  --serial \n";
        assert_eq!(lines(file), ["--root", "/run/layers of mine", "--serial"]);
        let line = b"quiet blockmount.arg=--vsock console=ttyS0\tblockmount.arg=7 blockmount.arg= blockmount.args=x\n";
        assert_eq!(words(line), ["--vsock", "7"]);
        assert!(lines(b"").is_empty() && words(b"\n").is_empty());
    }
}
