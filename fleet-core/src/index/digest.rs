//! The sum of an index: what leads to which line, in one number.
//!
//! Each term of each document counts with its positions, and the address of the document's line, so that two indexes of the same lines
//! have the same sum however their documents are divided. Not in it: the columns for top values, which depend on what else there was.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use tantivy::index::SegmentReader;
use tantivy::postings::Postings;
use tantivy::schema::{Field, FieldType, IndexRecordOption, Type};
use tantivy::{DocSet, Searcher, TERMINATED, TantivyError};

use super::schema::FIELDS;
use crate::Result;

/// So many lines, and the sum of what leads to them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) lines: u64,
    pub(super) digest: u64,
}

impl Sum {
    pub(super) fn add(&mut self, other: Self) {
        self.lines += other.lines;
        self.digest = self.digest.wrapping_add(other.digest);
    }
}

/// Of all documents but those of these devices.
pub(super) fn sum(searcher: &Searcher, without: &BTreeSet<u64>) -> Result<Sum> {
    let mut sum = Sum::default();
    for segment in searcher.segment_readers() {
        let documents = documents(segment, without)?;
        for document in documents.iter().flatten() {
            sum.add(Sum { lines: 1, digest: *document });
        }
        for (field, entry) in FIELDS.schema.fields().filter(|(_, entry)| entry.is_indexed()) {
            let digest = terms(segment, field, entry.field_type(), &documents)?;
            sum.add(Sum { lines: 0, digest });
        }
    }
    Ok(sum)
}

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What stands for the line of each document: its address and its other columns. None where it was deleted, or does not count.
fn documents(segment: &SegmentReader, without: &BTreeSet<u64>) -> Result<Vec<Option<u64>>> {
    let columns = segment.fast_fields();
    let ts = columns.i64("ts")?;
    let numbers = ["writer", "place", "device", "level", "pattern"].map(|name| columns.u64(name));
    let [writer, place, device, level, pattern] = numbers;
    let [writer, place, device, level, pattern] = [writer?, place?, device?, level?, pattern?];
    let document = |doc| {
        let counts = !segment.is_deleted(doc) && device.first(doc).is_none_or(|device| !without.contains(&device));
        let numbers = [&writer, &place, &device, &level, &pattern].map(|column| column.first(doc));
        counts.then(|| hash((ts.first(doc), numbers)))
    };
    Ok((0..segment.max_doc()).map(document).collect())
}

fn terms(segment: &SegmentReader, field: Field, kind: &FieldType, documents: &[Option<u64>]) -> Result<u64> {
    let index = segment.inverted_index(field)?;
    let mut terms = index.terms().stream().map_err(TantivyError::from)?;
    let (mut digest, mut positions) = (0_u64, Vec::new());
    while let Some((key, info)) = terms.next() {
        let has_positions = has_positions(kind, key);
        let record = if has_positions { IndexRecordOption::WithFreqsAndPositions } else { IndexRecordOption::Basic };
        let term = hash((field.field_id(), key));
        let mut postings = index.read_postings_from_terminfo(info, record).map_err(TantivyError::from)?;
        while postings.doc() != TERMINATED {
            if let Some(document) = documents[postings.doc() as usize] {
                if has_positions {
                    postings.positions(&mut positions);
                }
                digest = digest.wrapping_add(hash((term, document, &positions)));
            }
            postings.advance();
        }
        positions.clear();
    }
    Ok(digest)
}

/// Whether it was noted where in a text a term stands: that of messages, and of texts in fields.
fn has_positions(kind: &FieldType, key: &[u8]) -> bool {
    match kind {
        FieldType::Str(options) => {
            options.get_indexing_options().is_some_and(|options| options.index_option().has_positions())
        }
        // The name, a zero byte, the kind of the value, the value.
        FieldType::JsonObject(_) => {
            key.iter().position(|byte| *byte == 0).and_then(|end| key.get(end + 1)) == Some(&Type::Str.to_code())
        }
        _ => false,
    }
}
