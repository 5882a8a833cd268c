//! Filters as containerd writes them: `name==web,labels."a.b"~=^x`.
//!
//! A filter is a list of selectors, all of which must hold; of several filters one must. A selector is a path of fields alone
//! (there is such a field), or with `==`, `!=` or `~=` (a regular expression that is found) and a value. Fields and values may be
//! quoted. (containerd, `pkg/filters`)

use regex::{Regex, RegexBuilder};
use thiserror::Error;

use super::record::Info;

/// The longest filter, in bytes.
const LONGEST: usize = 4096;
/// How large a regular expression may be once it is compiled, in bytes.
const LARGEST_PATTERN: usize = 1 << 20;

/// Which activations are told of.
#[derive(Debug, Clone, Default)]
pub struct Filter(Vec<Vec<Selector>>);

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

/// What is wrong with a filter.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("filter {filter:?} makes no sense at byte {at}: {reason}")]
#[non_exhaustive]
pub struct InvalidFilter {
    /// The filter, or its beginning.
    pub filter: String,
    /// Where in it.
    pub at: usize,
    /// What is wrong.
    pub reason: String,
}

impl Filter {
    /// What passes one of these. Without any, everything passes.
    ///
    /// # Errors
    ///
    /// [`InvalidFilter`]: the first that makes no sense.
    pub fn parse<S: AsRef<str>>(
        filters: impl IntoIterator<Item = S>,
    ) -> Result<Self, InvalidFilter> {
        let parse = |filter: S| Parser::of(filter.as_ref()).selectors();
        filters
            .into_iter()
            .map(parse)
            .collect::<Result<_, _>>()
            .map(Filter)
    }

    /// Whether an activation passes. It has `name`, `namespace` and `labels.KEY`.
    pub fn passes(&self, info: &Info) -> bool {
        let all = |selectors: &Vec<Selector>| selectors.iter().all(|selector| selector.holds(info));
        self.0.is_empty() || self.0.iter().any(all)
    }
}

impl Selector {
    fn holds(&self, info: &Info) -> bool {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let found = match path[..] {
            ["name"] => Some(&info.name),
            ["namespace"] => Some(&info.namespace),
            ["labels", ref key @ ..] => info.labels.get(&key.join(".")),
            _ => None,
        };
        let value = found.map_or("", String::as_str);
        match &self.test {
            Test::Present => found.is_some(),
            Test::Equal(wanted) => found.is_some() && value == wanted,
            Test::NotEqual(wanted) => value != wanted,
            Test::Matches(pattern) => pattern.is_match(value),
        }
    }
}

