//! Requests and replies of device-mapper as bytes. (Source: Linux, `include/uapi/linux/dm-ioctl.h`)

use std::ops::Range;

use blockmount::BackendError;

use crate::device::number::DeviceNumber;

/// The unit of tables, in bytes.
pub(crate) const SECTOR: u64 = 512;

/// The length of `struct dm_ioctl`, in bytes.
pub(super) const HEADER: usize = 312;
/// A name, less its NUL (`DM_NAME_LEN`). A UUID may be one longer.
pub(super) const LONGEST_NAME: usize = 127;
/// The flag of a table that cannot be written to.
pub(super) const READ_ONLY: u32 = 1 << 0;
/// The flag that asks for tables in place of their state.
pub(super) const STATUS_TABLE: u32 = 1 << 4;
/// The flag by which the kernel wipes its copy of a request: Linux 2.6.39.
pub(super) const SECURE: u32 = 1 << 15;
/// The flag of an answer that did not fit.
const BUFFER_FULL: u32 = 1 << 8;

/// Where the fields of the header are.
const LENGTH: usize = 12;
const START: usize = 16;
const COUNT: usize = 20;
const FLAGS: usize = 28;
const NUMBER: usize = 40;
const NAME: usize = 48;
const UUID: usize = 176;
const UUID_END: usize = UUID + 129;

/// The length of `struct dm_target_spec`, and where its fields are.
const SPEC: usize = 40;
const SPEC_LENGTH: usize = 8;
const SPEC_NEXT: usize = 20;
const SPEC_KIND: usize = 24;

/// A mapped device, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapped {
    /// Its name.
    pub name: String,
    /// Its number.
    pub number: DeviceNumber,
}

/// One range of a mapped device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where it starts in the mapped device, in sectors of 512 bytes.
    pub start: u64,
    /// How long it is, in sectors of 512 bytes.
    pub length: u64,
    /// What it is, such as `linear`.
    pub kind: String,
    /// What its kind needs to know, such as `259:1 8192`.
    pub parameters: String,
}

impl Target {
    /// A range of another device, in bytes.
    ///
    /// # Errors
    ///
    /// `Invalid` if it is empty or not of whole sectors.
    pub fn linear(backing: DeviceNumber, range: Range<u64>) -> Result<Target, BackendError> {
        let is_whole = range.start.is_multiple_of(SECTOR) && range.end.is_multiple_of(SECTOR);
        if range.is_empty() || !is_whole {
            let Range { start, end } = range;
            return Err(BackendError::invalid(format!(
                "bytes {start} to {end} are not a range of whole sectors of {SECTOR} bytes"
            )));
        }
        Ok(Target {
            start: 0,
            length: (range.end - range.start) / SECTOR,
            kind: "linear".to_owned(),
            parameters: format!("{backing} {}", range.start / SECTOR),
        })
    }

    /// Whether it may use any of a range of a device, in bytes. Where its kind is not known, naming the
    /// device is enough.
    pub(super) fn touches(&self, backing: DeviceNumber, range: &Range<u64>) -> bool {
        let device = backing.to_string();
        let words: Vec<&str> = self.parameters.split_ascii_whitespace().collect();
        if !words.contains(&&*device) {
            return false;
        }
        let [_, start] = words.as_slice() else {
            return true;
        };
        let (Ok(start), "linear") = (start.parse::<u64>(), &*self.kind) else {
            return true;
        };
        let start = start.saturating_mul(SECTOR);
        let end = start.saturating_add(self.length.saturating_mul(SECTOR));
        start < range.end && range.start < end
    }

    fn encode(&self, to: &mut Vec<u8>) {
        let begin = to.len();
        to.extend(self.start.to_ne_bytes());
        to.extend(self.length.to_ne_bytes());
        to.extend([0; SPEC - SPEC_LENGTH - 8]);
        let kind = &mut to[begin + SPEC_KIND..begin + SPEC - 1];
        let fits = self.kind.len().min(kind.len());
        kind[..fits].copy_from_slice(&self.kind.as_bytes()[..fits]);
        to.extend(self.parameters.as_bytes());
        to.push(0);
        to.resize(to.len().next_multiple_of(8), 0);
        let next = (to.len() - begin) as u32;
        to[begin + SPEC_NEXT..][..4].copy_from_slice(&next.to_ne_bytes());
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// About the device of a name, or about none.
    pub(super) fn new(name: &str) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[..4].copy_from_slice(&super::MAJOR_VERSION.to_ne_bytes());
        bytes[START..][..4].copy_from_slice(&(HEADER as u32).to_ne_bytes());
        let name = &name.as_bytes()[..name.len().min(LONGEST_NAME)];
        bytes[NAME..][..name.len()].copy_from_slice(name);
        Request(bytes)
    }

    pub(super) fn uuid(mut self, uuid: &str) -> Self {
        let uuid = &uuid.as_bytes()[..uuid.len().min(LONGEST_NAME)];
        self.0[UUID..][..uuid.len()].copy_from_slice(uuid);
        self
    }

