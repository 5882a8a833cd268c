//! The numbers by which the peers tell errors apart.

use std::fmt;

use blockmount::ErrorKind;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The result of a request: zero, or the number of an error as in COM.
///
/// On the wire it is a signed number. It is compared by its 32 bits alone, so that a peer that has widened
/// it, with the sign or without, means the same.
///
/// The host compute service has its own numbers in two forms, `0x8037....` and `0xc037....`, depending on which of
/// its libraries they come through. [`is`](Self::is) and [`kind`](Self::kind) do not tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Hresult(u32);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $bits:literal;)*) => {
        impl Hresult {
            $($(#[$doc])* pub const $name: Hresult = Hresult($bits);)*
        }
    };
}

// From winerror.h; those from 0xC037_0101 on are the host compute service's own.
codes! {
    /// Success.
    OK = 0;
    /// The guest does not know the message, or not yet.
    NOT_IMPLEMENTED = 0x8000_4001;
    /// Some error; the message says which.
    FAIL = 0x8000_4005;
    /// There is no such file.
    FILE_NOT_FOUND = 0x8007_0002;
    /// There is no such directory, or no such drive.
    PATH_NOT_FOUND = 0x8007_0003;
    /// Access is denied.
    ACCESS_DENIED = 0x8007_0005;
    /// A handle that has been closed.
    INVALID_HANDLE = 0x8007_0006;
    /// A value that cannot be read.
    INVALID_DATA = 0x8007_000d;
    /// Another process has the file open.
    SHARING_VIOLATION = 0x8007_0020;
    /// Not supported on this device.
    NOT_SUPPORTED = 0x8007_0032;
    /// An argument is wrong.
    INVALID_ARGUMENT = 0x8007_0057;
    /// In use.
    BUSY = 0x8007_00aa;
    /// Already there.
    ALREADY_EXISTS = 0x8007_00b7;
    /// Written data was lost on its way to the disk (`ERROR_LOST_WRITEBEHIND_DATA`). Our agent says so of a tear-down that
    /// is done; the agent of hcsshim has no number for it.
    LOST_WRITES = 0x8007_0254;
    /// Not there.
    NOT_FOUND = 0x8007_0490;
    /// Not possible in this state.
    INVALID_STATE = 0x8037_0105;
    /// The VM or container has ended unexpectedly.
    UNEXPECTED_EXIT = 0xc037_0106;
    /// The VM or container was ended by force.
    TERMINATED = 0xc037_0107;
    /// The VM or container cannot be connected to.
    CONNECT_FAILED = 0xc037_0108;
    /// No answer in time.
    TIMEOUT = 0xc037_0109;
    /// The connection with the VM or container was closed.
    CONNECTION_CLOSED = 0xc037_010a;
    /// A message of unknown type.
    UNKNOWN_MESSAGE = 0xc037_010b;
    /// No common version of the protocol.
    UNSUPPORTED_PROTOCOL_VERSION = 0xc037_010c;
    /// A body that cannot be read.
    INVALID_JSON = 0xc037_010d;
    /// No such container.
    SYSTEM_NOT_FOUND = 0xc037_010e;
    /// The container is there already.
    SYSTEM_ALREADY_EXISTS = 0xc037_010f;
    /// The container has ended.
    SYSTEM_ALREADY_STOPPED = 0xc037_0110;
    /// The operation has been started and goes on.
    OPERATION_PENDING = 0xc037_0117;
    /// The operation was not done in time.
    OPERATION_TIMEOUT = 0xc037_0118;
    /// The host compute service is no longer there.
    SERVICE_DISCONNECT = 0xc037_011e;
}

/// What each number means to a caller, where the number alone says so.
const KINDS: [(Hresult, ErrorKind); 18] = [
    (Hresult::NOT_IMPLEMENTED, ErrorKind::Unsuitable),
    (Hresult::NOT_SUPPORTED, ErrorKind::Unsuitable),
    (Hresult::UNKNOWN_MESSAGE, ErrorKind::Unsuitable),
    (Hresult::UNSUPPORTED_PROTOCOL_VERSION, ErrorKind::Unsuitable),
    (Hresult::INVALID_ARGUMENT, ErrorKind::Invalid),
    (Hresult::INVALID_DATA, ErrorKind::Invalid),
    (Hresult::INVALID_JSON, ErrorKind::Invalid),
    (Hresult::BUSY, ErrorKind::Busy),
    (Hresult::SHARING_VIOLATION, ErrorKind::Busy),
    (Hresult::ALREADY_EXISTS, ErrorKind::Conflict),
    (Hresult::SYSTEM_ALREADY_EXISTS, ErrorKind::Conflict),
    (Hresult::LOST_WRITES, ErrorKind::LostWrites),
    (Hresult::NOT_FOUND, ErrorKind::NotFound),
    (Hresult::FILE_NOT_FOUND, ErrorKind::NotFound),
    (Hresult::PATH_NOT_FOUND, ErrorKind::NotFound),
    (Hresult::SYSTEM_NOT_FOUND, ErrorKind::NotFound),
    (Hresult::TIMEOUT, ErrorKind::Uncertain),
    (Hresult::OPERATION_TIMEOUT, ErrorKind::Uncertain),
];

