//! placeholder until the module arrives
use crate::error::Result;
pub struct Tokenizer;
pub struct EncodeOptions {
    pub bos: Option<u32>,
    pub parse_special: bool,
}
impl Tokenizer {
    pub fn from_json(_: &[u8], _: usize) -> Result<Tokenizer> {
        Ok(Tokenizer)
    }
    pub fn encode(&self, _: &str, _: EncodeOptions) -> Result<Vec<u32>> {
        Ok(vec![])
    }
    pub fn token_bytes(&self, _: u32, _: bool) -> Result<&[u8]> {
        Ok(&[])
    }
    pub fn decode(&self, _: &[u32], _: bool) -> Result<Vec<u8>> {
        Ok(vec![])
    }
    pub fn is_special(&self, _: u32) -> bool {
        false
    }
    pub fn token_id(&self, _: &str) -> Option<u32> {
        None
    }
    pub fn bytes_in_use(&self) -> usize {
        0
    }
}
#[derive(Default)]
pub struct TextStream;
impl TextStream {
    pub fn push(&mut self, b: &[u8], o: &mut Vec<u8>) {
        o.extend_from_slice(b)
    }
    pub fn finish(&mut self, _: &mut Vec<u8>) {}
}
