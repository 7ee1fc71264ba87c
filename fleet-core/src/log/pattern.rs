//! Patterns: what messages have in common that differ only in what they are about.
//!
//! [`of`] puts `*` for numbers, hexadecimal, addresses, times and what stands in quotes. Holds: it is total; messages that differ
//! in nothing but such parts have one pattern, and so one [`Pattern::hash`], which is stored in the index and therefore never
//! changes its meaning. Of a long message only the beginning of its pattern counts.

use unicode_normalization::char::is_combining_mark;

/// Most bytes of a pattern's text; what follows in the message is not looked at.
pub const MAX_BYTES: usize = 1024;

/// What stands for a part that varies.
const VARIABLE: char = '*';
/// Between two parts that vary these are part of one: `10.0.0.1:80`, `2026-11-20T10:00:00`, `1,000`.
const JOINTS: [char; 7] = ['.', ':', '-', '+', ',', '/', '_'];
/// From how many digits on letters alone are hexadecimal.
const HEX_LENGTH: usize = 8;

/// What some messages have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pattern(String);

impl Pattern {
    /// It, with `*` for what varies.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// As queries name it: [`Self::hash`] in 16 hexadecimal digits.
    pub fn id(&self) -> String {
        format!("{:016x}", self.hash())
    }

    /// A number that stands for it: FNV-1a with 64 bits of its text.
    pub fn hash(&self) -> u64 {
        self.0
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    }
}

/// The pattern of a message.
pub fn of(message: &str) -> Pattern {
    let mut reader =
        Reader { rest: message, before: None, text: String::new(), unclosed: [false; QUOTES.len()], colons: None };
    while reader.text.len() < MAX_BYTES && reader.step() {}
    let mut text = reader.text;
    text.truncate(text.trim_end().len());
    text.truncate(text.floor_char_boundary(MAX_BYTES));
    Pattern(text)
}

const QUOTES: [char; 3] = ['"', '\'', '`'];

struct Reader<'a> {
    rest: &'a str,
    /// The character before the rest.
    before: Option<char>,
    text: String,
    /// Quotes of which no other one follows, so that nobody looks for it twice.
    unclosed: [bool; QUOTES.len()],
    /// The run of hexadecimal digits and colons that was looked at last, so that nobody looks through it twice.
    colons: Option<Colons>,
}

/// Where in a run of hexadecimal digits and colons an address may begin; each place is told by how much of the message is left there.
#[derive(Debug, Clone, Copy)]
struct Colons {
    /// Behind the run.
    end: usize,
    /// Whether a word goes on behind it.
    is_open: bool,
    /// From its last group of more than four digits on, no address begins before the end of that group.
    long: Option<usize>,
    /// The last digit: without one there is no address.
    digit: Option<usize>,
    /// The last colon but one: there must be two.
    colon: Option<usize>,
}

impl Colons {
    /// Of the run that a text begins with.
    fn of(rest: &str) -> Self {
        let length = rest.bytes().take_while(|b| b.is_ascii_hexdigit() || *b == b':').count();
        let (run, behind) = rest.split_at(length);
        let left = |at: usize| rest.len() - at;
        let (mut at, mut long) = (0, None);
        for digits in groups(run.as_bytes(), b':') {
            if digits > 4 {
                long = Some(left(at));
            }
            at += digits + 1;
        }
        Self {
            end: behind.len(),
            is_open: behind.chars().next().is_some_and(is_part),
            long,
            digit: run.rfind(|c: char| c.is_ascii_hexdigit()).map(left),
            colon: run.rmatch_indices(':').nth(1).map(|(at, _)| left(at)),
        }
    }

    /// Whether the run from where so much is left is an address.
    fn is_address(self, left: usize) -> bool {
        !self.is_open
            && self.long.is_none_or(|long| left < long)
            && self.digit.is_some_and(|digit| digit <= left)
            && self.colon.is_some_and(|colon| colon <= left)
    }
}

