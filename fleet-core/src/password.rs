//! Passwords that people choose: which are refused, by the rules of NIST SP 800-63B.
//!
//! Holds: length is what counts, and no kind of character is asked for; refused are the commonest, the e-mail address, and
//! what is only repeated or counted. Ignorant of: hashes, users.

use std::collections::HashSet;
use std::sync::LazyLock;

use crate::config::{Auth, Secret};
use crate::error::{Error, Result};

/// Longest password, in bytes.
pub const MAX_BYTES: usize = 1024;
/// Shortest that `auth.min_password_chars` may be.
pub const LEAST_CHARS: usize = 8;

/// What `password/common.txt` holds.
static COMMON: LazyLock<HashSet<&str>> =
    LazyLock::new(|| include_str!("password/common.txt").lines().filter(|line| !line.starts_with('#')).collect());

/// Refuses a password that is too short, too long, or among the first that somebody would try for this address.
pub fn check(password: &Secret, email: &str, auth: &Auth) -> Result<()> {
    let (text, least) = (password.expose(), auth.min_password_chars);
    if text.chars().count() < least {
        return Err(Error::Invalid(format!("password is too short: expected at least {least} characters")));
    }
    check_length(password)?;
    let text = text.to_lowercase();
    if is_common(&text) {
        return Err(Error::Invalid("password is one of the commonest: expected another one".into()));
    }
    if is_of(&text, email) {
        let why = "password is little more than the e-mail address: expected something that has nothing to do with it";
        return Err(Error::Invalid(why.into()));
    }
    Ok(())
}

/// Refuses what is too long to be looked at.
pub fn check_length(password: &Secret) -> Result<()> {
    if password.expose().len() > MAX_BYTES {
        return Err(Error::Invalid(format!("password is too long: expected at most {MAX_BYTES} bytes")));
    }
    Ok(())
}

fn is_common(text: &str) -> bool {
    let unit = unit(text);
    unit.chars().count() <= 3 || is_sequence(text) || COMMON.contains(text) || COMMON.contains(unit)
}

/// What the text repeats, or all of it.
fn unit(text: &str) -> &str {
    let ends = text.char_indices().map(|(at, _)| at).skip(1);
    let repeats = |unit: &str| text.len().is_multiple_of(unit.len()) && text == unit.repeat(text.len() / unit.len());
    ends.map(|end| &text[..end]).find(|unit| repeats(unit)).unwrap_or(text)
}

/// Whether each character is the one after, or the one before, its neighbour; 0 comes after 9.
fn is_sequence(text: &str) -> bool {
    let follows = |(a, b): (char, char)| u32::from(b) == u32::from(a) + 1 || (a, b) == ('9', '0');
    let pairs = || text.chars().zip(text.chars().skip(1));
    pairs().all(follows) || pairs().all(|(a, b)| follows((b, a)))
}

/// Whether too little is left without the address, its parts and the name of this software.
fn is_of(text: &str, email: &str) -> bool {
    let email = email.trim().to_lowercase();
    let (local, domain) = email.split_once('@').unwrap_or((&email, ""));
    let mut left = text.to_owned();
    for known in [&email, local, domain, "muster"].into_iter().filter(|known| known.chars().count() >= 3) {
        left = left.replace(known, "");
    }
    left.len() < text.len() && left.chars().count() < LEAST_CHARS
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::config::{Config, Environment};

    fn refusal(password: &str, least: usize) -> Option<String> {
        let auth = Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap().auth;
        let auth = Auth { min_password_chars: least, ..auth };
        let checked = check(&Secret::from(password.to_owned()), "Ada.Lovelace@example.com", &auth);
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn length_is_what_counts() {
        assert!(refusal("fourteen chars", 15).unwrap().contains("at least 15"));
        for fine in ["fifteen chars !", "all lower case will do", "日本語のパスワードは十五文字", "a b c d e f g h i j"]
        {
            assert_eq!(refusal(fine, 14), None, "{fine}");
        }
        assert_eq!(refusal("a long sentence ".repeat(64).trim(), 15), None);
        assert!(refusal(&"é".repeat(513), 15).unwrap().contains("at most 1024 bytes"));
    }

    #[test]
    fn what_is_tried_first_is_refused() {
        for common in ["password", "PassWord", "qwertyuiop", "passwordpassword", "aaaaaaaaaaaaaaaa", "abababababab"] {
            assert!(refusal(common, 8).unwrap().contains("commonest"), "{common}");
        }
        for counted in ["12345678901234567890", "abcdefghijklmnop", "0987654321098765", "zyxwvutsrqponml"] {
            assert!(refusal(counted, 15).unwrap().contains("commonest"), "{counted}");
        }
        for mine in ["ada.lovelace@example.com", "ADA.LOVELACE2025", "example.com-muster", "mustermuster-12"] {
            assert!(refusal(mine, 8).unwrap().contains("e-mail address"), "{mine}");
        }
        assert_eq!(refusal("ada.lovelace wrote the first program", 15), None);
    }

    proptest! {
        #[test]
        fn any_text_may_be_a_password(text in ".{0,80}") {
            refusal(&text, 8);
        }

        #[test]
        fn what_repeats_is_found(piece in "[a-z]{1,6}", times in 2_usize..9) {
            let text = piece.repeat(times);
            let found = unit(&text);
            prop_assert!(found.len() <= piece.len());
            prop_assert_eq!(found.repeat(text.len() / found.len()), text);
        }
    }
}
