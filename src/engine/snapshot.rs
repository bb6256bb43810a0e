//! A session as bytes, to go on with in another process. All numbers are little-endian; the layout is this file.
//!
//! `magic, version, bytes of all, fingerprint of the model`, then the session's options, its sampling, its tokens, the logits
//! and routes of the last, expert masks and biases, the grammar with the tokens it has accepted, the keys and values of the
//! tokens that were run, page by page, and last a checksum (xxh3, 64 bits) of everything before it. What is read is checked
//! against the model before it is used: a snapshot is data from outside.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::experts::ExpertControl;
use super::model::Model;
use super::options::{Overflow, SessionOptions};
use super::sample::{LogitBias, Sampling};
use super::sequence::Sequence;
use super::session::{Session, new_pass};
use crate::backend::KvDtype;
use crate::backend::gates::number_of;
use crate::backend::kv::{KvGeometry, KvPage, PAGE_TOKENS, copy_positions_in, copy_positions_out};
use crate::backend::ops::NO_EXPERT;
use crate::error::{Error, Result, Status};
use crate::memory::{as_bytes, as_bytes_mut, try_with_capacity};
use crate::text::grammar::{Grammar, GrammarKind, GrammarState};

const MAGIC: [u8; 8] = *b"GEMMOE\x1aS";
/// The format this file writes, and the only one it reads.
const VERSION: u32 = 1;
/// Magic, version and length, which are looked at before the checksum.
const PREFIX_BYTES: usize = 20;
const CHECKSUM_BYTES: usize = 8;
/// No session gets there, and positions after it can still be counted.
const MAX_DROPPED: u64 = 1 << 62;

impl Session {
    /// Bytes a snapshot takes now.
    pub fn snapshot_bytes(&self) -> usize {
        self.bytes_of(&State::of(&self.sequence))
    }

    fn bytes_of(&self, state: &State) -> usize {
        let mut sink = Sink { bytes: None, length: 0 };
        // Nothing is copied, so nothing fails.
        write(&self.sequence, state, 0, &mut sink).ok();
        sink.length + CHECKSUM_BYTES
    }

    /// Writes a snapshot to `bytes`, as many as `snapshot_bytes` says. It holds all that decides what comes next: tokens,
    /// keys and values, sampling and its random numbers, masks, biases, grammar. Statistics, metrics and waiting routes stay. Fails
    /// with `BufferTooSmall`, and as the device does.
    pub fn snapshot(&self, bytes: &mut [u8]) -> Result<()> {
        let state = State::of(&self.sequence);
        let needed = self.bytes_of(&state);
        if bytes.len() != needed {
            let text = format!("a snapshot takes {needed} bytes, there is room for {}", bytes.len());
            return Err(Error::new(Status::BufferTooSmall, text).at_key("bytes"));
        }
        let (body, checksum) = bytes.split_at_mut(needed - CHECKSUM_BYTES);
        write(&self.sequence, &state, needed as u64, &mut Sink { bytes: Some(body), length: 0 })?;
        checksum.copy_from_slice(&xxh3_64(body).to_le_bytes());
        Ok(())
    }

    /// A session that goes on where the one that wrote `bytes` stood, bit for bit on the same instruction set.
    ///
    /// Zeros in `options` take what that session had; `prefill_chunk`, `route_capacity`, `kv_limit_bytes` and `batch_only` are
    /// always those of `options`. Fails with `SnapshotDamaged`, `SnapshotVersion`, `SnapshotModel`, with `InvalidArgument`
    /// where the options contradict it, and as making a session and compiling a grammar do.
    pub fn restore(model: Arc<Model>, bytes: &[u8], options: &SessionOptions) -> Result<Session> {
        let mut source = Source::open(bytes)?;
        let snapshot = source.u64()?;
        let gates = model.gates();
        let fingerprint = model.fingerprint_under(gates.as_deref());
        if snapshot != fingerprint {
            let text =
                format!("the snapshot is of a model with fingerprint {snapshot:016x}, this one has {fingerprint:016x}");
            return Err(Error::new(Status::SnapshotModel, text));
        }
        let (options, overflow) = read_options(&mut source, options)?;
        let options = options.resolve(model.config(), model.backend().default_kv_dtype())?;
        let pass = new_pass(&model, &options)?;
        let mut sequence = Sequence::new(model, options)?;
        sequence.gates = number_of(gates.as_deref());
        read(&mut source, &mut sequence)?;
        // Where the dropped tokens were is known by how many the window kept.
        if sequence.dropped > 0 && sequence.options.overflow != overflow {
            let text = format!("the snapshot's window has dropped tokens as {overflow:?}: that cannot change any more");
            return Err(Error::new(Status::InvalidArgument, text).at_key("keep_tokens"));
        }
        if !source.bytes.is_empty() {
            return Err(damaged("has bytes left over"));
        }
        Ok(Session::from_parts(sequence, pass))
    }
}

