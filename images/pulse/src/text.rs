//! Text in fixed buffers: the guest has no heap.

use core::fmt;

/// Text of at most `N` bytes. What does not fit is cut off, and [`Text::is_cut`] says so.
#[derive(Clone, Debug)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
    cut: bool,
}

impl<const N: usize> Text<N> {
    /// An empty text.
    pub const fn new() -> Self {
        Self { bytes: [0; N], len: 0, cut: false }
    }

    /// Forgets the text.
    pub fn clear(&mut self) {
        self.len = 0;
        self.cut = false;
    }

    /// Whether something did not fit.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// The text's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The text. Only whole characters are ever stored.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = N - self.len;
        let take = if text.len() <= room { text.len() } else { floor_char(text, room) };
        self.bytes[self.len..self.len + take].copy_from_slice(&text.as_bytes()[..take]);
        self.len += take;
        self.cut |= take < text.len();
        Ok(())
    }
}

/// The largest character boundary of `text` that is not above `at`.
fn floor_char(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// Shows a string as the inside of a JSON string.
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                c if (c as u32) < 0x20 || c as u32 == 0x7f => write!(f, "\\u{:04x}", c as u32)?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::fmt::Write;

    #[test]
    fn a_text_keeps_what_fits_and_says_that_it_was_cut() {
        let mut text = Text::<5>::new();
        write!(text, "abc").unwrap();
        assert!(!text.is_cut());
        write!(text, "dé!").unwrap();
        assert_eq!(text.as_str(), "abcd");
        assert!(text.is_cut());
        text.clear();
        assert_eq!(text.as_str(), "");
    }

    #[test]
    fn control_characters_and_quotes_are_escaped() {
        assert_eq!(format!("{}", Escaped("a\"b\\c\n")), "a\\\"b\\\\c\\u000a");
    }
}
