//! Whether two tokenizers are the same, and if not, in what.

use super::json_tree::quoted;
use super::tokenizer_file::parse;
use crate::error::Result;

/// What sets two `tokenizer.json` apart, as the end of a sentence that begins with the second: none where they give the same ids
/// for every text. `vocab_size` is that of both models. Fails as `Tokenizer::from_json` does where one cannot be parsed.
pub fn difference(first: &[u8], second: &[u8], vocab_size: usize) -> Result<Option<String>> {
    if first == second {
        return Ok(None);
    }
    let (first, second) = (parse(first, vocab_size)?, parse(second, vocab_size)?);
    for id in 0..vocab_size as u32 {
        let (own, other) = (second.vocabulary.piece(id), first.vocabulary.piece(id));
        if own != other {
            return Ok(Some(format!("has {} for token {id}, not {}", quoted(own), quoted(other))));
        }
    }
    let (own, other) = (second.merges.count(), first.merges.count());
    if own != other {
        return Ok(Some(format!("has {own} merges, not {other}")));
    }
    if let Some(at) = (0..own).find(|at| second.merges.sides(*at) != first.merges.sides(*at)) {
        let ((left, right), (other_left, other_right)) = (second.merges.sides(at), first.merges.sides(at));
        let (left, right) = (quoted(left), quoted(right));
        return Ok(Some(format!(
            "merges {left} and {right} where {} and {} are",
            quoted(other_left),
            quoted(other_right)
        )));
    }
    let sorted = |tokens: &[super::tokenizer_file::AddedToken]| {
        let mut tokens = tokens.to_vec();
        tokens.sort_by_key(|token| token.id);
        tokens
    };
    let (own, other) = (sorted(&second.added_tokens), sorted(&first.added_tokens));
    if own == other {
        return Ok(None);
    }
    let at = own.iter().zip(&other).position(|(own, other)| own != other).unwrap_or(own.len().min(other.len()));
    let shown = |token: Option<&super::tokenizer_file::AddedToken>| match token {
        Some(token) => {
            let kind = if token.special { "special" } else { "not special" };
            format!("{} ({}, {kind})", quoted(&token.content), token.id)
        }
        None => "none".to_owned(),
    };
    Ok(Some(format!("has the added token {}, not {}", shown(own.get(at)), shown(other.get(at)))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::samples::sample;

    #[test]
    fn tokenizers_are_told_apart_by_what_they_do_and_not_by_their_spaces() {
        let file = sample();
        let (bytes, size) = (file.to_string().into_bytes(), 2048);
        let spaced = format!("{file:#}").into_bytes();
        assert_eq!(difference(&bytes, &spaced, size).unwrap(), None);
        let mut merges = file.clone();
        merges["model"]["merges"].as_array_mut().unwrap().swap(0, 1);
        let text = difference(&bytes, merges.to_string().as_bytes(), size).unwrap().unwrap();
        assert!(text.starts_with("merges "), "{text}");
        let mut fewer = file.clone();
        fewer["model"]["merges"].as_array_mut().unwrap().pop();
        let text = difference(&bytes, fewer.to_string().as_bytes(), size).unwrap().unwrap();
        assert!(text.contains(" merges, not "), "{text}");
        let mut special = file.clone();
        let flag = special["added_tokens"][0]["special"].as_bool().unwrap();
        special["added_tokens"][0]["special"] = (!flag).into();
        let text = difference(&bytes, special.to_string().as_bytes(), size).unwrap().unwrap();
        assert!(text.starts_with("has the added token "), "{text}");
    }
}
