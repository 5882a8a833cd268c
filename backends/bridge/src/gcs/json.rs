//! JSON as Go writes and reads it, because the peers are written in Go.
//!
//! Written: fields in the order of their struct, zero values left out where the peer leaves them out.
//! The host ends a body with a line feed; the guest has none, and escapes what HTML would
//! misread. Read: either; keys in any case, unknown keys skipped, `null` and absent are zero.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{
    DeserializeOwned, Deserializer, Error as _, IntoDeserializer, Unexpected, Visitor,
};
use serde::{Serialize, forward_to_deserialize_any};
use serde_json::{Error, Value};

/// Which end of the bridge writes a body; they differ in white space and escapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Writer {
    /// The host: a line feed at the end.
    Host,
    /// The guest: `<`, `>` and `&` escaped.
    Guest,
}

/// Writes a body as the peers write it, byte for byte.
///
/// # Panics
///
/// Never for the [messages](crate::gcs::messages) of this crate; for a type that JSON has no form for.
pub fn encode<T: Serialize + ?Sized>(body: &T, writer: Writer) -> Vec<u8> {
    let mut text = serde_json::to_string(body).expect("a message has a form in JSON");
    // None of these can be outside of a string, so replacing is escaping.
    let escape = |text: String, c: char| match text.contains(c) {
        true => text.replace(c, &format!("\\u{:04x}", u32::from(c))),
        false => text,
    };
    for separator in ['\u{2028}', '\u{2029}'] {
        text = escape(text, separator);
    }
    match writer {
        Writer::Host => text.push('\n'),
        Writer::Guest => text = ['<', '>', '&'].into_iter().fold(text, escape),
    }
    text.into_bytes()
}

/// Reads a body as the peers read it.
///
/// # Errors
///
/// If it is no object in JSON, or a value in it has another type or does not fit.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    match serde_json::from_str(&String::from_utf8_lossy(body))? {
        Value::Null => Err(Error::invalid_type(Unexpected::Unit, &"an object")),
        value => decode_value(value),
    }
}

/// As [`decode`], for a part of a body.
///
/// # Errors
///
/// As for [`decode`].
pub fn decode_value<T: DeserializeOwned>(value: Value) -> Result<T, Error> {
    T::deserialize(Go(value))
}

/// A value that is read by Go's rules.
struct Go(Value);

/// The fields of an object by the names they have here.
fn fields_of(
    object: serde_json::Map<String, Value>,
    fields: &[&'static str],
) -> Vec<(&'static str, Go)> {
    let mut found: Vec<(&'static str, Go)> = Vec::new();
    // The exact name is stronger than one in another case.
    let (exact, folded): (Vec<_>, Vec<_>) = object
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .partition(|(key, _)| fields.contains(&key.as_str()));
    for (key, value) in exact.into_iter().chain(folded) {
        let name = fields.iter().find(|name| name.eq_ignore_ascii_case(&key));
        if let Some(name) = name
            && found.iter().all(|(known, _)| known != name)
        {
            found.push((name, Go(value)));
        }
    }
    found
}

impl<'de> Deserializer<'de> for Go {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.0.deserialize_any(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let object = match self.0 {
            Value::Object(object) => object,
            Value::Null => serde_json::Map::new(),
            // A list would be taken for the fields in their order.
            Value::Array(_) => return Err(Error::invalid_type(Unexpected::Seq, &visitor)),
            other => return other.deserialize_any(visitor),
        };
        visitor.visit_map(MapDeserializer::new(fields_of(object, fields).into_iter()))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(items) => {
                visitor.visit_seq(SeqDeserializer::new(items.into_iter().map(Go)))
            }
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct tuple tuple_struct map identifier ignored_any
    }
}

impl IntoDeserializer<'_, Error> for Go {
    type Deserializer = Go;

    fn into_deserializer(self) -> Go {
        self
    }
}

/// Whether Go would leave the value out under `omitempty`; for `skip_serializing_if`.
pub fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Default, Deserialize)]
    #[serde(default, rename_all = "PascalCase")]
    struct Inner {
        lun: u8,
    }

    #[derive(Debug, PartialEq, Default, Deserialize)]
    #[serde(default, rename_all = "PascalCase")]
    struct Outer {
        inner: Option<Inner>,
        many: Vec<Inner>,
        name: String,
        raw: Value,
    }

    #[test]
    fn keys_fold_at_every_depth_and_null_is_zero() {
        let outer: Outer = decode(
            br#"{"inner":{"LUN":7,"x":[1]},"MANY":[{"lUn":1},{}],"nAme":null,"raw":{"KeepMe":1}}"#,
        )
        .unwrap();
        assert_eq!(outer.inner, Some(Inner { lun: 7 }));
        assert_eq!(outer.many, [Inner { lun: 1 }, Inner { lun: 0 }]);
        assert_eq!(outer.raw["KeepMe"], 1);
        assert_eq!(
            decode_value::<Outer>(Value::Null).unwrap(),
            Outer::default()
        );
    }

    #[test]
    fn the_exact_key_wins() {
        for body in [r#"{"Lun":1,"lun":2}"#, r#"{"lun":2,"Lun":1}"#] {
            assert_eq!(decode::<Inner>(body.as_bytes()).unwrap(), Inner { lun: 1 });
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        for body in [
            "",
            "{",
            "null",
            "[]",
            "[1]",
            "7",
            r#"{"Lun":256}"#,
            r#"{"Lun":-1}"#,
            r#"{"Lun":"7"}"#,
            "{}{}",
        ] {
            assert!(decode::<Inner>(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn each_end_has_its_escapes() {
        let text = "<&>\u{2028}";
        assert_eq!(encode(text, Writer::Host), b"\"<&>\\u2028\"\n");
        assert_eq!(
            encode(text, Writer::Guest),
            br#""\u003c\u0026\u003e\u2028""#
        );
        for writer in [Writer::Host, Writer::Guest] {
            assert_eq!(decode::<String>(&encode(text, writer)).unwrap(), text);
        }
    }
}
