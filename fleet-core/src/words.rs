//! Words: what of a text can be searched for.
//!
//! [`words`] divides a text; the index, the matcher and the parser of queries all divide by it, so they mean the same words.
//! Holds: case, width and composition of characters make no difference (NFKC, lower case). Letters, digits and the marks on them
//! make a word; each ideograph or kana is one by itself, since such text has no blanks.

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

/// Characters of a word that count; what follows in it is not looked at.
pub const MAX_WORD_CHARS: usize = 128;

/// A word of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// As it is compared.
    pub text: String,
    /// Where it begins in the text, in bytes.
    pub start: usize,
    /// Where it ends.
    pub end: usize,
}

/// The words of a text in their order.
pub fn words(text: &str) -> impl Iterator<Item = Word> + '_ {
    let mut rest = text.char_indices().peekable();
    std::iter::from_fn(move || {
        let (start, first) = rest.find(|(_, c)| is_part(*c))?;
        let mut end = start + first.len_utf8();
        while let Some((at, c)) = rest.next_if(|(_, c)| goes_on(first, *c)) {
            end = at + c.len_utf8();
        }
        Some(Word { text: compared(&text[start..end]), start, end })
    })
}

fn compared(word: &str) -> String {
    if word.is_ascii() {
        // There is nothing to compose, and a character is a byte: most words of most logs.
        return word[..word.len().min(MAX_WORD_CHARS)].to_ascii_lowercase();
    }
    // Lower case can be decomposed (İ), so composing comes last too.
    word.nfkc().flat_map(char::to_lowercase).nfkc().take(MAX_WORD_CHARS).collect()
}

fn is_part(c: char) -> bool {
    c.is_alphanumeric()
}

fn goes_on(first: char, c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_alphanumeric() && !is_alone(first);
    }
    is_combining_mark(c) || is_part(c) && !is_alone(first) && !is_alone(c)
}

/// Ideographs and kana.
pub(crate) fn is_alone(c: char) -> bool {
    matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str) -> Vec<String> {
        words(text).map(|word| word.text).collect()
    }

    #[test]
    fn what_looks_the_same_is_the_same_word() {
        assert_eq!(of("net.wifi: Reconnect-3"), ["net", "wifi", "reconnect", "3"]);
        assert_eq!(of("CAFÉ"), of("cafe\u{301}"));
        assert_eq!(of("ｗｉｆｉ ﬁx"), ["wifi", "fix"]);
        assert_eq!(of("שלום עולם"), ["שלום", "עולם"]);
        assert_eq!(of("温度高 ok"), ["温", "度", "高", "ok"]);
        assert_eq!(of("İstanbul"), of("i\u{307}stanbul"));
        assert!(of(" -- … ").is_empty());
    }

    #[test]
    fn of_a_long_word_only_the_beginning_counts() {
        assert_eq!(of(&"a".repeat(MAX_WORD_CHARS + 5)), of(&"a".repeat(MAX_WORD_CHARS)));
    }

    proptest! {
        #[test]
        fn plain_words_are_compared_as_all_others_are(word in "[0-9A-Za-z]{1,140}") {
            let slowly = word.nfkc().flat_map(char::to_lowercase).nfkc().take(MAX_WORD_CHARS).collect::<String>();
            prop_assert_eq!(compared(&word), slowly);
        }

        #[test]
        fn a_word_is_where_it_says(text in ".{0,60}") {
            let mut behind = 0;
            for word in words(&text) {
                prop_assert!(behind <= word.start && word.start < word.end);
                prop_assert_eq!(of(&text[word.start..word.end]), vec![word.text]);
                behind = word.end;
            }
        }
    }
}