impl Reader<'_> {
    /// Reads the next part; `false` at the end.
    fn step(&mut self) -> bool {
        let Some(c) = self.rest.chars().next() else { return false };
        if c.is_whitespace() {
            self.blank(c);
        } else if let Some(length) = self.quoted(c).or_else(|| self.address()).or_else(|| self.signed(c)) {
            self.variable(length);
        } else {
            let length = run(self.rest);
            if length > 0 && varies(&self.rest[..length]) {
                self.variable(length);
            } else {
                self.literal(length.max(c.len_utf8()));
            }
        }
        true
    }

    fn pass(&mut self, length: usize) -> &str {
        let (part, rest) = self.rest.split_at(length);
        self.rest = rest;
        self.before = part.chars().next_back();
        part
    }

    /// Blanks align what varies in width, so several are one.
    fn blank(&mut self, c: char) {
        self.pass(c.len_utf8());
        if !self.text.is_empty() && !self.text.ends_with(' ') {
            self.text.push(' ');
        }
    }

    fn literal(&mut self, length: usize) {
        let part = self.pass(length).to_owned();
        self.text.push_str(&part);
    }

    fn variable(&mut self, length: usize) {
        self.pass(length);
        let joined = self.text.trim_end_matches(JOINTS);
        if joined.ends_with(VARIABLE) {
            self.text.truncate(joined.len());
        } else {
            self.text.push(VARIABLE);
        }
    }

    fn is_at_start_of_word(&self) -> bool {
        self.before.is_none_or(|c| !is_part(c))
    }

    /// How long the quoted text is that begins here. A quote in a word, as in "don't", begins none.
    fn quoted(&mut self, quote: char) -> Option<usize> {
        let which = QUOTES.iter().position(|q| *q == quote)?;
        if self.unclosed[which] || !self.is_at_start_of_word() {
            return None;
        }
        let mut chars = self.rest.char_indices().skip(1).peekable();
        while let Some((at, c)) = chars.next() {
            if c == '\\' {
                chars.next();
            } else if c == quote && chars.peek().is_none_or(|(_, c)| !is_part(*c)) {
                return Some(at + c.len_utf8());
            }
        }
        self.unclosed[which] = true;
        None
    }

    /// How long the UUID, or the IPv6 or hardware address is that begins here.
    fn address(&mut self) -> Option<usize> {
        let bytes = self.rest.as_bytes();
        let is_begin = self.is_at_start_of_word() && (bytes[0].is_ascii_hexdigit() || bytes[0] == b':');
        if !is_begin {
            return None;
        }
        let length = bytes.iter().take(37).take_while(|b| b.is_ascii_hexdigit() || **b == b'-').count();
        if length == 36 && groups(&bytes[..36], b'-').eq([8, 4, 4, 4, 12]) {
            return Some(36);
        }
        let left = self.rest.len();
        let known = self.colons.filter(|colons| colons.end < left);
        let colons = known.unwrap_or_else(|| Colons::of(self.rest));
        self.colons = Some(colons);
        colons.is_address(left).then(|| left - colons.end)
    }

    /// How long the number is that begins here with a sign.
    fn signed(&self, sign: char) -> Option<usize> {
        let digits = self.rest.strip_prefix(['-', '+'])?;
        let is_number = self.is_at_start_of_word() && digits.starts_with(char::is_numeric);
        is_number.then(|| sign.len_utf8() + run(digits))
    }
}

fn groups(bytes: &[u8], between: u8) -> impl Iterator<Item = usize> {
    bytes.split(move |b| *b == between).map(<[u8]>::len)
}

/// How many bytes of letters, digits and marks a text begins with. An ideograph or kana is alone, since no blanks stand there.
fn run(text: &str) -> usize {
    let is_alone = |c: char| c >= '\u{3040}' && crate::words::is_alone(c);
    let mut length = 0;
    for c in text.chars() {
        if !is_part(c) || is_alone(c) && length > 0 {
            break;
        }
        length += c.len_utf8();
        if is_alone(c) {
            break;
        }
    }
    length
}

fn is_part(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_alphanumeric() } else { c.is_alphanumeric() || is_combining_mark(c) }
}

