//! The one error type of the library, and the table of status codes the C header is generated from.

use std::ffi::CStr;
use std::fmt;

/// What a call answers. Every C function that can fail returns one of these; 0 is success.
///
/// Values never change meaning and are never reused within one ABI version.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// The call did what it says.
    Ok = 0,

    /// An argument has a value the function does not accept.
    InvalidArgument = 1,
    /// A required pointer or handle is NULL.
    NullArgument = 2,
    /// The handle's object has been destroyed, or the handle was never made by this library.
    StaleHandle = 3,
    /// The handle belongs to an object of another type.
    WrongHandleType = 4,
    /// Another thread is inside a call on the same object; nothing was changed.
    Busy = 5,
    /// The work was cancelled; the object is usable and says how far it came.
    Cancelled = 6,
    /// Memory could not be had; nothing was changed.
    OutOfMemory = 7,
    /// A defect of this library was caught; the object it happened in is poisoned.
    Internal = 8,
    /// An earlier Internal error left this object unusable; destroy it.
    Poisoned = 9,
    /// The process forked after the object was made; objects do not survive a fork.
    Forked = 10,
    /// A struct's struct_size is too small or impossible, or a field this library does not know is not 0.
    StructSize = 11,
    /// The caller's buffer is too small; the needed length has been written.
    BufferTooSmall = 12,
    /// The operating system refused a thread.
    ThreadUnavailable = 13,
    /// Not an error: the time or layer budget is spent. Call again to go on where the work stopped.
    NeedMore = 14,

    /// The model directory cannot be opened.
    DirectoryNotFound = 20,
    /// A file the model needs is not in the directory.
    FileNotFound = 21,
    /// A file name leaves the directory, or the file is a link, a folder, a device or a pipe.
    FileNotAllowed = 22,
    /// A metadata file is larger than the library is willing to parse.
    FileTooLarge = 23,
    /// The operating system failed to read a file.
    ReadFailed = 24,
    /// The operating system failed to write a file.
    WriteFailed = 25,
    /// The disk has too little room for what is to be written.
    DiskFull = 26,
    /// What is to be written is there already.
    AlreadyExists = 27,

    /// config.json is not valid JSON, or names a key twice.
    ConfigSyntax = 30,
    /// A value in config.json is missing, of the wrong type or out of range.
    ConfigValue = 31,
    /// config.json describes a model this library does not run.
    UnsupportedModel = 32,

    /// model.safetensors.index.json is not valid JSON, or names a key twice.
    IndexSyntax = 40,
    /// The index and the shards disagree, or a shard's name is not a plain file name.
    IndexValue = 41,

    /// A safetensors header is malformed.
    HeaderSyntax = 50,
    /// A safetensors header describes bytes that overlap, leave gaps or contradict a shape.
    HeaderValue = 51,
    /// A safetensors file is shorter or longer than its header says.
    FileLength = 52,
    /// A tensor the model needs is absent.
    TensorMissing = 53,
    /// A tensor's shape contradicts config.json.
    TensorShape = 54,
    /// A tensor's element type is not BF16, F16 or F32, or not that of the format config.json says it is quantised to.
    TensorDtype = 55,
    /// A tensor is stored more than once, under one name or in two layouts.
    TensorDuplicate = 56,
    /// A tensor of an expert or a layer that config.json does not have.
    TensorUnexpected = 57,
    /// A tensor that is to be quantised has a number that is infinite or NaN.
    TensorValue = 58,

    /// tokenizer.json is not valid JSON, or names a key twice.
    TokenizerSyntax = 60,
    /// tokenizer.json is not of the shape Gemma's tokenizer has.
    TokenizerUnsupported = 61,
    /// A vocabulary entry, merge or token id in tokenizer.json is not usable.
    TokenizerValue = 62,
    /// The model directory has no tokenizer.json, so text cannot be used; token ids can.
    NoTokenizer = 63,
    /// Text handed in is not valid UTF-8.
    InvalidUtf8 = 64,

    /// The tokens would not fit in the session's context.
    ContextFull = 70,
    /// A token id is not in the model's vocabulary.
    TokenOutOfRange = 71,
    /// The session holds no tokens, or its logits are not available yet.
    NoLogits = 72,
    /// The model produced logits that are all NaN or infinite.
    NotANumber = 73,
    /// A sampling setting is out of range.
    SamplingValue = 74,
    /// The memory limit for keys and values, of the session or of the model, would be passed.
    KvLimit = 75,
    /// An expert mask allows no expert, or an expert bias is not a finite number.
    ExpertValue = 76,

    /// The bytes are not a snapshot, or were damaged.
    SnapshotDamaged = 80,
    /// The snapshot is of a format version this library does not read.
    SnapshotVersion = 81,
    /// The snapshot is of another model, or of the same one loaded with other numerical options.
    SnapshotModel = 82,

    /// The grammar, schema or regular expression cannot be compiled.
    GrammarSyntax = 90,
    /// The grammar is too complex: a limit on its size or on the work for one token was reached.
    GrammarLimit = 91,
    /// The token cannot follow under the session's grammar.
    GrammarViolation = 92,

    /// The chat template cannot be parsed.
    TemplateSyntax = 100,
    /// The chat template failed or refused the messages.
    TemplateFailed = 101,
    /// The chat template took too many steps, recursed too deep or wrote too much.
    TemplateLimit = 102,
    /// A message has a role or a text that cannot be used.
    MessageValue = 103,

    /// The machine has no NVIDIA driver, or not the device that was asked for, or one that is too old for the kernels.
    NoDevice = 110,
    /// The NVIDIA driver is older than the library's kernels.
    DriverTooOld = 111,
    /// Memory on the device could not be had; nothing was changed.
    DeviceOutOfMemory = 112,
    /// The device's driver refused or failed a call; what was in progress is lost, the objects are usable.
    DeviceFailed = 113,
    /// The device failed in a way that ends everything on it: destroy its sessions and models, and load anew.
    DeviceLost = 114,

    /// A recipe is not valid TOML, or names a key twice.
    RecipeSyntax = 120,
    /// A value in a recipe is missing, of the wrong type or out of range, or a key is not known.
    RecipeValue = 121,
    /// The models of a recipe cannot be mixed: geometry, tokenizer, chat template or dtype differ.
    ModelsDiffer = 122,
    /// A row of training or evaluation data cannot be used; the error names its file and line.
    DataRow = 123,
    /// The data is not what the checkpoint was begun with.
    DataChanged = 124,
    /// A router patch is cut off, altered, or not a router patch.
    PatchDamaged = 125,
    /// A router patch is of another model's routers.
    PatchModel = 126,
}

