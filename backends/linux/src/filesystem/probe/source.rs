//! Reading a device in pieces that may not be there.

use std::io::{self, Read, Seek, SeekFrom};

/// How much is read at once at the start of a device, in bytes: most signatures are there. The others are read one by one,
/// each a few bytes: to copy all that is in between costs more.
const START: usize = 8 << 10;

/// A device to read from, with its size.
pub(super) struct Source<'a, R> {
    device: &'a mut R,
    size: u64,
    /// What the device starts with; nothing if that cannot be read in one piece.
    start: [u8; START],
    /// How much of it there is.
    known: usize,
}

impl<'a, R: Read + Seek> Source<'a, R> {
    pub(super) fn new(device: &'a mut R) -> io::Result<Self> {
        let size = device.seek(SeekFrom::End(0))?;
        let mut source = Source {
            device,
            size,
            start: [0; START],
            known: 0,
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
        match part(&self.start[..self.known], offset, length) {
            Some(known) => Ok(Some(known)),
            None => self.read(offset, length),
        }
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
