//! Reading a device in pieces that may not be there.

use std::io::{self, Read, Seek, SeekFrom};

/// How much is read at once at the start of a device, in bytes: most signatures are there. The others are read one by one,
/// each a few bytes: to copy all that is in between costs more.
const START: usize = 8 << 10;

/// Where several signatures are beside each other, and so are read together: where from, and how many bytes. The first has
/// those of discs, the second the last one of swap space and the superblock of a btrfs.
const TOGETHER: [(u64, usize); 2] = [(32 << 10, 2 << 10), ((64 << 10) - 10, 10 + (4 << 10))];

/// A device to read from, with its size.
pub(super) struct Source<'a, R> {
    device: &'a mut R,
    size: u64,
    /// What the device starts with; nothing if that cannot be read in one piece.
    start: [u8; START],
    /// How much of it there is.
    known: usize,
    /// What was read together.
    together: [Option<Vec<u8>>; TOGETHER.len()],
}

impl<'a, R: Read + Seek> Source<'a, R> {
    pub(super) fn new(device: &'a mut R) -> io::Result<Self> {
        let size = device.seek(SeekFrom::End(0))?;
        let mut source = Source {
            device,
            size,
            start: [0; START],
            known: 0,
            together: Default::default(),
        };
        let known = size.min(START as u64) as usize;
        source.device.rewind()?;
        // Of a device with a bad block whatever lies beside it is read all the same, piece by piece.
        if source.device.read_exact(&mut source.start[..known]).is_ok() {
            source.known = known;
        }
        Ok(source)
    }

    /// The size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The bytes at an offset; nothing unless all of them are on the device.
    pub(super) fn bytes(&mut self, offset: u64, length: usize) -> io::Result<Option<Bytes>> {
        let fits = offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= self.size);
        if !fits {
            return Ok(None);
        }
        if let Some(known) = part(&self.start[..self.known], offset, length) {
            return Ok(Some(known));
        }
        for (number, (from, size)) in TOGETHER.into_iter().enumerate() {
            let Some(inside) = offset.checked_sub(from).filter(|at| *at < size as u64) else {
                continue;
            };
            let known = &mut self.together[number];
            if known.is_none() {
                self.device.seek(SeekFrom::Start(from))?;
                let mut bytes = vec![0; size];
                // As at the start: what cannot be read in one piece is read piece by piece.
                *known = Some(
                    self.device
                        .read_exact(&mut bytes)
                        .map_or(Vec::new(), |()| bytes),
                );
            }
            let known = known.as_deref().unwrap_or_default();
            if let Some(known) = part(known, inside, length) {
                return Ok(Some(known));
            }
        }
        self.read(offset, length)
    }

    fn read(&mut self, offset: u64, length: usize) -> io::Result<Option<Bytes>> {
        self.device.seek(SeekFrom::Start(offset))?;
        let mut bytes = vec![0; length];
        match self.device.read_exact(&mut bytes) {
            Ok(()) => Ok(Some(Bytes(bytes))),
            // The device has shrunk since.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn part(whole: &[u8], from: u64, length: usize) -> Option<Bytes> {
    let from = usize::try_from(from).ok()?;
    let part = whole.get(from..from.checked_add(length)?)?;
    Some(Bytes(part.to_vec()))
}

/// How often what does not fit its checksum is read in all. Of the superblocks of filesystems under heavy writes, about one
/// in a hundred is read while it changes.
const ATTEMPTS: usize = 16;

impl<R: Read + Seek> Source<'_, R> {
    /// The bytes at an offset, if they are what is looked for and their checksum fits. A superblock of a mounted
    /// filesystem may change while it is read, and then fits when it is read again.
    pub(super) fn checked(
        &mut self,
        offset: u64,
        length: usize,
        is_it: impl Fn(&Bytes) -> bool,
        fits: impl Fn(&Bytes) -> bool,
    ) -> io::Result<Option<Bytes>> {
        let mut found = self.bytes(offset, length)?;
        for _ in 1..ATTEMPTS {
            let Some(bytes) = found.filter(&is_it) else {
                return Ok(None);
            };
            if fits(&bytes) {
                return Ok(Some(bytes));
            }
            std::thread::yield_now();
            found = self.read(offset, length)?;
        }
        Ok(found.filter(|bytes| is_it(bytes) && fits(bytes)))
    }
}

/// Bytes whose fields are read by offset. A field that is not inside reads as zeros.
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Bytes {
    pub(super) fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = at.checked_add(N).and_then(|end| self.0.get(at..end));
        field
            .and_then(|field| field.try_into().ok())
            .unwrap_or([0; N])
    }

    pub(super) fn has(&self, at: usize, signature: &[u8]) -> bool {
        self.0
            .get(at..)
            .is_some_and(|rest| rest.starts_with(signature))
    }

    pub(super) fn le16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn le32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(super) fn le64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    pub(super) fn be16(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    pub(super) fn be32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    pub(super) fn be64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device of zeros that notes where it is read, and refuses what overlaps a bad place.
    #[derive(Default)]
    struct Noted {
        at: u64,
        reads: Vec<(u64, usize)>,
        bad: Option<u64>,
    }

    impl Read for Noted {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let end = self.at.saturating_add(buffer.len() as u64);
            if self.bad.is_some_and(|bad| (self.at..end).contains(&bad)) {
                return Err(io::Error::other("a bad block"));
            }
            self.reads.push((self.at, buffer.len()));
            buffer.fill(self.at as u8);
            self.at = end;
            Ok(buffer.len())
        }
    }

    impl Seek for Noted {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.at = match to {
                SeekFrom::Start(at) => at,
                SeekFrom::End(by) => (1_u64 << 20).saturating_add_signed(by),
                SeekFrom::Current(by) => self.at.saturating_add_signed(by),
            };
            Ok(self.at)
        }
    }

    fn read_at(device: &mut Noted, places: &[(u64, usize)]) -> Vec<(u64, usize)> {
        let mut source = Source::new(device).unwrap();
        for (offset, length) in places {
            let bytes = source.bytes(*offset, *length).unwrap().unwrap();
            assert_eq!(bytes.0.len(), *length);
        }
        device.reads.clone()
    }

    #[test]
    fn what_is_beside_each_other_is_read_once() {
        let places = [
            (32_768, 7),
            (32_768, 2048),
            (65_536, 4096),
            (65_526, 10),
            (40_960, 7),
        ];
        let reads = read_at(&mut Noted::default(), &places);
        let expected = [(0, 8192), (32_768, 2048), (65_526, 4106), (40_960, 7)];
        assert_eq!(reads, expected);
    }

    #[test]
    fn beside_a_bad_block_each_piece_is_read_alone() {
        let mut device = Noted {
            bad: Some(34_000),
            ..Noted::default()
        };
        let reads = read_at(&mut device, &[(32_768, 7), (32_768, 9)]);
        assert_eq!(reads, [(0, 8192), (32_768, 7), (32_768, 9)]);
        let mut source = Source::new(&mut device).unwrap();
        assert!(source.bytes(33_990, 20).is_err());
    }
}
