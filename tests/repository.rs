//! What must hold for the files of the repository as text.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every source file and document of the repository.
fn files() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "corpus" {
                    directories.push(path);
                }
            } else if [".rs", ".md", ".sh", ".toml"]
                .iter()
                .any(|end| name.ends_with(end))
            {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 300, "only {} files were found", found.len());
    found
}

/// The ids at the beginning of the names of tests: `x03` of `root_x03_a_link`.
fn ids(text: &str) -> BTreeSet<String> {
    let names = text.split("fn ").skip(1);
    let named = names.filter_map(|rest| {
        let name = rest.trim_start_matches("root_").trim_start_matches("vm_");
        let (id, rest) = name.split_once('_')?;
        // A name of a test goes on; `u64_at` does not.
        let goes_on = rest.split('(').next()?.contains('_');
        let (letter, number) = id.split_at_checked(1)?;
        let is_id = "bfginouvxy".contains(letter)
            && matches!(number.len(), 1 | 2)
            && number.bytes().all(|byte| byte.is_ascii_digit());
        (is_id && goes_on).then(|| id.to_owned())
    });
    named.collect()
}

#[test]
fn each_id_in_the_name_of_a_test_is_explained() {
    let explained = include_str!("README.md");
    let mut used = BTreeSet::new();
    for path in files() {
        if path.extension().is_some_and(|extension| extension == "rs") {
            used.extend(ids(&fs::read_to_string(&path).unwrap()));
        }
    }
    assert!(used.len() > 60, "only {used:?} were found");
    let unexplained: Vec<&String> = used
        .iter()
        .filter(|id| {
            let line = |line: &str| {
                let cell = line
                    .strip_prefix("| ")
                    .and_then(|line| line.split(" |").next());
                cell.is_some_and(|ids| ids.split(", ").any(|one| one == id.as_str()))
            };
            !explained.lines().any(line)
        })
        .collect();
    assert!(
        unexplained.is_empty(),
        "tests/README.md does not explain {unexplained:?}"
    );
}

/// The threat model names tests, and not what once was one.
#[test]
fn each_test_that_the_threat_model_names_is_one() {
    let model = include_str!("../SECURITY.md");
    let (_, model) = model.split_once("## Threat model").unwrap();
    let cells = model.lines().filter_map(|line| line.rsplit('|').nth(1));
    let named: BTreeSet<&str> = cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    assert!(named.len() > 20, "only {named:?} were found");
    let sources = files().into_iter();
    let sources = sources.filter(|path| path.extension().is_some_and(|end| end == "rs"));
    let all: String = sources
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    for name in named {
        assert!(
            all.contains(&format!("fn {name}(")),
            "there is no test {name}"
        );
    }
}

#[test]
fn an_id_is_found_where_a_test_has_one() {
    let text =
        "fn o11_made_up() {}\n    async fn root_x03_a_link() {}\nfn u64_at() {}\nfn b1_a_frame()";
    let found: Vec<String> = ids(text).into_iter().collect();
    assert_eq!(found, ["b1", "o11", "x03"]);
}

#[test]
fn no_file_is_written_in_words_of_our_own() {
    // The field has words for these: timeout, retained, preflight, debug agent, pending.
    let words = [
        "patience", "impatien", "parked", "judging", "witness", "is owed",
    ];
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(file!());
    for path in files() {
        if path == own {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap().to_lowercase();
        for word in words {
            let line = text.lines().find(|line| line.contains(word));
            assert!(
                line.is_none(),
                "{}: {word}: {}",
                path.display(),
                line.unwrap_or_default()
            );
        }
    }
}
