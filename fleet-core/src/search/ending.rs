//! Phrases whose last word is only a beginning. tantivy's own one leaves out words when there are many, and does not tell.

use tantivy::index::SegmentReader;
use tantivy::query::{EnableScoring, Explanation, PhrasePrefixQuery, Query, Scorer, Weight};
use tantivy::{DocId, Score, TantivyError, Term as Key};

use super::compile::behind;

/// Most words of a segment that the last word may stand for.
pub(super) const MAX_ENDINGS: u32 = 1000;

/// At least two words one behind the other, of which the last is a beginning; refused where too many words begin so.
#[derive(Debug, Clone)]
pub(super) struct PhraseEnding {
    keys: Vec<Key>,
}

impl PhraseEnding {
    pub(super) fn new(keys: Vec<Key>) -> Self {
        Self { keys }
    }
}

impl Query for PhraseEnding {
    fn weight(&self, scoring: EnableScoring<'_>) -> tantivy::Result<Box<dyn Weight>> {
        let mut phrase = PhrasePrefixQuery::new(self.keys.clone());
        phrase.set_max_expansions(MAX_ENDINGS);
        let last =
            self.keys.last().cloned().ok_or_else(|| TantivyError::InternalError("a phrase of no words".into()))?;
        Ok(Box::new(EndingWeight { phrase: phrase.weight(scoring)?, last }))
    }
}

struct EndingWeight {
    phrase: Box<dyn Weight>,
    last: Key,
}

impl EndingWeight {
    fn check(&self, reader: &SegmentReader) -> tantivy::Result<()> {
        let index = reader.inverted_index(self.last.field())?;
        let mut range = index.terms().range().ge(self.last.serialized_value_bytes());
        if let Some(behind) = behind(&self.last) {
            range = range.lt(behind.serialized_value_bytes());
        }
        let (mut stream, mut count) = (range.into_stream()?, 0);
        while stream.advance() {
            count += 1;
            if count > MAX_ENDINGS {
                let told =
                    format!("more than {MAX_ENDINGS} words begin as the last one of a phrase: expected more of it");
                return Err(TantivyError::InvalidArgument(told));
            }
        }
        Ok(())
    }
}

impl Weight for EndingWeight {
    fn scorer(&self, reader: &SegmentReader, boost: Score) -> tantivy::Result<Box<dyn Scorer>> {
        self.check(reader)?;
        self.phrase.scorer(reader, boost)
    }

    fn explain(&self, reader: &SegmentReader, doc: DocId) -> tantivy::Result<Explanation> {
        self.phrase.explain(reader, doc)
    }
}
