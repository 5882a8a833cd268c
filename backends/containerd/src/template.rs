//! Templates in the words of a mount, as `format/` fills them in: a small part of Go's `text/template`.

use crate::plan::Step;

/// The longest text that a template may become, in bytes: `overlay` in a long list is longer than it looks.
pub(crate) const MAX_FILLED: usize = 1 << 20;

const FUNCTIONS: &str =
    "templates are {{ source N }}, {{ target N }}, {{ mount N }} and {{ overlay FIRST LAST }}";

/// Fills in a text with what the earlier mounts are.
pub(crate) fn fill(text: &str, earlier: &[Step]) -> Result<String, String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("{{") {
        let (before, after) = (&rest[..at], &rest[at + 2..]);
        let Some(end) = after.find("}}") else {
            return Err(format!("a template is not closed in {text:?}"));
        };
        let (mut inside, mut behind, mut before) = (&after[..end], &after[end + 2..], before);
        // A minus beside a brace takes out the blanks outside of it.
        if let Some(trimmed) = inside.strip_prefix("- ") {
            (inside, before) = (trimmed, before.trim_end());
        }
        if let Some(trimmed) = inside.strip_suffix(" -") {
            (inside, behind) = (trimmed, behind.trim_start());
        }
        filled.push_str(before);
        filled.push_str(&value(inside.trim(), earlier)?);
        if filled.len() > MAX_FILLED {
            return Err(format!("a template becomes longer than {MAX_FILLED} bytes"));
        }
        rest = behind;
    }
    filled.push_str(rest);
    Ok(filled)
}

fn value(call: &str, earlier: &[Step]) -> Result<String, String> {
    let words: Vec<&str> = call.split_whitespace().collect();
    let one = |number| Ok(&earlier[index(number, earlier.len())?]);
    let mount_point = |step: &Step| step.mount_point.display().to_string();
    match words[..] {
        ["source", number] => one(number).map(|step| step.mount.source.clone()),
        ["target", number] => one(number).map(|step| step.mount.target.clone()),
        ["mount", number] => one(number).map(mount_point),
        ["overlay", first, last] => {
            let index = |number| index(number, earlier.len());
            let (first, last) = (index(first)?, index(last)?);
            let between = &earlier[first.min(last)..=first.max(last)];
            let mut points: Vec<String> = between.iter().map(mount_point).collect();
            if first > last {
                points.reverse();
            }
            Ok(points.join(":"))
        }
        _ => Err(format!("{{{{ {call} }}}} is unknown; {FUNCTIONS}")),
    }
}

/// The number of one of so many mounts.
fn index(number: &str, count: usize) -> Result<usize, String> {
    let index = number
        .parse()
        .map_err(|_| format!("{number:?} is no number of a mount; {FUNCTIONS}"))?;
    match index < count {
        true => Ok(index),
        false if count == 0 => Err(format!(
            "a template names mount {index}, and none comes before"
        )),
        false => Err(format!(
            "a template names mount {index}; those before are 0 to {}",
            count - 1
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Action, Mount, Overlay};

    fn filled(text: &str) -> Result<String, String> {
        let step = |n: usize| Step {
            mount: Mount {
                source: format!("/source/{n}"),
                target: n.to_string(),
                ..Mount::default()
            },
            mount_point: format!("/mp/{n}").into(),
            directories: Vec::new(),
            action: Action::Overlay(Overlay {
                lower: Vec::new(),
                scratch: None,
                options: Vec::new(),
            }),
        };
        let earlier: Vec<Step> = (0..5).map(step).collect();
        fill(text, &earlier)
    }

    #[test]
    fn the_functions_are_those_of_containerd() {
        for (text, expected) in [
            ("", ""),
            ("/no/template", "/no/template"),
            ("{{ mount 0 }}/upper", "/mp/0/upper"),
            ("{{mount 4}}{{ target 1 }}", "/mp/41"),
            ("{{ source 3 }}", "/source/3"),
            (
                "lowerdir={{ overlay 0 4 }}",
                "lowerdir=/mp/0:/mp/1:/mp/2:/mp/3:/mp/4",
            ),
            (
                "lowerdir={{ overlay 4 1 }}",
                "lowerdir=/mp/4:/mp/3:/mp/2:/mp/1",
            ),
            ("{{ overlay 2 2 }}", "/mp/2"),
            ("a  {{- mount 0 -}}  b", "a/mp/0b"),
            ("}}", "}}"),
        ] {
            assert_eq!(filled(text).as_deref(), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (text, reason) in [
            (
                "{{ mount 5 }}",
                "a template names mount 5; those before are 0 to 4",
            ),
            ("{{ mount -1 }}", "\"-1\" is no number"),
            ("{{ mount }}", "{{ mount }} is unknown"),
            ("{{ overlay 0 9 }}", "names mount 9"),
            ("{{ mount 0", "is not closed"),
            ("{{ printf \"%s\" 1 }}", "is unknown"),
            ("{{ mount 99999999999999999999 }}", "is no number"),
        ] {
            let said = filled(text).unwrap_err();
            assert!(said.contains(reason), "{text:?}: {said}");
        }
    }

    #[test]
    fn a_template_cannot_grow_without_end() {
        let text = "{{ overlay 0 4 }}".repeat(MAX_FILLED / 20);
        assert!(filled(&text).unwrap_err().contains("longer than"));
    }
}