/// Whether a word is a number, an identifier with one in it, or hexadecimal.
fn varies(word: &str) -> bool {
    word.chars().any(char::is_numeric) || word.len() >= HEX_LENGTH && word.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    #[test]
    fn what_varies_is_a_star() {
        for (message, pattern) in [
            ("reconnect 3", "reconnect *"),
            ("took 12.5ms, -3 °C, +7 %", "took *, * °C, * %"),
            ("  5 of   10 done\n", "* of * done"),
            ("from 10.0.0.1:8080 at 2026-11-20T10:00:00.123+02:00", "from * at *"),
            ("peer fe80::1 and ::1 and aa:bb:cc:dd:ee:ff", "peer * and * and *"),
            ("id 0af7651916cd43dd8448eb211c80319c, 0x1F", "id *, *"),
            ("update deadbeef-dead-beef-dead-beefdeadbeef: deadbeef", "update *: *"),
            ("file \"a b.txt\" don't 'x y' `z`", "file * don't * *"),
            ("an \"open quote, don't care", "an \"open quote, don't care"),
            ("std::fmt bad:cafe pump-7 eth0 sensor_12", "std::fmt bad:cafe pump-* * sensor_*"),
            ("list [1, 2] and 1,000,000", "list [*, *] and *"),
            ("温度42高 שלום ٣ e\u{301}x", "温度*高 שלום * e\u{301}x"),
            ("", ""),
            ("  ", ""),
        ] {
            assert_eq!(of(message).text(), pattern, "{message}");
        }
    }

    #[test]
    fn the_number_of_a_pattern_never_changes() {
        // They are stored: who changes them rebuilds every index.
        assert_eq!(of("").hash(), 0xcbf2_9ce4_8422_2325);
        assert_eq!(of("reconnect 3").hash(), of("reconnect 41").hash());
        assert_eq!(of("a").hash(), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn of_a_long_message_the_beginning_counts() {
        let long = "ab ".repeat(MAX_BYTES);
        assert_eq!(of(&long), of(&(long.clone() + "end")));
        assert!(of(&"温".repeat(MAX_BYTES)).text().len() <= MAX_BYTES);
        let quotes = "'a".repeat(16_384) + &"\"a \\".repeat(8_192);
        assert!(of(&quotes).text().len() <= MAX_BYTES);
    }

    fn number() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<i64>().prop_map(|n| n.to_string()),
            (-1e9..1e9).prop_map(|n: f64| n.to_string()),
            "[1-9][0-9]{0,2}(,[0-9]{3}){0,2}",
            "[0-9]{1,4}(ms|s|kB|%)?".prop_map(|n| n.trim_end_matches('%').to_owned()),
        ]
    }

    fn variable() -> impl Strategy<Value = String> {
        prop_oneof![
            number(),
            "[0-9a-f]{8,40}",
            "0x[0-9A-F]{1,8}",
            any::<u128>().prop_map(|n| uuid::Uuid::from_u128(n).to_string()),
            any::<[u8; 4]>().prop_map(|ip| std::net::Ipv4Addr::from(ip).to_string()),
            any::<[u16; 8]>().prop_map(|ip| std::net::Ipv6Addr::from(ip.map(|group| group.max(1))).to_string()),
            any::<[u8; 6]>().prop_map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
            "\"[a-z 0-9.é]{0,9}\"",
            "'[a-z 0-9.é]{0,9}'",
        ]
    }

    fn literal() -> impl Strategy<Value = &'static str> {
        select(vec![
            "reconnect ",
            "after (",
            ") ",
            " = [",
            "] and ",
            "温度 ",
            " שלום=",
            " — ",
            " e\u{301}t ",
            ": ",
            " don't ",
        ])
    }

    /// How long the address is that a text begins with, by its definition.
    fn address(text: &str) -> Option<usize> {
        let length = text.bytes().take_while(|b| b.is_ascii_hexdigit() || *b == b':').count();
        let (address, behind) = text.split_at(length);
        let colons = address.matches(':').count();
        let fits = address.split(':').all(|digits| digits.len() <= 4) && (2..length).contains(&colons);
        (fits && !behind.starts_with(is_part)).then_some(length)
    }

    proptest! {
        #[test]
        fn an_address_is_known_wherever_the_run_is_looked_at(text in "[a-f0-9:z .\\[]{1,40}") {
            let mut reader = Reader { rest: &text, before: None, text: String::new(), unclosed: [false; 3], colons: None };
            while let Some(c) = reader.rest.chars().next() {
                if reader.is_at_start_of_word() && (c.is_ascii_hexdigit() || c == ':') {
                    let wanted = address(reader.rest);
                    prop_assert_eq!(reader.address(), wanted, "{:?} of {:?}", reader.rest, text);
                }
                reader.pass(c.len_utf8());
            }
        }

        #[test]
        fn any_text_has_a_pattern(text in any::<String>()) {
            let once = of(&text);
            prop_assert!(once.text().len() <= MAX_BYTES);
            prop_assert_eq!(&of(&text), &once);
        }

        #[test]
        fn messages_that_differ_in_what_varies_have_one(
            parts in vec((literal(), variable(), variable()), 1..6),
        ) {
            let said = |which: fn(&(&'static str, String, String)) -> String| {
                parts.iter().map(|part| format!("{}{}", part.0, which(part))).collect::<Vec<_>>().join(" ")
            };
            let (one, other) = (said(|part| part.1.clone()), said(|part| part.2.clone()));
            prop_assert_eq!(of(&one), of(&other));
        }
    }
}
