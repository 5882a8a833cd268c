//! What QEMU says, line by line (QEMU's `docs/interop/qmp-spec`).

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

use super::error::one_line;

/// The longest event, in bytes. QEMU's are far below one KiB; a longer one is ignored, so that a queue of
/// events has a bounded size.
pub(super) const MAX_EVENT: usize = 64 << 10;

/// A version of QEMU, as in `7.2.22`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something that QEMU says unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `DEVICE_DELETED`.
    pub name: String,
    /// What it says; `null` if nothing. The fields are documented in QEMU's `qapi/*.json`.
    pub data: Value,
}

/// One line of QEMU, understood.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    Reply { id: u64, outcome: Outcome },
    Event(Event),
}

pub(super) type Outcome = Result<Value, Refusal>;

/// Why a command is refused, in QEMU's words.
#[derive(Debug, PartialEq, Deserialize)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) desc: String,
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: Qmp,
}

#[derive(Deserialize)]
struct Qmp {
    version: Versions,
}

#[derive(Deserialize)]
struct Versions {
    qemu: Version,
}

/// Reads the first line of a connection.
pub(super) fn greeting(line: &[u8]) -> Result<Version, String> {
    match serde_json::from_slice::<Greeting>(line) {
        Ok(greeting) => Ok(greeting.qmp.version.qemu),
        Err(error) => Err(format!(
            "the first line is no greeting: {}",
            one_line(&error)
        )),
    }
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    id: Value,
    // A command that returns nothing returns an empty object; `null` would be an answer as well.
    #[serde(default, rename = "return", deserialize_with = "present")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

/// Reads any later line.
pub(super) fn message(line: &[u8]) -> Result<Message, String> {
    let raw: Raw = serde_json::from_slice(line).map_err(|error| one_line(&error))?;
    let outcome = match (raw.answer, raw.error, raw.event) {
        (Some(answer), None, None) => Ok(answer),
        (None, Some(refusal), None) => Err(refusal),
        (None, None, Some(_)) if line.len() > MAX_EVENT => {
            return Err(format!("it is an event of {} bytes", line.len()));
        }
        (None, None, Some(name)) => {
            let data = raw.data;
            return Ok(Message::Event(Event { name, data }));
        }
        _ => return Err("it is neither an answer nor an event".to_owned()),
    };
    // Every command has a number of ours; without one it is the answer to a line that was no command.
    match raw.id.as_u64() {
        Some(id) => Ok(Message::Reply { id, outcome }),
        None => Err("it answers nothing that was asked".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Message, String> {
        message(value.to_string().as_bytes())
    }

    #[test]
    fn answers_refusals_and_events_are_told_apart() {
        let outcome = Ok(json!({}));
        assert_eq!(
            read(&json!({"return": {}, "id": 7})),
            Ok(Message::Reply { id: 7, outcome })
        );
        let outcome = Ok(Value::Null);
        assert_eq!(
            read(&json!({"return": null, "id": 7})),
            Ok(Message::Reply { id: 7, outcome })
        );
        let refusal = Refusal {
            class: "GenericError".to_owned(),
            desc: "no".to_owned(),
        };
        let outcome = Err(refusal);
        assert_eq!(
            read(&json!({"id": 7, "error": {"class": "GenericError", "desc": "no", "more": 1}})),
            Ok(Message::Reply { id: 7, outcome })
        );
        let event = Event {
            name: "STOP".to_owned(),
            data: Value::Null,
        };
        assert_eq!(
            read(&json!({"event": "STOP", "timestamp": {"seconds": 1}})),
            Ok(Message::Event(event))
        );
    }

    #[test]
    fn what_is_none_of_them_is_an_error() {
        for line in [
            json!({}),
            json!([]),
            json!({"return": {}}),
            json!({"return": {}, "id": "7"}),
            json!({"return": {}, "id": -7}),
            json!({"return": {}, "error": {"class": "", "desc": ""}, "id": 7}),
            json!({"return": {}, "event": "STOP", "id": 7}),
            json!({"event": "STOP", "data": "x".repeat(MAX_EVENT)}),
        ] {
            read(&line).unwrap_err();
        }
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        message(&deep).unwrap_err();
        greeting(b"{\"return\": {}}").unwrap_err();
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            text in r#"\{("(return|id|error|event|QMP|data)": ?(\{\}|[0-9]{1,20}|"x"|null|\[\]),?){0,4}\}"#,
        ) {
            for line in [&bytes[..], text.as_bytes()] {
                let _ = (message(line), greeting(line));
            }
        }
    }
}