    pub(super) fn flags(mut self, flags: u32) -> Self {
        self.0[FLAGS..][..4].copy_from_slice(&flags.to_ne_bytes());
        self
    }

    pub(super) fn target(mut self, target: &Target) -> Self {
        target.encode(&mut self.0);
        self.0[COUNT..][..4].copy_from_slice(&1u32.to_ne_bytes());
        self
    }

    /// The bytes for the kernel, with space for an answer.
    pub(super) fn into_buffer(mut self, space: usize) -> Vec<u8> {
        self.0.resize(self.0.len() + space, 0);
        let length = self.0.len() as u32;
        self.0[LENGTH..][..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// What was answered. Whatever it holds, reading it does not panic.
#[derive(Debug)]
pub(super) struct Reply(Vec<u8>);

impl Reply {
    /// Takes the buffer of a request.
    pub(super) fn new(buffer: Vec<u8>) -> Self {
        Reply(buffer)
    }

    pub(super) fn version(&self) -> u32 {
        u32_at(&self.0, 0).unwrap_or_default()
    }

    /// Whether the answer did not fit.
    pub(super) fn is_cut(&self) -> bool {
        u32_at(&self.0, FLAGS).is_some_and(|flags| flags & BUFFER_FULL != 0)
    }

    pub(super) fn number(&self) -> DeviceNumber {
        decode(u64_at(&self.0, NUMBER).unwrap_or_default())
    }

    /// The UUID of the device that was asked about; empty for one that has none.
    pub(super) fn uuid(&self) -> String {
        let field = self.0.get(..UUID_END).unwrap_or_default();
        string_at(field, UUID).unwrap_or_default()
    }

    fn data(&self) -> &[u8] {
        let start = u32_at(&self.0, START).unwrap_or_default() as usize;
        self.0.get(start..).unwrap_or_default()
    }

    /// The list of devices: each has its number, the distance to the next, and a name.
    pub(super) fn names(&self) -> Vec<Mapped> {
        let mut found = Vec::new();
        let mut rest = self.data();
        while let (Some(number), Some(next)) = (u64_at(rest, 0), u32_at(rest, 8)) {
            let Some(name) = string_at(rest, 12).filter(|name| !name.is_empty()) else {
                break;
            };
            found.push(Mapped {
                name,
                number: decode(number),
            });
            match rest.get(next as usize..) {
                Some(after) if next > 0 => rest = after,
                _ => break,
            }
        }
        found
    }

    /// The kinds of targets: each has the distance to the next, its version, and a name.
    pub(super) fn versions(&self) -> Vec<(String, [u32; 3])> {
        let mut found = Vec::new();
        let mut rest = self.data();
        let word = |rest: &[u8], index: usize| u32_at(rest, 4 * index);
        while let (Some(next), Some(name)) = (u32_at(rest, 0), string_at(rest, 16)) {
            let version = [1, 2, 3].map(|index| word(rest, index).unwrap_or_default());
            found.push((name, version));
            match rest.get(next as usize..) {
                Some(after) if next > 0 => rest = after,
                _ => break,
            }
        }
        found
    }

    /// The table of a device: unlike in requests, each entry has the distance of the next from the start.
    pub(super) fn targets(&self) -> Vec<Target> {
        let data = self.data();
        let count = u32_at(&self.0, COUNT).unwrap_or_default();
        let mut found = Vec::new();
        let mut at = 0;
        for _ in 0..count {
            let entry = data.get(at..).unwrap_or_default();
            let target = || {
                Some(Target {
                    start: u64_at(entry, 0)?,
                    length: u64_at(entry, SPEC_LENGTH)?,
                    kind: string_at(entry.get(..SPEC)?, SPEC_KIND)?,
                    parameters: string_at(entry, SPEC)?,
                })
            };
            let Some(target) = target() else { break };
            found.push(target);
            match u32_at(entry, SPEC_NEXT).map(|next| next as usize) {
                Some(next) if next > at => at = next,
                _ => break,
            }
        }
        found
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

/// The text up to a NUL, or to the end.
fn string_at(bytes: &[u8], at: usize) -> Option<String> {
    let text = bytes.get(at..)?.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}

/// Takes a number apart as the kernel puts it together (`huge_encode_dev`).
fn decode(number: u64) -> DeviceNumber {
    let (low, high) = (number & 0xff, (number >> 12) & 0xffff_ff00);
    DeviceNumber {
        major: ((number >> 8) & 0xfff) as u32,
        minor: (low | high) as u32,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PMEM: DeviceNumber = DeviceNumber {
        major: 259,
        minor: 1,
    };

    #[test]
    fn a_range_of_four_mebibytes_is_this_table() {
        let target = Target::linear(PMEM, 4_194_304..5_246_976).unwrap();
        assert_eq!((target.start, target.length), (0, 2056));
        assert_eq!(target.parameters, "259:1 8192");
        for bad in [
            0..0,
            512..512,
            1..512,
            0..513,
            Range {
                start: 1024,
                end: 512,
            },
        ] {
            assert!(Target::linear(PMEM, bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let target = Target::linear(PMEM, 4_194_304..5_246_976).unwrap();
        let buffer = Request::new("name")
            .uuid("BLKMNT-x")
            .flags(READ_ONLY)
            .target(&target)
            .into_buffer(100);
        assert_eq!(buffer.len(), HEADER + SPEC + 16 + 100);
        assert_eq!(u32_at(&buffer, LENGTH), Some(buffer.len() as u32));
        assert_eq!(
            (
                u32_at(&buffer, 0),
                u32_at(&buffer, START),
                u32_at(&buffer, COUNT)
            ),
            (Some(4), Some(312), Some(1))
        );
        assert_eq!(u32_at(&buffer, FLAGS), Some(1));
        assert_eq!(string_at(&buffer, NAME).unwrap(), "name");
        assert_eq!(string_at(&buffer, UUID).unwrap(), "BLKMNT-x");
        let spec = &buffer[HEADER..];
        assert_eq!(
            (u64_at(spec, 0), u64_at(spec, 8), u32_at(spec, 20)),
            (Some(0), Some(2056), Some(56))
        );
        assert_eq!(string_at(spec, 24).unwrap(), "linear");
        assert_eq!(string_at(spec, 40).unwrap(), "259:1 8192");
    }

    #[test]
    fn ranges_touch_where_they_overlap() {
        let target = Target::linear(PMEM, 4096..8192).unwrap();
        for (range, touches) in [
            (0..4096, false),
            (0..4097, true),
            (8191..9000, true),
            (8192..9000, false),
        ] {
            assert_eq!(target.touches(PMEM, &range), touches, "{range:?}");
        }
        let other = DeviceNumber {
            major: 259,
            minor: 11,
        };
        assert!(!target.touches(other, &(0..u64::MAX)));
        let crypt = Target {
            kind: "crypt".into(),
            parameters: "aes key 0 259:1 0".into(),
            ..target
        };
        assert!(crypt.touches(PMEM, &(0..1)) && !crypt.touches(other, &(0..1)));
    }

    #[test]
    fn reads_a_list_and_a_table() {
        let mut data = Vec::new();
        for (number, next, name) in [(0xfe00u64, 16u32, "one\0"), (0x10fe05, 0, "two\0")] {
            data.extend(number.to_ne_bytes());
            data.extend(next.to_ne_bytes());
            data.extend(name.as_bytes());
            data.resize(data.len().next_multiple_of(8), 0);
        }
        let mut bytes = Request::new("").0;
        bytes.extend(data);
        let names = Reply::new(bytes).names();
        let found: Vec<String> = names
            .iter()
            .map(|it| format!("{} {}", it.name, it.number))
            .collect();
        assert_eq!(found, ["one 254:0", "two 254:261"]);
        assert_eq!(Reply::new(Request::new("").into_buffer(64)).names(), []);

        let mut bytes = Request::new("").0;
        for (next, version, name) in [
            (24u32, [1u32, 9, 0], "verity\0\0"),
            (0, [1, 4, 2], "linear\0\0"),
        ] {
            bytes.extend(next.to_ne_bytes());
            bytes.extend(version.iter().flat_map(|part| part.to_ne_bytes()));
            bytes.extend(name.as_bytes());
        }
        let expected = [
            ("verity".to_owned(), [1, 9, 0]),
            ("linear".to_owned(), [1, 4, 2]),
        ];
        assert_eq!(Reply::new(bytes).versions(), expected);

        let targets = [0, 8].map(|start| Target {
            start,
            length: 8,
            kind: "linear".into(),
            parameters: format!("8:0 {start}"),
        });
        let mut request = Request::new("x");
        for target in &targets {
            request = request.target(target);
        }
        request.0[COUNT] = 2;
        assert_eq!(Reply::new(request.into_buffer(0)).targets(), targets);
    }

    proptest! {
        #[test]
        fn no_reply_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600), count in 0u32..4, start in 0u32..700) {
            let reply = Reply::new(bytes.clone());
            let _ = (reply.version(), reply.is_cut(), reply.number(), reply.names(), reply.targets(), reply.versions());
            let mut near = Request::new("x").0;
            near[START..][..4].copy_from_slice(&start.to_ne_bytes());
            near[COUNT..][..4].copy_from_slice(&count.to_ne_bytes());
            near.extend(bytes);
            let reply = Reply::new(near);
            prop_assert!(reply.targets().len() <= 4);
            let _ = reply.names();
        }

        #[test]
        fn a_table_survives_the_way(start: u64, length: u64, kind in "[a-z]{1,15}", parameters in "[!-~ ]{0,200}") {
            let target = Target { start, length, kind, parameters };
            let reply = Reply::new(Request::new("x").target(&target).into_buffer(8));
            prop_assert_eq!(reply.targets(), [target]);
        }

        #[test]
        fn touching_never_panics(parameters in ".{0,40}", length: u64, start: u64, end: u64) {
            let target = Target { start: 0, length, kind: "linear".into(), parameters: format!("259:1 {parameters}") };
            let _ = target.touches(PMEM, &(start..end));
        }
    }
}
