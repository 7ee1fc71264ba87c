//! How far each writer has come, in memory and as a text to come back with.

use crate::authority::Pki;
use crate::error::{Error, Result};
use crate::id::TenantKey;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Longest text that is looked at, in bytes.
const MAX_TEXT_BYTES: usize = 4096;
/// Bytes of one writer.
const WRITER_BYTES: usize = 10;

/// The place up to which the lines of each writer were seen; of a writer that is not among them: none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Positions(Vec<(i16, i64)>);

impl FromIterator<(i16, i64)> for Positions {
    fn from_iter<I: IntoIterator<Item = (i16, i64)>>(places: I) -> Self {
        let mut positions = Self::default();
        places.into_iter().for_each(|(writer, place)| positions.advance(writer, place));
        positions
    }
}

impl Positions {
    /// The place of a writer.
    pub fn of(&self, writer: i16) -> i64 {
        self.0.iter().find(|(known, _)| *known == writer).map_or(0, |(_, place)| *place)
    }

    /// Moves a writer on; never back.
    pub fn advance(&mut self, writer: i16, place: i64) {
        match self.0.iter_mut().find(|(known, _)| *known == writer) {
            Some((_, known)) => *known = place.max(*known),
            None => self.0.push((writer, place)),
        }
    }

    /// Each writer with its place.
    pub(super) fn iter(&self) -> impl Iterator<Item = (i16, i64)> {
        self.0.iter().copied()
    }

    /// Moves on to where `other` is, where that is further.
    pub(super) fn merge(&mut self, other: &Self) {
        other.iter().for_each(|(writer, place)| self.advance(writer, place));
    }

    /// Whether all that is up to `other` was seen.
    pub(super) fn covers(&self, other: &Self) -> bool {
        other.iter().all(|(writer, place)| self.of(writer) >= place)
    }

    /// Places between it and `last`.
    pub(super) fn behind(&self, last: &Self) -> i64 {
        let behind = last.iter().map(|(writer, last)| last.saturating_sub(self.of(writer)).max(0));
        behind.fold(0, i64::saturating_add)
    }

    /// It, with no place that is beyond `last`: of another database, or one that was restored.
    pub(super) fn within(&self, last: &Self) -> Self {
        last.iter().map(|(writer, last)| (writer, self.of(writer).clamp(0, last))).collect()
    }

    /// It moved on, so that at most `most` places are between it and `last`, as many of each writer.
    pub(super) fn at_most_behind(&self, last: &Self, most: i64) -> Self {
        let share = most / i64::try_from(last.0.len().max(1)).unwrap_or(i64::MAX);
        last.iter().map(|(writer, last)| (writer, self.of(writer).max(last - share))).collect()
    }

    /// It as a text that says nothing to anybody: how much is written is a matter of all tenants.
    ///
    /// # Errors
    /// [`Error::Seal`] when the file with the key cannot be used.
    pub fn seal(&self, pki: &Pki, tenant: TenantKey) -> Result<String> {
        let bytes =
            self.0.iter().flat_map(|(writer, place)| [&writer.to_be_bytes()[..], &place.to_be_bytes()].concat());
        let sealed = pki.seal().seal(&context(tenant), &bytes.collect::<Vec<_>>())?;
        Ok(URL_SAFE_NO_PAD.encode(sealed))
    }

    /// What was sealed for the same tenant.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it was not.
    pub fn open(text: &str, pki: &Pki, tenant: TenantKey) -> Result<Self> {
        let refused = || Error::Invalid("expected the id of an event of an earlier tail".into());
        let sealed = (text.len() <= MAX_TEXT_BYTES).then(|| URL_SAFE_NO_PAD.decode(text).ok()).flatten();
        let bytes = pki.seal().open(&context(tenant), &sealed.ok_or_else(refused)?).map_err(|_| refused())?;
        let (writers, rest) = bytes.as_chunks::<WRITER_BYTES>();
        if !rest.is_empty() {
            return Err(refused());
        }
        Ok(writers
            .iter()
            .map(|[a, b, place @ ..]| (i16::from_be_bytes([*a, *b]), i64::from_be_bytes(*place)))
            .collect())
    }
}

fn context(tenant: TenantKey) -> Vec<u8> {
    [&b"log-tail"[..], &tenant.0.to_be_bytes()].concat()
}