impl Status {
    /// Every status and its name, in the order of its value.
    pub const TABLE: [(Status, &'static CStr); 71] = {
        use Status::*;
        [
            (Ok, c"OK"),
            (InvalidArgument, c"INVALID_ARGUMENT"),
            (NullArgument, c"NULL_ARGUMENT"),
            (StaleHandle, c"STALE_HANDLE"),
            (WrongHandleType, c"WRONG_HANDLE_TYPE"),
            (Busy, c"BUSY"),
            (Cancelled, c"CANCELLED"),
            (OutOfMemory, c"OUT_OF_MEMORY"),
            (Internal, c"INTERNAL"),
            (Poisoned, c"POISONED"),
            (Forked, c"FORKED"),
            (StructSize, c"STRUCT_SIZE"),
            (BufferTooSmall, c"BUFFER_TOO_SMALL"),
            (ThreadUnavailable, c"THREAD_UNAVAILABLE"),
            (NeedMore, c"NEED_MORE"),
            (DirectoryNotFound, c"DIRECTORY_NOT_FOUND"),
            (FileNotFound, c"FILE_NOT_FOUND"),
            (FileNotAllowed, c"FILE_NOT_ALLOWED"),
            (FileTooLarge, c"FILE_TOO_LARGE"),
            (ReadFailed, c"READ_FAILED"),
            (WriteFailed, c"WRITE_FAILED"),
            (DiskFull, c"DISK_FULL"),
            (AlreadyExists, c"ALREADY_EXISTS"),
            (ConfigSyntax, c"CONFIG_SYNTAX"),
            (ConfigValue, c"CONFIG_VALUE"),
            (UnsupportedModel, c"UNSUPPORTED_MODEL"),
            (IndexSyntax, c"INDEX_SYNTAX"),
            (IndexValue, c"INDEX_VALUE"),
            (HeaderSyntax, c"HEADER_SYNTAX"),
            (HeaderValue, c"HEADER_VALUE"),
            (FileLength, c"FILE_LENGTH"),
            (TensorMissing, c"TENSOR_MISSING"),
            (TensorShape, c"TENSOR_SHAPE"),
            (TensorDtype, c"TENSOR_DTYPE"),
            (TensorDuplicate, c"TENSOR_DUPLICATE"),
            (TensorUnexpected, c"TENSOR_UNEXPECTED"),
            (TensorValue, c"TENSOR_VALUE"),
            (TokenizerSyntax, c"TOKENIZER_SYNTAX"),
            (TokenizerUnsupported, c"TOKENIZER_UNSUPPORTED"),
            (TokenizerValue, c"TOKENIZER_VALUE"),
            (NoTokenizer, c"NO_TOKENIZER"),
            (InvalidUtf8, c"INVALID_UTF8"),
            (ContextFull, c"CONTEXT_FULL"),
            (TokenOutOfRange, c"TOKEN_OUT_OF_RANGE"),
            (NoLogits, c"NO_LOGITS"),
            (NotANumber, c"NOT_A_NUMBER"),
            (SamplingValue, c"SAMPLING_VALUE"),
            (KvLimit, c"KV_LIMIT"),
            (ExpertValue, c"EXPERT_VALUE"),
            (SnapshotDamaged, c"SNAPSHOT_DAMAGED"),
            (SnapshotVersion, c"SNAPSHOT_VERSION"),
            (SnapshotModel, c"SNAPSHOT_MODEL"),
            (GrammarSyntax, c"GRAMMAR_SYNTAX"),
            (GrammarLimit, c"GRAMMAR_LIMIT"),
            (GrammarViolation, c"GRAMMAR_VIOLATION"),
            (TemplateSyntax, c"TEMPLATE_SYNTAX"),
            (TemplateFailed, c"TEMPLATE_FAILED"),
            (TemplateLimit, c"TEMPLATE_LIMIT"),
            (MessageValue, c"MESSAGE_VALUE"),
            (NoDevice, c"NO_DEVICE"),
            (DriverTooOld, c"DRIVER_TOO_OLD"),
            (DeviceOutOfMemory, c"DEVICE_OUT_OF_MEMORY"),
            (DeviceFailed, c"DEVICE_FAILED"),
            (DeviceLost, c"DEVICE_LOST"),
            (RecipeSyntax, c"RECIPE_SYNTAX"),
            (RecipeValue, c"RECIPE_VALUE"),
            (ModelsDiffer, c"MODELS_DIFFER"),
            (DataRow, c"DATA_ROW"),
            (DataChanged, c"DATA_CHANGED"),
            (PatchDamaged, c"PATCH_DAMAGED"),
            (PatchModel, c"PATCH_MODEL"),
        ]
    };

    /// The status with this value, if there is one.
    pub fn from_value(value: i32) -> Option<Status> {
        Self::TABLE.into_iter().map(|(status, _)| status).find(|status| *status as i32 == value)
    }

    /// The status's name, as in the C constant without its prefix.
    pub fn name(self) -> &'static CStr {
        Self::TABLE.into_iter().find(|(status, _)| *status == self).map_or(c"UNKNOWN", |(_, name)| name)
    }
}

