//! Texts of others as part of a line of ours.

use std::fmt::{self, Write as _};

/// A text that a terminal and a log can take: see [`printable`].
#[derive(Debug, Clone, Copy)]
pub struct Printable<T> {
    text: T,
    limit: usize,
}

/// As many characters as a path of Linux has bytes (`PATH_MAX`).
const LIMIT: usize = 4_096;

/// Shows a text that an image, a guest, a hypervisor or the name of a file has brought in, so that it can neither steer a
/// terminal nor forge a line of a log.
///
/// Control characters, line separators and marks that change the direction of writing are escaped as Rust does. After 4,096
/// characters, or [fewer](Printable::shortened), the rest is left out, and three dots say so.
///
/// ```
/// assert_eq!(blockmount::printable("a\n\u{1b}[2Jb").to_string(), r"a\n\u{1b}[2Jb");
/// assert_eq!(blockmount::printable("abcdef").shortened(3).to_string(), "abc...");
/// ```
///
/// All errors of this crate are shown so.
pub const fn printable<T: fmt::Display>(text: T) -> Printable<T> {
    Printable { text, limit: LIMIT }
}

impl<T> Printable<T> {
    /// The same with at most so many characters of the text.
    #[must_use]
    pub fn shortened(self, limit: usize) -> Self {
        Printable { limit, ..self }
    }
}

impl<T: fmt::Display> fmt::Display for Printable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut escaped = Escaped {
            to: f,
            left: self.limit,
            is_cut: false,
        };
        match write!(escaped, "{}", self.text) {
            Err(_) if escaped.is_cut => f.write_str("..."),
            written => written,
        }
    }
}

struct Escaped<'a, 'b> {
    to: &'a mut fmt::Formatter<'b>,
    left: usize,
    is_cut: bool,
}

impl fmt::Write for Escaped<'_, '_> {
    /// Fails at the limit, so that no more of the text is made.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if self.left == 0 {
                self.is_cut = true;
                return Err(fmt::Error);
            }
            self.left -= 1;
            match steers(character) {
                true => write!(self.to, "{}", character.escape_default())?,
                false => self.to.write_char(character)?,
            }
        }
        Ok(())
    }
}

/// Whether a character changes how what follows it is shown.
fn steers(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BackendError, Disk, Error, Step};

    #[test]
    fn x13_what_steers_a_terminal_is_escaped_and_the_rest_is_not() {
        let text = "é☃\u{1f469}\u{200d}\u{1f692} a\r\n\u{85}\u{9b}2J\u{202e}gpj.exe\u{2028}";
        let expected =
            "é☃\u{1f469}\u{200d}\u{1f692} a\\r\\n\\u{85}\\u{9b}2J\\u{202e}gpj.exe\\u{2028}";
        assert_eq!(printable(text).to_string(), expected);
    }

    #[test]
    fn x13_a_text_has_a_limit_that_is_seen() {
        assert_eq!(printable("abc").shortened(3).to_string(), "abc");
        assert_eq!(printable("a\nc").shortened(2).to_string(), "a\\n...");
        let endless = "x".repeat(1 << 20);
        assert_eq!(printable(endless).to_string().len(), LIMIT + 3);
    }

    #[test]
    fn x13_no_error_forges_a_line() {
        let cause = BackendError::busy("umount of \u{1b}[2J\nINFO all is well");
        let disk = Disk::virtual_disk("/a\nb");
        let error = Error::new(Step::Mount, cause.clone()).on_disk(&disk);
        for text in [cause.to_string(), error.to_string()] {
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
    }
}
