//! The logits after the last token of a sequence: numbers in host memory, or a row on the device that computed them. A row
//! stays there until somebody asks for its numbers; with it come the largest of them, which most draws can do with.

use std::cell::{Cell, OnceCell};

use super::device_bytes::DeviceBytes;
use crate::error::Result;
use crate::memory::{Buffer, as_bytes, as_bytes_mut, try_with_capacity};

/// Candidates there are at most.
pub const MAX_CANDIDATES: usize = 256;

/// The largest logits of a row, and what is known of all of it.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// Higher logits first, lower ids among equals; at most MAX_CANDIDATES. A logit that is not a number or negative infinity
    /// is none.
    pub tokens: &'a [u32],
    /// The tokens' logits.
    pub logits: &'a [f32],
    /// The sum over all tokens of `e^(logit - largest)`, each in f32 as in `cpu/kernels/math.rs`, added in f64; NaN adds nothing.
    /// Means nothing where the largest is not finite.
    pub total: f64,
    /// Whether all other logits are negative infinity, or not numbers.
    pub are_all: bool,
}

/// Where a pass leaves the logits of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsPlace {
    /// In the pass, to be copied from there.
    Pass,
    /// At this address on the device, `[vocab_size]` f32.
    Device(u64),
}

/// What a pass gives of the logits of a sequence.
#[derive(Clone, Copy, Debug)]
pub enum PassLogits<'a> {
    /// `[vocab_size]`
    Numbers(&'a [f32]),
    /// The logits are where the batch said; the largest of them.
    Candidates(Candidates<'a>),
}

/// The logits of one sequence, in memory that is reserved when this is made.
pub struct Logits(Memory);

enum Memory {
    Host(Buffer<f32>),
    Device(Rows),
}

/// Logits on a device.
struct Rows {
    /// `[vocab_size]` f32 each. A pass writes the next ones; where it fails the current ones are what they were.
    current: Box<dyn DeviceBytes>,
    next: Box<dyn DeviceBytes>,
    /// The current ones in host memory, once they were asked for; else there is room for them.
    fetched: OnceCell<Buffer<f32>>,
    room: Cell<Option<Buffer<f32>>>,
    row_bytes: usize,
    /// Candidates of the current ones, where a pass computed those.
    tokens: Vec<u32>,
    logits: Vec<f32>,
    total: f64,
    are_all: bool,
    are_known: bool,
}

impl Logits {
    /// In host memory. Fails with `OutOfMemory`.
    pub fn host(vocab_size: usize) -> Result<Logits> {
        Ok(Logits(Memory::Host(Buffer::zeroed("logits", vocab_size)?)))
    }

    /// On a device, in two rows of `[vocab_size]` f32. Fails with `OutOfMemory`.
    pub fn on_device(vocab_size: usize, [current, next]: [Box<dyn DeviceBytes>; 2]) -> Result<Logits> {
        Ok(Logits(Memory::Device(Rows {
            current,
            next,
            fetched: OnceCell::new(),
            row_bytes: vocab_size * size_of::<f32>(),
            room: Cell::new(Some(Buffer::zeroed("logits", vocab_size)?)),
            tokens: try_with_capacity("candidates", MAX_CANDIDATES)?,
            logits: try_with_capacity("candidates", MAX_CANDIDATES)?,
            total: 0.0,
            are_all: false,
            are_known: false,
        })))
    }

    /// Bytes they take on a device.
    pub fn device_bytes(&self) -> usize {
        match &self.0 {
            Memory::Host(_) => 0,
            Memory::Device(rows) => 2 * rows.row_bytes,
        }
    }

    /// Where a pass is to leave the next ones.
    pub fn place(&self) -> LogitsPlace {
        match &self.0 {
            Memory::Host(_) => LogitsPlace::Pass,
            Memory::Device(rows) => LogitsPlace::Device(rows.next.address()),
        }
    }

    /// Takes over what a pass left at `place`. Panics where that was another kind of place.
    pub fn take(&mut self, given: PassLogits) {
        match (&mut self.0, given) {
            (Memory::Host(numbers), PassLogits::Numbers(given)) => numbers.copy_from_slice(given),
            (Memory::Device(rows), PassLogits::Candidates(candidates)) => {
                std::mem::swap(&mut rows.current, &mut rows.next);
                rows.forget();
                rows.know(candidates);
            }
            _ => panic!("the logits are not where the pass left them"),
        }
    }

    /// All of them, `[vocab_size]`. The first call fetches them from the device, and fails as that does.
    pub fn numbers(&self) -> Result<&[f32]> {
        match &self.0 {
            Memory::Host(numbers) => Ok(numbers),
            Memory::Device(rows) => rows.numbers(),
        }
    }

    /// The largest of them; none where those in host memory are as near.
    pub fn candidates(&self) -> Option<Candidates<'_>> {
        match &self.0 {
            Memory::Host(_) => None,
            Memory::Device(rows) => rows.candidates(),
        }
    }

    /// Replaces them by what `write` makes of `[vocab_size]`. Fails as `write` and the device do.
    pub fn replace(&mut self, write: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
        match &mut self.0 {
            Memory::Host(numbers) => write(numbers),
            Memory::Device(rows) => {
                rows.forget();
                let room = rows.room.get_mut();
                room.as_mut().map_or(Ok(()), |numbers| {
                    write(numbers)?;
                    rows.current.write(as_bytes(numbers))
                })
            }
        }
    }

    /// Becomes a copy of logits of the same backend. Panics for those of another; fails as the device does.
    pub fn copy_from(&mut self, other: &Logits) -> Result<()> {
        match (&mut self.0, &other.0) {
            (Memory::Host(to), Memory::Host(from)) => to.copy_from_slice(from),
            (Memory::Device(to), Memory::Device(from)) => {
                to.forget();
                to.current.copy_from(from.current.address())?;
                from.candidates().into_iter().for_each(|candidates| to.know(candidates));
            }
            _ => panic!("the logits are not of the same backend"),
        }
        Ok(())
    }
}