struct Parser<'a> {
    filter: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn of(filter: &'a str) -> Self {
        Parser { filter, at: 0 }
    }

    fn rest(&self) -> &'a str {
        &self.filter[self.at..]
    }

    fn wrong(&self, reason: impl Into<String>) -> InvalidFilter {
        InvalidFilter {
            filter: self.filter.chars().take(128).collect(),
            at: self.at,
            reason: reason.into(),
        }
    }

    fn takes(&mut self, text: &str) -> bool {
        let takes = self.rest().starts_with(text);
        self.at += if takes { text.len() } else { 0 };
        takes
    }

    fn selectors(mut self) -> Result<Vec<Selector>, InvalidFilter> {
        if self.filter.len() > LONGEST {
            return Err(self.wrong(format!("it has over {LONGEST} bytes")));
        }
        let mut selectors = Vec::new();
        // An empty one passes everything.
        if self.filter.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            if self.rest().is_empty() {
                return Ok(selectors);
            }
            if !self.takes(",") {
                return Err(self.wrong("a comma or the end was expected"));
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, InvalidFilter> {
        let mut path = vec![self.field()?];
        while self.takes(".") {
            path.push(self.field()?);
        }
        let test = if self.takes("==") {
            Test::Equal(self.value(&['"', '\''])?)
        } else if self.takes("!=") {
            Test::NotEqual(self.value(&['"', '\''])?)
        } else if self.takes("~=") {
            let pattern = self.value(&['"', '\'', '/', '|'])?;
            let compiled = RegexBuilder::new(&pattern)
                .size_limit(LARGEST_PATTERN)
                .build();
            Test::Matches(compiled.map_err(|error| self.wrong(error.to_string()))?)
        } else if self.rest().is_empty() || self.rest().starts_with(',') {
            Test::Present
        } else {
            return Err(self.wrong("an operator was expected: ==, != or ~="));
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, InvalidFilter> {
        if let Some(quoted) = self.quoted(&['"', '\''])? {
            return Ok(quoted);
        }
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let length = self
            .rest()
            .find(|c| !is_part(c))
            .unwrap_or(self.rest().len());
        let field = &self.rest()[..length];
        if !field.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            return Err(self.wrong("a field was expected"));
        }
        self.at += length;
        Ok(field.to_owned())
    }

    fn value(&mut self, quotes: &[char]) -> Result<String, InvalidFilter> {
        if let Some(quoted) = self.quoted(quotes)? {
            return Ok(quoted);
        }
        let ends = |c: char| c == ',' || c.is_whitespace();
        let length = self.rest().find(ends).unwrap_or(self.rest().len());
        if length == 0 {
            return Err(self.wrong("a value was expected"));
        }
        let value = &self.rest()[..length];
        self.at += length;
        Ok(value.to_owned())
    }

    /// What is between quotes, if the next is one of these.
    fn quoted(&mut self, quotes: &[char]) -> Result<Option<String>, InvalidFilter> {
        let Some(quote) = self.rest().chars().next().filter(|c| quotes.contains(c)) else {
            return Ok(None);
        };
        let mut text = String::new();
        let mut characters = self.rest()[1..].chars();
        loop {
            match characters.next() {
                None => return Err(self.wrong("the quote is not closed")),
                Some(end) if end == quote => break,
                Some('\\') => match escaped(&mut characters, quote) {
                    Some(taken) => text.push_str(&taken),
                    None => return Err(self.wrong("an escape is not one of Go")),
                },
                Some(other) => text.push(other),
            }
        }
        self.at = self.filter.len() - characters.as_str().len();
        Ok(Some(text))
    }
}

/// What a backslash and what follows stand for: in quotes of Go as there, between others only the end of the text is escaped.
fn escaped(rest: &mut std::str::Chars<'_>, quote: char) -> Option<String> {
    let next = rest.next()?;
    if next == quote || (next == '\\' && ['"', '\''].contains(&quote)) {
        return Some(next.to_string());
    }
    if !['"', '\''].contains(&quote) {
        return Some(format!("\\{next}"));
    }
    let mut code = |digits| {
        let text: String = rest.by_ref().take(digits).collect();
        let code = u32::from_str_radix(&text, 16).ok();
        Some(char::from_u32(code.filter(|_| text.len() == digits)?)?.to_string())
    };
    match next {
        'n' => Some("\n".to_owned()),
        't' => Some("\t".to_owned()),
        'r' => Some("\r".to_owned()),
        'x' => code(2),
        'u' => code(4),
        'U' => code(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn info() -> Info {
        let labels = [("a", "1"), ("containerd.io/gc.root", "x,y"), ("empty", "")];
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        Info {
            namespace: "default".to_owned(),
            name: "web-1".to_owned(),
            active: Vec::new(),
            system: Vec::new(),
            labels: labels.map(owned).into(),
        }
    }

    #[test]
    fn filters_are_those_of_containerd() {
        for (filters, passes) in [
            (&[][..], true),
            (&[""], true),
            (&["name==web-1"], true),
            (&["name==web"], false),
            (&["name==web", "name==web-1"], true),
            (&["name!=web"], true),
            (&["name==web-1,labels.a==1"], true),
            (&["name==web-1,labels.a==2"], false),
            (&["labels.a"], true),
            (&["labels.b"], false),
            (&["labels.empty"], true),
            (&["labels.b=="], false),
            (&["labels.b!=1"], true),
            (&["wonder"], false),
            (&[r#"labels."containerd.io/gc.root"=="x,y""#], true),
            (&[r#"labels."containerd.io/gc.root"~=/^x,[yz]$/"#], true),
            (&["name~=^web-[0-9]+$"], true),
            (&[r"name~=|web\-1|"], true),
            (&[r#"name=="\x77\u0065b-1""#], true),
            (&["namespace=='default'"], true),
        ] {
            // An operator needs a value.
            if let Ok(filter) = Filter::parse(filters) {
                assert_eq!(filter.passes(&info()), passes, "{filters:?}");
            } else {
                assert_eq!(filters, ["labels.b=="]);
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_place() {
        let long = "a".repeat(LONGEST + 1);
        for (filter, at, reason) in [
            ("name=web", 4, "an operator"),
            ("name==", 6, "a value"),
            ("name==a b", 7, "a comma"),
            ("name==\"a", 6, "not closed"),
            (",", 0, "a field"),
            ("name,", 5, "a field"),
            ("a..b", 2, "a field"),
            ("name~=[", 7, "regex"),
            (&long, 0, "bytes"),
            ("name~=(a{1000}){1000}", 21, "size"),
        ] {
            let error = Filter::parse([filter]).unwrap_err();
            assert_eq!(error.at, at, "{error}");
            assert!(error.reason.contains(reason), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_filter_or_refused(text in "[a-z.,=!~\"'/|\\\\ ä]{0,24}") {
            if let Ok(filter) = Filter::parse([&text]) {
                filter.passes(&info());
            }
        }
    }
}
