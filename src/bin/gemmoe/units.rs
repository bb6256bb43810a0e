//! Numbers as people read them.

/// `27.56 B`, `5.49 M`, `317`
pub fn count(value: u64) -> String {
    match value {
        0..1_000_000 => grouped(value),
        1_000_000..1_000_000_000 => format!("{:.2} M", value as f64 / 1e6),
        _ => format!("{:.2} B", value as f64 / 1e9),
    }
}

/// `55,123,456`
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Takes `24GB`, `1.5 GB`, `22GiB`, `800 MB`, `20kB` or a number of bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let (mib, gib) = ((1u64 << 20) as f64, (1u64 << 30) as f64);
    let units = [("gib", gib), ("mib", mib), ("gb", 1e9), ("mb", 1e6), ("kb", 1e3), ("", 1.0)];
    let found = units.into_iter().find_map(|(unit, bytes)| Some((lower.strip_suffix(unit)?.trim(), bytes)));
    let number = found.and_then(|(number, bytes)| Some(number.parse::<f64>().ok()? * bytes));
    number
        .filter(|bytes| (0.0..1e18).contains(bytes))
        .map(|bytes| bytes as u64)
        .ok_or_else(|| "it is no size: a number of bytes, or one with kB, MB, GB, MiB or GiB, as in 24GB".to_owned())
}

/// `27.6 GB`, `11.0 MB`, `1.5 kB`
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// A text of at most `width` characters, the last of them an ellipsis where it is cut.
pub fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_are_read_with_their_units_and_nothing_else_is() {
        let sizes = [("0", 0), ("123456789", 123_456_789), ("24GB", 24_000_000_000), (" 1.5 gb ", 1_500_000_000)];
        let more = [("800 MB", 800_000_000), ("20kB", 20_000), ("2GiB", 2 << 30), ("0.5MiB", 1 << 19)];
        for (text, bytes) in sizes.into_iter().chain(more) {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "-1", "1TB", "1e30", "NaN", "inf", "24 G B", "twelve"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