impl Rows {
    /// The current ones become others.
    fn forget(&mut self) {
        if let Some(buffer) = self.fetched.take() {
            self.room.set(Some(buffer));
        }
        self.are_known = false;
    }

    fn know(&mut self, candidates: Candidates) {
        self.tokens.clear();
        self.tokens.extend_from_slice(candidates.tokens);
        self.logits.clear();
        self.logits.extend_from_slice(candidates.logits);
        self.total = candidates.total;
        self.are_all = candidates.are_all;
        self.are_known = true;
    }

    fn candidates(&self) -> Option<Candidates<'_>> {
        let Rows { tokens, logits, total, are_all, .. } = self;
        self.are_known.then_some(Candidates { tokens, logits, total: *total, are_all: *are_all })
    }

    fn numbers(&self) -> Result<&[f32]> {
        if let Some(mut buffer) = self.room.take() {
            let read = self.current.read(as_bytes_mut(&mut buffer));
            // The room is kept in any case.
            match read {
                Ok(()) => drop(self.fetched.set(buffer)),
                Err(_) => self.room.set(Some(buffer)),
            }
            read?;
        }
        Ok(self.fetched.get().map_or(&[], |buffer| buffer))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::error::{Error, Status};
    use crate::memory::view;

    /// Memory of no device: blocks by their addresses, and how often any was read. The next reading may fail.
    #[derive(Default)]
    struct Memories {
        blocks: Mutex<Vec<Vec<f32>>>,
        reads: AtomicU64,
        failing: AtomicU64,
    }

    struct Block(Arc<Memories>, u64);

    impl DeviceBytes for Block {
        fn address(&self) -> u64 {
            self.1
        }
        fn read(&self, out: &mut [u8]) -> Result<()> {
            self.0.reads.fetch_add(1, Ordering::Relaxed);
            if self.0.failing.swap(0, Ordering::Relaxed) > 0 {
                return Err(Error::new(Status::DeviceFailed, "a test"));
            }
            out.copy_from_slice(as_bytes(&self.0.blocks.lock().unwrap()[self.1 as usize]));
            Ok(())
        }
        fn write(&mut self, bytes: &[u8]) -> Result<()> {
            self.0.blocks.lock().unwrap()[self.1 as usize].copy_from_slice(view(bytes));
            Ok(())
        }
        fn copy_from(&mut self, address: u64) -> Result<()> {
            let mut blocks = self.0.blocks.lock().unwrap();
            blocks[self.1 as usize] = blocks[address as usize].clone();
            Ok(())
        }
    }

    impl Memories {
        fn logits(memories: &Arc<Memories>) -> Logits {
            let block = || -> Box<dyn DeviceBytes> {
                let mut blocks = memories.blocks.lock().unwrap();
                blocks.push(vec![-1.0; 3]);
                Box::new(Block(Arc::clone(memories), blocks.len() as u64 - 1))
            };
            Logits::on_device(3, [block(), block()]).unwrap()
        }

        /// What a pass does.
        fn pass(&self, logits: &mut Logits, numbers: [f32; 3], is_taken: bool) {
            let LogitsPlace::Device(address) = logits.place() else { panic!() };
            self.blocks.lock().unwrap()[address as usize] = numbers.to_vec();
            if is_taken {
                let candidates = Candidates { tokens: &[2], logits: &numbers[2..], total: 1.5, are_all: false };
                logits.take(PassLogits::Candidates(candidates));
            }
        }
    }

    #[test]
    fn a_row_is_fetched_once_and_only_when_it_is_asked_for() {
        let memories = Arc::default();
        let mut logits = Memories::logits(&memories);
        for round in 0..3 {
            let numbers = [0.0, 1.0, round as f32];
            memories.pass(&mut logits, numbers, true);
            assert_eq!(memories.reads.load(Ordering::Relaxed), round);
            assert_eq!(logits.candidates().unwrap().logits, [round as f32]);
            assert_eq!((logits.numbers().unwrap(), logits.numbers().unwrap()), (&numbers[..], &numbers[..]));
        }
    }

    #[test]
    fn what_a_pass_wrote_and_nobody_took_over_changes_nothing() {
        let memories = Arc::default();
        let mut logits = Memories::logits(&memories);
        memories.pass(&mut logits, [1.0, 2.0, 3.0], true);
        memories.pass(&mut logits, [7.0, 8.0, 9.0], false);
        assert_eq!(logits.candidates().unwrap().logits, [3.0]);
        assert_eq!(logits.numbers().unwrap(), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn after_a_reading_that_failed_another_may_succeed() {
        let memories: Arc<Memories> = Arc::default();
        let mut logits = Memories::logits(&memories);
        memories.pass(&mut logits, [1.0, 2.0, 3.0], true);
        memories.failing.store(1, Ordering::Relaxed);
        assert_eq!(logits.numbers().unwrap_err().status(), Status::DeviceFailed);
        assert_eq!(logits.numbers().unwrap(), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn copies_have_the_candidates_and_replaced_ones_have_none() {
        let memories = Arc::default();
        let (mut first, mut copy) = (Memories::logits(&memories), Memories::logits(&memories));
        memories.pass(&mut first, [1.0, 2.0, 3.0], true);
        memories.pass(&mut copy, [5.0, 5.0, 5.0], true);
        copy.numbers().unwrap();
        copy.copy_from(&first).unwrap();
        memories.pass(&mut first, [4.0, 4.0, 4.0], true);
        let candidates = copy.candidates().unwrap();
        assert_eq!((candidates.tokens, candidates.logits, candidates.total), (&[2][..], &[3.0][..], 1.5));
        assert_eq!(copy.numbers().unwrap(), [1.0, 2.0, 3.0]);
        let write = |numbers: &mut [f32]| {
            numbers.copy_from_slice(&[6.0, 7.0, 8.0]);
            Ok(())
        };
        copy.replace(write).unwrap();
        assert!(copy.candidates().is_none());
        assert_eq!(copy.numbers().unwrap(), [6.0, 7.0, 8.0]);
        first.copy_from(&copy).unwrap();
        assert!(first.candidates().is_none());
        assert_eq!(first.numbers().unwrap(), [6.0, 7.0, 8.0]);
    }
}
