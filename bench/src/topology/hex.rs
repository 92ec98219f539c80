//! Bytes as hexadecimal text, for frames and files inside JSON. Use with `#[serde(with = "super::hex")]`.

use serde::{Deserialize, Deserializer, Serializer, de};

/// Lower-case, two digits a byte, nothing between.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// The inverse of [`encode`]; accepts upper case, and `:` or blanks between bytes.
///
/// Returns `None` when a digit is none, or one is left over.
#[must_use]
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let mut digits = text.bytes().filter(|byte| !byte.is_ascii_whitespace() && *byte != b':');
    let mut bytes = Vec::with_capacity(text.len() / 2);
    while let Some(high) = digits.next() {
        bytes.push(nibble(high)? << 4 | nibble(digits.next()?)?);
    }
    Some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(bytes))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    decode(&text).ok_or_else(|| de::Error::custom("not hexadecimal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_text() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&bytes)).unwrap(), bytes);
        assert_eq!(decode("52:54:00 0A").unwrap(), [0x52, 0x54, 0, 10]);
        assert_eq!(decode("123"), None);
        assert_eq!(decode("zz"), None);
    }
}
