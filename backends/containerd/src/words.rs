//! Numbers and options in the words of a mount.

/// The prefix of options that are containerd's own, and no filesystem's.
pub(crate) const OWN: &str = "X-containerd.";

/// Whether an option is one of a transform, such as `mkfs`.
pub(crate) fn is_of_transform(option: &str, transform: &str) -> bool {
    let own = option.strip_prefix(OWN);
    let own = own.and_then(|own| own.strip_prefix(transform));
    own.is_some_and(|own| own.starts_with('.'))
}

/// A size as containerd takes it (`units.RAMInBytes`): `104857600`, `100MiB`, `1.5g`. Every unit is a power of 1,024.
pub(crate) fn bytes(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = text.split_at(digits);
    let whole: u64 = whole.parse().ok()?;
    let (fraction, unit) = match rest.strip_prefix('.') {
        None => ("", rest),
        Some(rest) => {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            rest.split_at(digits)
        }
    };
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let shift = match unit.strip_suffix('i').unwrap_or(unit) {
        "" if unit.is_empty() => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    let scale = 1_u128 << shift;
    let mut total = u128::from(whole).checked_mul(scale)?;
    if !fraction.is_empty() {
        // Nine digits are finer than a byte of a gibibyte; more are only read.
        let fraction = &fraction[..fraction.len().min(9)];
        let tenths = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        total += fraction.parse::<u128>().ok()? * scale / tenths;
    }
    u64::try_from(total).ok()
}

/// Whether this is a UUID as `mke2fs` and `mkfs.xfs` take it.
pub(crate) fn is_uuid(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    let lengths = groups.iter().map(|group| group.len());
    lengths.eq([8, 4, 4, 4, 12]) && groups.concat().bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The elements of a `lowerdir`, which colons separate, except those behind a backslash.
pub(crate) fn lower_directories(value: &str) -> Vec<String> {
    let mut directories = vec![String::new()];
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match character {
            ':' => directories.push(String::new()),
            character => {
                let taken = match character {
                    '\\' => characters.next().unwrap_or('\\'),
                    character => character,
                };
                let last = directories.len() - 1;
                directories[last].push(taken);
            }
        }
    }
    directories
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_containerd() {
        for (text, expected) in [
            ("104857600", Some(100 << 20)),
            ("100MiB", Some(100 << 20)),
            ("100mb", Some(100 << 20)),
            ("100 M", Some(100 << 20)),
            ("1.5GiB", Some(3 << 29)),
            ("1b", Some(1)),
            ("16P", Some(16 << 50)),
            ("", None),
            ("MiB", None),
            ("-1", None),
            ("1i", None),
            ("1 MiB ", None),
            ("1x", None),
            ("99999999999999999999", None),
            ("17179869184G", None),
        ] {
            assert_eq!(bytes(text), expected, "{text:?}");
        }
    }

    #[test]
    fn colons_behind_a_backslash_are_part_of_a_path() {
        assert_eq!(lower_directories("/a:/b"), ["/a", "/b"]);
        assert_eq!(lower_directories(r"/a\:b:/c\\d"), ["/a:b", r"/c\d"]);
        assert_eq!(lower_directories(":"), ["", ""]);
    }

    #[test]
    fn uuids_have_five_groups_of_digits() {
        assert!(is_uuid("550e8400-e29b-41d4-a716-446655440000"));
        for text in [
            "",
            "550e8400e29b41d4a716446655440000",
            "550e8400-e29b-41d4-a716-44665544000g",
        ] {
            assert!(!is_uuid(text), "{text:?}");
        }
    }
}
