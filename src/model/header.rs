//! The header of a safetensors file, validated at the door so that no later code checks again.
//!
//! A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes back to back
//! (format: <https://github.com/huggingface/safetensors>). Every size is compared with the file's real length
//! before anything is allocated for a tensor.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::value::{Error as DtypeError, StrDeserializer};
use serde::de::{Deserializer, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Visitor};

use super::checkpoint::{file_length, read_bytes, read_error};
use super::json::MAX_MEMBERS;
use crate::error::{Error, Result, Status};
use crate::platform;

const MAX_HEADER_BYTES: u64 = 16 << 20;
const MAX_DIMENSIONS: usize = 8;

/// What a tensor is and where its bytes are.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Element type as stored.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Of the first byte, from the start of the file.
    pub offset: u64,
}

impl TensorInfo {
    /// Its size. The header was checked: it fits.
    pub fn bytes(&self) -> u64 {
        let elements = self.shape.iter().map(|size| *size as u64).product::<u64>();
        (elements * self.dtype.bitsize() as u64).div_ceil(8)
    }
}

/// Reads the header of an opened safetensors file.
pub fn read(name: &str, file: &File) -> Result<HashMap<String, TensorInfo>> {
    let fail = |status, text: String| Error::new(status, text).in_file(name);
    let file_bytes = file_length(name, file)?;
    if file_bytes < 8 {
        return Err(fail(Status::FileLength, format!("is {file_bytes} bytes, a safetensors file has at least 8")));
    }
    let mut prefix = [0u8; 8];
    platform::read_exact_at(file, &mut prefix, 0).map_err(|error| read_error(name, 0, &error))?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > file_bytes - 8 {
        let text = format!("announces a header of {header_bytes} bytes, but only {} follow", file_bytes - 8);
        return Err(fail(Status::FileLength, text));
    }
    if header_bytes > MAX_HEADER_BYTES {
        let text = format!("announces a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are parsed");
        return Err(fail(Status::FileTooLarge, text));
    }
    let header = read_bytes(name, file, 8, header_bytes as usize)?;
    let header: Header = serde_json::from_slice(&header)
        .map_err(|error| fail(Status::HeaderSyntax, format!("malformed header: {error}")))?;
    let data_start = 8 + header_bytes;
    let mut names = HashSet::with_capacity(header.0.len());
    if let Some((tensor, _)) = header.0.iter().find(|(tensor, _)| !names.insert(tensor.as_str())) {
        let text = format!("tensor \"{tensor}\" is described twice");
        return Err(fail(Status::TensorDuplicate, text).at_key(tensor));
    }
    check_spans(&header.0, file_bytes - data_start).map_err(|error| error.in_file(name))?;
    let mut tensors = HashMap::with_capacity(header.0.len());
    for (tensor, entry) in header.0 {
        let info = check_entry(&tensor, &entry, data_start).map_err(|error| error.in_file(name).at_key(&*tensor))?;
        tensors.insert(tensor, info);
    }
    Ok(tensors)
}

/// The tensors of a header in file order, duplicates included; `__metadata__` is skipped.
struct Header(Vec<(String, Entry)>);

/// One tensor's entry as it stands in a header.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// Dimensions, capped so that a header cannot grow in memory.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tensors;

        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut tensors = Vec::new();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(serde::de::Error::custom("key \"__metadata__\" is named twice"));
                        }
                        map.next_value::<IgnoredAny>()?;
                    } else if tensors.len() == MAX_MEMBERS {
                        return Err(serde::de::Error::custom(format!("more than {MAX_MEMBERS} tensors in one file")));
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Header(tensors))
            }
        }

        deserializer.deserialize_map(Tensors)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Dimensions;

        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                write!(formatter, "at most {MAX_DIMENSIONS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> std::result::Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = sequence.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(serde::de::Error::invalid_length(MAX_DIMENSIONS + 1, &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }

        deserializer.deserialize_seq(Dimensions)
    }
}

fn check_entry(tensor: &str, entry: &Entry, data_start: u64) -> Result<TensorInfo> {
    let deserializer: StrDeserializer<DtypeError> = entry.dtype.as_str().into_deserializer();
    let dtype = Dtype::deserialize(deserializer).map_err(|_| {
        let text = format!("tensor \"{tensor}\" has the unknown dtype {:?}", entry.dtype);
        Error::new(Status::TensorDtype, text)
    })?;
    let (first, end) = entry.data_offsets;
    let shape: Option<Vec<usize>> = entry.shape.0.iter().map(|size| usize::try_from(*size).ok()).collect();
    let elements = entry.shape.0.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
    let bits = elements.and_then(|count| count.checked_mul(dtype.bitsize() as u64));
    match (shape, bits) {
        (Some(shape), Some(bits)) if bits.div_ceil(8) == end - first => {
            Ok(TensorInfo { dtype, shape, offset: data_start + first })
        }
        _ => {
            let text = format!(
                "tensor \"{tensor}\" is {} {:?}, which does not fill its data_offsets [{first}, {end}]",
                entry.dtype, entry.shape.0
            );
            Err(Error::new(Status::HeaderValue, text))
        }
    }
}

/// Tensors must follow each other without gap or overlap and fill the file to its last byte.
fn check_spans(tensors: &[(String, Entry)], data_bytes: u64) -> Result<()> {
    let mut spans: Vec<((u64, u64), &str)> =
        tensors.iter().map(|(name, entry)| (entry.data_offsets, name.as_str())).collect();
    spans.sort_unstable();
    let mut expected = 0;
    for ((first, end), tensor) in spans {
        if first != expected || end < first {
            let text =
                format!("tensor \"{tensor}\" has data_offsets [{first}, {end}], expected to begin at {expected}");
            return Err(Error::new(Status::HeaderValue, text).at_key(tensor));
        }
        expected = end;
    }
    if expected != data_bytes {
        let text = format!("holds {data_bytes} bytes of tensors, its header describes {expected}");
        return Err(Error::new(Status::FileLength, text));
    }
    Ok(())
}
