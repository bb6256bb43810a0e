//! What a C handle is: not an address but an index, a generation and a type, so that a stale, doubly freed, made-up or
//! wrong-type handle is found out instead of followed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::RwLock;

use super::batch::BatchObject;
use super::error::ErrorObject;
use super::grammar::GrammarObject;
use super::load::LoadObject;
use super::mix::MixObject;
use super::model::ModelObject;
use super::session::SessionObject;
use super::text::TextStreamObject;
use super::trainer::TrainerObject;
use crate::error::{Error, Result, Status};

/// Anything a host can hold.
#[derive(Clone)]
pub enum Object {
    Batch(Arc<BatchObject>),
    Error(Arc<ErrorObject>),
    Grammar(Arc<GrammarObject>),
    Load(Arc<LoadObject>),
    Mix(Arc<MixObject>),
    Model(Arc<ModelObject>),
    Session(Arc<SessionObject>),
    TextStream(Arc<TextStreamObject>),
    Trainer(Arc<TrainerObject>),
}

/// A type a host can hold, and the opaque C type its handles have.
pub trait Held: Sized {
    /// The opaque type in the header.
    type Opaque;
    /// Its bits in a handle; not 0.
    const KIND: usize;
    /// Its name in messages.
    const NAME: &'static str;
    fn wrap(object: Arc<Self>) -> Object;
    fn unwrap(object: Object) -> Option<Arc<Self>>;
}

// A handle is [kind][generation][index], kind uppermost: on 64 bits no valid address looks like one.
const KIND_BITS: u32 = 4;
const INDEX_BITS: u32 = if usize::BITS == 64 { 20 } else { 10 };
const GENERATION_BITS: u32 = usize::BITS - KIND_BITS - INDEX_BITS;
const MAX_OBJECTS: usize = 1 << INDEX_BITS;

struct Slot {
    generation: usize,
    object: Object,
}

/// The objects of this process. Empty again, and without memory, when the last one is destroyed.
struct Table {
    slots: Vec<Option<Slot>>,
    live: usize,
    /// Counts all objects ever made, so that a slot's next object has another generation.
    generation: usize,
}

static TABLE: RwLock<Table> = RwLock::new(Table { slots: Vec::new(), live: 0, generation: 0 });

/// The process the objects belong to; 0 while there are none. Read before the lock is touched: in a forked child the
/// lock may be held by a thread that does not exist there.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// An error in a forked child, whose parent's objects and threads it does not have.
pub fn check_process() -> Result<()> {
    let owner = OWNER.load(Ordering::Acquire);
    match owner == 0 || owner == std::process::id() {
        true => Ok(()),
        false => Err(Error::new(
            Status::Forked,
            format!("the process forked after its objects were made in process {owner}; make them after the fork"),
        )),
    }
}

fn encode<T: Held>(index: usize, generation: usize) -> *mut T::Opaque {
    let bits = T::KIND << (usize::BITS - KIND_BITS) | generation << INDEX_BITS | index;
    std::ptr::without_provenance_mut(bits)
}

/// Makes an object known and returns its handle.
pub fn insert<T: Held>(object: T) -> Result<*mut T::Opaque> {
    check_process()?;
    let object = T::wrap(Arc::new(object));
    let mut table = TABLE.write();
    let index = table.slots.iter().position(Option::is_none).unwrap_or(table.slots.len());
    if index == MAX_OBJECTS {
        return Err(Error::new(Status::OutOfMemory, format!("{MAX_OBJECTS} objects are alive, no more are possible")));
    }
    if index == table.slots.len() {
        table.slots.try_reserve(1).map_err(|_| Error::out_of_memory("the table of objects", size_of::<Slot>()))?;
        table.slots.push(None);
    }
    table.generation = (table.generation + 1) % (1 << GENERATION_BITS);
    let generation = table.generation;
    table.slots[index] = Some(Slot { generation, object });
    table.live += 1;
    OWNER.store(std::process::id(), Ordering::Release);
    Ok(encode::<T>(index, generation))
}

/// The object of a handle; `name` is the parameter's name in messages.
pub fn find<T: Held>(handle: *const T::Opaque, name: &str) -> Result<Arc<T>> {
    check_process()?;
    let (index, generation) = decode::<T>(handle, name)?;
    let table = TABLE.read();
    match table.slots.get(index) {
        Some(Some(slot)) if slot.generation == generation => {
            T::unwrap(slot.object.clone()).ok_or_else(|| wrong_type::<T>(name))
        }
        _ => Err(stale::<T>(name)),
    }
}

/// Forgets a handle. Its object lives on until the calls that use it return. NULL is nothing.
pub fn remove<T: Held>(handle: *mut T::Opaque, name: &str) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    // In a forked child the object's threads do not exist: it is left alone.
    check_process()?;
    let (index, generation) = decode::<T>(handle, name)?;
    let mut table = TABLE.write();
    let held = matches!(table.slots.get(index), Some(Some(slot)) if slot.generation == generation);
    if !held {
        return Err(stale::<T>(name));
    }
    let slot = table.slots[index].take();
    table.live -= 1;
    if table.live == 0 {
        table.slots = Vec::new();
        OWNER.store(0, Ordering::Release);
    }
    // Dropping may join threads: not while the table is locked.
    drop(table);
    drop(slot);
    Ok(())
}

fn decode<T: Held>(handle: *const T::Opaque, name: &str) -> Result<(usize, usize)> {
    if handle.is_null() {
        return Err(Error::new(Status::NullArgument, format!("{name} is NULL")).at_key(name));
    }
    let bits = handle.addr();
    let kind = bits >> (usize::BITS - KIND_BITS);
    if kind == T::KIND {
        return Ok((bits % MAX_OBJECTS, bits >> INDEX_BITS & ((1 << GENERATION_BITS) - 1)));
    }
    let known = [
        ErrorObject::KIND,
        LoadObject::KIND,
        ModelObject::KIND,
        SessionObject::KIND,
        TextStreamObject::KIND,
        BatchObject::KIND,
        GrammarObject::KIND,
        MixObject::KIND,
        TrainerObject::KIND,
    ];
    Err(if known.contains(&kind) { wrong_type::<T>(name) } else { stale::<T>(name) })
}

fn wrong_type<T: Held>(name: &str) -> Error {
    let text = format!("{name} is a handle of another type, expected {}", T::NAME);
    Error::new(Status::WrongHandleType, text).at_key(name)
}

fn stale<T: Held>(name: &str) -> Error {
    let text = format!("{name} is not a live {}: it was destroyed, or never made", T::NAME);
    Error::new(Status::StaleHandle, text).at_key(name)
}