/// A failure: its status, a sentence for a person, and where it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: Status,
    text: String,
    file: Option<String>,
    key: Option<String>,
}

/// The library's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with a sentence that names what was found and what was expected.
    pub fn new(status: Status, text: impl Into<String>) -> Self {
        Error { status, text: presentable(text.into()), file: None, key: None }
    }

    /// Names the file the error is about, relative to the model directory.
    pub fn in_file(mut self, file: impl Into<String>) -> Self {
        self.file.get_or_insert_with(|| presentable(file.into()));
        self
    }

    /// Says which directory the file is in, where there are several models.
    pub fn in_directory(mut self, directory: &std::path::Path) -> Self {
        self.file = self.file.map(|file| presentable(directory.join(file).display().to_string()));
        self
    }

    /// Names the tensor, JSON key or option the error is about.
    pub fn at_key(mut self, key: impl Into<String>) -> Self {
        self.key.get_or_insert_with(|| presentable(key.into()));
        self
    }

    /// Memory for `bytes` bytes of `what` could not be had.
    pub fn out_of_memory(what: &str, bytes: usize) -> Self {
        Error::new(Status::OutOfMemory, format!("no memory for {what}: {bytes} bytes"))
    }

    /// The status code.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The file the error is about, relative to the model directory.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// The tensor, JSON key or option the error is about.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }
}

/// Text that may quote a hostile file: cut in the middle where it is long, and without characters a terminal would
/// obey.
fn presentable(text: String) -> String {
    const KEPT: usize = 300;
    let text = if text.len() > 2 * KEPT {
        format!("{}...{}", &text[..text.floor_char_boundary(KEPT)], &text[text.ceil_char_boundary(text.len() - KEPT)..])
    } else {
        text
    };
    if text.contains(char::is_control) { text.replace(char::is_control, "\u{fffd}") } else { text }
}

impl fmt::Display for Error {
    /// `FILE: sentence`; the sentence itself names the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{file}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lists_every_status_once_in_rising_order() {
        let source = include_str!("error.rs");
        let body = source.split("pub enum Status {").nth(1).unwrap();
        let body = body.split("\n}").next().unwrap();
        let declared = body.lines().filter(|line| line.contains(" = ") && line.ends_with(',')).count();
        assert_eq!(declared, Status::TABLE.len());
        assert!(Status::TABLE.windows(2).all(|pair| (pair[0].0 as i32) < (pair[1].0 as i32)));
    }

    #[test]
    fn an_error_reads_as_file_then_sentence() {
        let error = Error::new(Status::TensorShape, "tensor \"a\" is [2], expected [3]").in_file("m.safetensors");
        assert_eq!(error.to_string(), "m.safetensors: tensor \"a\" is [2], expected [3]");
    }
}