fn damaged(what: &str) -> Error {
    Error::new(Status::SnapshotDamaged, format!("the snapshot {what}: it was cut, changed, or is none"))
}

/// Where a snapshot goes: into bytes, or nowhere while its length is found out.
struct Sink<'a> {
    bytes: Option<&'a mut [u8]>,
    length: usize,
}

impl Sink<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        if let Some(to) = self.next(bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }

    fn fill(&mut self, count: usize, write: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        self.next(count).map_or(Ok(()), write)
    }

    fn next(&mut self, count: usize) -> Option<&mut [u8]> {
        let start = self.length;
        self.length += count;
        self.bytes.as_mut().map(|bytes| &mut bytes[start..start + count])
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    fn f32(&mut self, value: f32) {
        self.u32(value.to_bits());
    }
}

/// What of a sequence is in its snapshot, and the fingerprint that the model has then. What was run under gates no longer in
/// force is pending.
struct State {
    fingerprint: u64,
    processed: usize,
    ready: bool,
    drawn: bool,
}

impl State {
    fn of(sequence: &Sequence) -> State {
        let gates = sequence.model.gates();
        let is_current = sequence.gates == number_of(gates.as_deref());
        State {
            fingerprint: sequence.model.fingerprint_under(gates.as_deref()),
            processed: if is_current { sequence.processed } else { 0 },
            ready: is_current && sequence.ready,
            drawn: is_current && sequence.drawn,
        }
    }
}

fn write(sequence: &Sequence, state: &State, length: u64, sink: &mut Sink) -> Result<()> {
    sink.bytes(&MAGIC);
    sink.u32(VERSION);
    sink.u64(length);
    sink.u64(state.fingerprint);
    write_options(sequence, sink);
    write_sampling(&sequence.sampling, &sequence.bias, sink);

    sink.u64(sequence.dropped);
    sink.u32(sequence.tokens.len() as u32);
    sink.u32(state.processed as u32);
    sink.u32(state.ready as u32 | (state.drawn as u32) << 1);
    sink.bytes(as_bytes(&sequence.tokens));
    if state.ready {
        sink.fill(sequence.model.config().vocab_size * size_of::<f32>(), |to| {
            to.copy_from_slice(as_bytes(sequence.logits.numbers()?));
            Ok(())
        })?;
        sink.bytes(as_bytes(&sequence.route_experts));
        sink.bytes(as_bytes(&sequence.route_weights));
    }
    sink.u32(sequence.control.is_some() as u32);
    if let Some(control) = &sequence.control {
        let control = control.as_router_control();
        sink.bytes(as_bytes(control.allowed));
        sink.bytes(as_bytes(control.bias));
    }
    write_grammar(sequence.grammar.as_ref(), sink);
    for (page, slots) in used_pages(&sequence.pages, state.processed) {
        let geometry = page.geometry();
        sink.fill(geometry.packed_bytes(slots), |to| copy_positions_out(geometry, page, slots, to))?;
    }
    Ok(())
}

/// The pages that hold the first `positions`, and how many each holds of them.
fn used_pages(pages: &super::kv::KvPages, positions: usize) -> impl Iterator<Item = (&KvPage, usize)> {
    let pages = pages.pages().iter().take(KvGeometry::pages_for(positions));
    pages.enumerate().map(move |(at, page)| (&**page, (positions - at * PAGE_TOKENS).min(PAGE_TOKENS)))
}

fn write_options(sequence: &Sequence, sink: &mut Sink) {
    sink.u32(sequence.options.context_size as u32);
    let dtype = KvDtype::ALL.iter().position(|dtype| *dtype == sequence.kv_dtype());
    sink.u32(dtype.unwrap_or(0) as u32);
    let (overflow, keep) = match sequence.options.overflow {
        Overflow::Fail => (0, 0),
        Overflow::Slide { keep } => (1, keep),
    };
    sink.u32(overflow);
    sink.u32(keep as u32);
}

fn write_sampling(sampling: &Sampling, bias: &LogitBias, sink: &mut Sink) {
    let Sampling { temperature, top_k, top_p, min_p, .. } = *sampling;
    let Sampling { repetition_penalty, presence_penalty, frequency_penalty, penalty_window, seed, .. } = *sampling;
    for value in [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty] {
        sink.f32(value);
    }
    sink.u32(top_k);
    sink.u32(penalty_window);
    sink.u64(seed);
    sink.u32(bias.pairs().len() as u32);
    for (token, value) in bias.pairs() {
        sink.u32(*token);
        sink.f32(*value);
    }
}

