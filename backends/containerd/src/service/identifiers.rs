//! What names, namespaces and labels may be.

use std::collections::BTreeMap;

use tonic::Status;

/// The longest namespace or name of a virtual machine, in bytes. (containerd, `pkg/identifiers`)
const LONGEST_IDENTIFIER: usize = 76;
/// The longest name of an activation, in bytes: containerd has none, and its own are below this.
const LONGEST_NAME: usize = 1024;
/// The longest label, key and value together, in bytes. (containerd, `pkg/labels`)
const LONGEST_LABEL: usize = 4096;
/// The labels of one activation, in bytes. containerd has no such limit; clients take answers of 4 MiB where nothing else is said
/// (grpc, `max_receive_message_length`).
const LONGEST_LABELS: usize = 1 << 20;

/// Whether it is letters and digits, with single `.`, `-` or `_` between them.
pub(super) fn is_identifier(text: &str) -> bool {
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|c| c.is_ascii_alphanumeric());
    text.len() <= LONGEST_IDENTIFIER && text.split(['.', '-', '_']).all(is_word)
}

pub(super) fn check_namespace(namespace: &str) -> Result<(), Status> {
    match is_identifier(namespace) {
        true => Ok(()),
        false => Err(Status::invalid_argument(
            "a namespace is up to 76 letters and digits, with single '.', '-' or '_' between them",
        )),
    }
}

pub(super) fn check_name(name: &str) -> Result<(), Status> {
    let fits = (1..=LONGEST_NAME).contains(&name.len());
    match fits && !name.contains(char::is_control) {
        true => Ok(()),
        false => Err(Status::invalid_argument(
            "the name of an activation has 1 to 1,024 bytes and no control characters",
        )),
    }
}

pub(super) fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), Status> {
    for (key, value) in labels {
        if key.is_empty() || key.len() + value.len() > LONGEST_LABEL {
            return Err(Status::invalid_argument(
                "a label has a key, and at most 4,096 bytes with its value",
            ));
        }
    }
    let bytes = |(key, value): (&String, &String)| key.len() + value.len();
    if labels.iter().map(bytes).sum::<usize>() > LONGEST_LABELS {
        return Err(Status::invalid_argument(
            "the labels of an activation have at most 1,048,576 bytes together",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_those_of_containerd() {
        for namespace in ["default", "k8s.io", "a-b_c.9", "0"] {
            assert!(check_namespace(namespace).is_ok(), "{namespace}");
        }
        let long = "a".repeat(77);
        for namespace in ["", ".a", "a.", "a..b", "a/b", "ä", &long] {
            assert!(check_namespace(namespace).is_err(), "{namespace}");
        }
    }
}
