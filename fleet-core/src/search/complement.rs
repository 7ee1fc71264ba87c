//! All documents but those of another query. tantivy's own exclusion asks phrases for documents that they have passed, which they do
//! not answer.

use tantivy::index::SegmentReader;
use tantivy::query::{EnableScoring, Explanation, Query, Scorer, Weight};
use tantivy::{DocId, DocSet, Score, TERMINATED, TantivyError};

use super::compile::Boxed;

/// What the other does not find.
#[derive(Debug)]
pub(super) struct Complement(pub(super) Boxed);

impl Clone for Complement {
    fn clone(&self) -> Self {
        Self(self.0.box_clone())
    }
}

impl Query for Complement {
    fn weight(&self, scoring: EnableScoring<'_>) -> tantivy::Result<Box<dyn Weight>> {
        Ok(Box::new(ComplementWeight(self.0.weight(scoring)?)))
    }
}

struct ComplementWeight(Box<dyn Weight>);

impl Weight for ComplementWeight {
    fn scorer(&self, reader: &SegmentReader, boost: Score) -> tantivy::Result<Box<dyn Scorer>> {
        let mut others = Others { excluded: self.0.scorer(reader, boost)?, doc: 0, end: reader.max_doc() };
        others.settle();
        Ok(Box::new(others))
    }

    fn explain(&self, _: &SegmentReader, _: DocId) -> tantivy::Result<Explanation> {
        Err(TantivyError::InvalidArgument("lines have no score".to_owned()))
    }
}

struct Others {
    excluded: Box<dyn Scorer>,
    doc: DocId,
    end: DocId,
}

impl Others {
    /// Goes on from `doc` to the first that is not excluded.
    fn settle(&mut self) -> DocId {
        while self.doc < self.end {
            if self.excluded.doc() < self.doc {
                self.excluded.seek(self.doc);
            }
            if self.excluded.doc() != self.doc {
                return self.doc;
            }
            self.doc += 1;
        }
        self.doc = TERMINATED;
        TERMINATED
    }
}

impl DocSet for Others {
    fn advance(&mut self) -> DocId {
        self.seek(self.doc.saturating_add(1))
    }

    fn seek(&mut self, target: DocId) -> DocId {
        self.doc = target.max(self.doc);
        self.settle()
    }

    fn doc(&self) -> DocId {
        self.doc
    }

    fn size_hint(&self) -> u32 {
        self.end.saturating_sub(self.excluded.size_hint())
    }
}

impl Scorer for Others {
    fn score(&mut self) -> Score {
        1.0
    }
}