impl Hresult {
    /// A result from its bits.
    pub const fn from_bits(bits: u32) -> Self {
        Hresult(bits)
    }

    /// The 32 bits.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether it is success.
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }

    /// Whether both mean the same, in either form that the host compute service has for its numbers.
    pub const fn is(self, other: Hresult) -> bool {
        self.folded() == other.folded()
    }

    const fn folded(self) -> u32 {
        match self.0 >> 16 {
            0x8037 => self.0 | 0x4000_0000,
            _ => self.0,
        }
    }

    /// What a caller can do about it, where the number alone says so.
    pub fn kind(self) -> Option<ErrorKind> {
        let known = KINDS.iter().find(|(number, _)| number.is(self));
        known.map(|(_, kind)| *kind)
    }
}

impl From<i32> for Hresult {
    /// A result as functions of Windows return it.
    fn from(result: i32) -> Self {
        Hresult(result.cast_unsigned())
    }
}

impl From<ErrorKind> for Hresult {
    /// The number that says most to a peer that knows only numbers.
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Uncertain => Hresult::TIMEOUT,
            ErrorKind::Busy => Hresult::BUSY,
            ErrorKind::Unsuitable => Hresult::NOT_SUPPORTED,
            ErrorKind::NotFound => Hresult::NOT_FOUND,
            ErrorKind::Conflict => Hresult::ALREADY_EXISTS,
            ErrorKind::LostWrites => Hresult::LOST_WRITES,
            ErrorKind::Invalid => Hresult::INVALID_ARGUMENT,
            _ => Hresult::FAIL,
        }
    }
}

impl fmt::Display for Hresult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

impl fmt::Debug for Hresult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hresult {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i32(self.0 as i32)
    }
}

impl<'de> Deserialize<'de> for Hresult {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = serde_json::Number::deserialize(deserializer)?;
        let wide = match (number.as_i64(), number.as_u64()) {
            (Some(signed), _) => signed as u64,
            (None, Some(unsigned)) => unsigned,
            _ => return Err(D::Error::custom(format!("{number} is not a result"))),
        };
        let (high, low) = ((wide >> 32) as u32, wide as u32);
        match (high, low >> 31) {
            (0, _) | (u32::MAX, 1) => Ok(Hresult(low)),
            _ => Err(D::Error::custom(format!("{number} has more than 32 bits"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_unsigned_and_widened_are_the_same() {
        for text in ["-2147023728", "2147943568", "18446744071562527888"] {
            let result: Hresult = serde_json::from_str(text).unwrap();
            assert_eq!(result, Hresult::NOT_FOUND, "{text}");
            assert_eq!(result.kind(), Some(ErrorKind::NotFound));
        }
        assert_eq!(
            serde_json::to_string(&Hresult::NOT_FOUND).unwrap(),
            "-2147023728"
        );
        for text in [
            "4294967296",
            "-4294967296",
            "1.5",
            "\"0\"",
            "9223372036854775807",
        ] {
            assert!(serde_json::from_str::<Hresult>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn both_forms_of_the_services_own_numbers_are_the_same() {
        let narrow = Hresult::from_bits(0x8037_0110);
        assert!(narrow.is(Hresult::SYSTEM_ALREADY_STOPPED) && narrow.is(narrow));
        assert_ne!(narrow, Hresult::SYSTEM_ALREADY_STOPPED);
        assert_eq!(
            Hresult::from_bits(0x8037_010e).kind(),
            Some(ErrorKind::NotFound)
        );
        // Other facilities have no second form.
        assert!(!Hresult::NOT_FOUND.is(Hresult::from_bits(0xc007_0490)));
        assert_eq!(Hresult::from(-2_147_023_728), Hresult::NOT_FOUND);
    }

    #[test]
    fn a_kind_survives_the_number_where_there_is_one() {
        use ErrorKind::*;
        let numbered = [
            Uncertain, Busy, Unsuitable, NotFound, Conflict, Invalid, LostWrites,
        ];
        for kind in numbered {
            assert_eq!(Hresult::from(kind).kind(), Some(kind));
        }
        for kind in [Gone, Full, Other] {
            assert_eq!(Hresult::from(kind), Hresult::FAIL);
        }
    }
}