fn write_grammar(state: Option<&GrammarState>, sink: &mut Sink) {
    let Some(state) = state else { return sink.u32(0) };
    let grammar = state.grammar();
    sink.u32(match grammar.kind() {
        GrammarKind::JsonSchema => 1,
        GrammarKind::Regex => 2,
        GrammarKind::Lark => 3,
    });
    sink.u32(grammar.source().len() as u32);
    sink.bytes(grammar.source().as_bytes());
    sink.u32(state.accepted().len() as u32);
    sink.bytes(as_bytes(state.accepted()));
}

/// What is left of a snapshot.
struct Source<'a> {
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    /// The part after the prefix, once version, length and checksum are right.
    fn open(bytes: &'a [u8]) -> Result<Source<'a>> {
        let mut source = Source { bytes };
        if source.take(MAGIC.len())? != MAGIC {
            return Err(damaged("does not begin as one"));
        }
        let version = source.u32()?;
        let length = source.u64()?;
        if length != bytes.len() as u64 || bytes.len() < PREFIX_BYTES + CHECKSUM_BYTES {
            return Err(damaged(&format!("says it has {length} bytes and has {}", bytes.len())));
        }
        let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
        if xxh3_64(body).to_le_bytes() != checksum {
            return Err(damaged("does not match its checksum"));
        }
        // After the checksum: a damaged version number is damage.
        if version != VERSION {
            let text = format!("the snapshot has format version {version}, this library reads {VERSION}");
            return Err(Error::new(Status::SnapshotVersion, text));
        }
        Ok(Source { bytes: &body[PREFIX_BYTES..] })
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.bytes.split_at_checked(count) else { return Err(damaged("ends early")) };
        self.bytes = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self) -> Result<u64> {
        let (low, high) = (self.u32()?, self.u32()?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn f32(&mut self) -> Result<f32> {
        Ok(f32::from_bits(self.u32()?))
    }

    /// A number of at most `most`.
    fn count(&mut self, most: usize, what: &str) -> Result<usize> {
        let count = self.u32()? as usize;
        if count > most { Err(damaged(&format!("has {count} {what}, at most {most} are possible"))) } else { Ok(count) }
    }

    fn fill<T: crate::memory::Plain>(&mut self, values: &mut [T]) -> Result<()> {
        let bytes = as_bytes_mut(values);
        bytes.copy_from_slice(self.take(bytes.len())?);
        Ok(())
    }

    fn tokens(&mut self, count: usize, vocab_size: usize) -> Result<Vec<u32>> {
        let bytes = self.take(count.saturating_mul(4))?;
        let mut tokens = try_with_capacity("tokens of a snapshot", count)?;
        tokens.extend(bytes.chunks_exact(4).map(|token| u32::from_le_bytes([token[0], token[1], token[2], token[3]])));
        match tokens.iter().all(|token| (*token as usize) < vocab_size) {
            true => Ok(tokens),
            false => Err(damaged("has a token past the vocabulary")),
        }
    }
}

/// The options to make the session with, and what the one that was written did when its context was full.
fn read_options(source: &mut Source, wanted: &SessionOptions) -> Result<(SessionOptions, Overflow)> {
    let context_size = source.u32()? as usize;
    let dtype = source.count(KvDtype::ALL.len() - 1, "as its dtype")?;
    let dtype = KvDtype::ALL[dtype];
    let overflow = match (source.u32()?, source.u32()?) {
        (0, _) => Overflow::Fail,
        (1, keep) => Overflow::Slide { keep: keep as usize },
        _ => return Err(damaged("has no possible overflow")),
    };
    if wanted.kv_dtype.is_some_and(|wanted| wanted != dtype) {
        let text = format!("the snapshot's keys and values are {}: they cannot be had in another dtype", dtype.name());
        return Err(Error::new(Status::InvalidArgument, text).at_key("kv_dtype"));
    }
    let options = SessionOptions {
        context_size: if wanted.context_size == 0 { context_size } else { wanted.context_size },
        kv_dtype: Some(dtype),
        overflow: if wanted.overflow == Overflow::Fail { overflow } else { wanted.overflow },
        ..*wanted
    };
    Ok((options, overflow))
}

fn read(source: &mut Source, sequence: &mut Sequence) -> Result<()> {
    let model = Arc::clone(&sequence.model);
    let vocab_size = model.config().vocab_size;
    let (sampling, bias) = read_sampling(source, vocab_size)?;
    sampling.check(vocab_size).map_err(|error| damaged(&format!("has settings out of range ({error})")))?;
    sequence.sampling = sampling;
    sequence.bias = bias;

    sequence.dropped = source.u64()?;
    if sequence.dropped > MAX_DROPPED {
        return Err(damaged("has dropped more tokens than there can have been"));
    }
    let count = source.u32()? as usize;
    if count > sequence.context_size() {
        let text = format!("the snapshot holds {count} tokens, context_size is {}", sequence.context_size());
        return Err(Error::new(Status::InvalidArgument, text).at_key("context_size"));
    }
    sequence.processed = source.count(count, "tokens run")?;
    let flags = source.count(3, "as its flags")?;
    (sequence.ready, sequence.drawn) = (flags & 1 == 1, flags & 2 == 2);
    if sequence.ready && sequence.processed == 0 || !sequence.ready && count > 0 && sequence.processed == count {
        return Err(damaged("has logits without tokens, or tokens without logits"));
    }
    sequence.tokens.extend_from_slice(&source.tokens(count, vocab_size)?);
    if sequence.ready {
        sequence.logits.replace(|logits| source.fill(logits))?;
        source.fill(&mut sequence.route_experts)?;
        source.fill(&mut sequence.route_weights)?;
        let is_expert = |expert: &u32| *expert == NO_EXPERT || (*expert as usize) < model.config().num_local_experts;
        if !sequence.route_experts.iter().all(is_expert) {
            return Err(damaged("has routes past the experts"));
        }
    }
    if source.count(1, "as its expert control")? == 1 {
        sequence.control = Some(read_control(source, &model)?);
    }
    sequence.grammar = read_grammar(source, &model)?;
    for at in 0..KvGeometry::pages_for(sequence.processed) {
        let slots = (sequence.processed - at * PAGE_TOKENS).min(PAGE_TOKENS);
        let Some(page) = Arc::get_mut(&mut sequence.pages.pages_mut()[at]) else { return Err(damaged("shares pages")) };
        let geometry = *page.geometry();
        copy_positions_in(&geometry, page, slots, source.take(geometry.packed_bytes(slots))?)?;
    }
    Ok(())
}

fn read_sampling(source: &mut Source, vocab_size: usize) -> Result<(Sampling, LogitBias)> {
    let sampling = Sampling {
        temperature: source.f32()?,
        top_p: source.f32()?,
        min_p: source.f32()?,
        repetition_penalty: source.f32()?,
        presence_penalty: source.f32()?,
        frequency_penalty: source.f32()?,
        top_k: source.u32()?,
        penalty_window: source.u32()?,
        seed: source.u64()?,
    };
    let count = source.count(vocab_size, "biases")?;
    let mut pairs = try_with_capacity("a logit bias", count)?;
    for _ in 0..count {
        pairs.push((source.u32()?, source.f32()?));
    }
    let bias = LogitBias::new(&pairs, vocab_size).map_err(|error| match error.status() {
        Status::OutOfMemory => error,
        _ => damaged(&format!("has an impossible bias ({error})")),
    })?;
    Ok((sampling, bias))
}

fn read_control(source: &mut Source, model: &Model) -> Result<ExpertControl> {
    let config = model.config();
    let mut control = ExpertControl::new(config)?;
    for layer in 0..config.num_hidden_layers {
        control.set_allowed(Some(layer), source.u64()?).map_err(|error| damaged(&format!("has an {error}")))?;
    }
    let mut bias = try_with_capacity("expert biases", config.num_local_experts)?;
    for layer in 0..config.num_hidden_layers {
        bias.clear();
        for _ in 0..config.num_local_experts {
            bias.push(source.f32()?);
        }
        control.set_bias(Some(layer), &bias).map_err(|error| damaged(&format!("has a {error}")))?;
    }
    Ok(control)
}

fn read_grammar(source: &mut Source, model: &Model) -> Result<Option<GrammarState>> {
    let kind = match source.count(3, "as its grammar")? {
        0 => return Ok(None),
        1 => GrammarKind::JsonSchema,
        2 => GrammarKind::Regex,
        _ => GrammarKind::Lark,
    };
    let length = source.u32()? as usize;
    let text = std::str::from_utf8(source.take(length)?).map_err(|_| damaged("has a grammar that is not UTF-8"))?;
    let mut state = GrammarState::start(&Grammar::new(model.grammar_vocabulary()?, kind, text)?)?;
    let count = source.u32()? as usize;
    for token in source.tokens(count, model.config().vocab_size)? {
        state.accept(token)?;
    }
    Ok(Some(state))
}
