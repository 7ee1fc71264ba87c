//! Zones: the least and the greatest time of each block of documents, so that the newest lines are looked for where they can be.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tantivy::index::{SegmentId, SegmentReader};

use super::pass::{Times, times};
use crate::error::Result;

/// Documents of a zone.
pub(super) const DOCUMENTS: u32 = 1024;
/// Segments whose zones are remembered; with one more all are forgotten. 16 bytes for each 1,024 lines.
const MAX_SEGMENTS: usize = 2048;

/// The least and the greatest time of each zone, in ms.
pub(super) type Zones = Arc<[(i64, i64)]>;

/// Remembers the zones of segments, which never change.
#[derive(Debug, Default)]
pub(super) struct ZoneCache(Mutex<HashMap<SegmentId, Zones>>);

impl ZoneCache {
    /// Those of a segment.
    pub(super) fn of(&self, reader: &SegmentReader) -> Result<Zones> {
        if let Some(known) = self.0.lock().get(&reader.segment_id()) {
            return Ok(known.clone());
        }
        let zones = read(&times(reader)?, reader.max_doc());
        let mut cache = self.0.lock();
        if cache.len() >= MAX_SEGMENTS {
            cache.clear();
        }
        cache.insert(reader.segment_id(), zones.clone());
        Ok(zones)
    }
}

fn read(times: &Times, documents: u32) -> Zones {
    let mut buffer = [0; DOCUMENTS as usize];
    let starts = (0..documents).step_by(DOCUMENTS as usize);
    let zone = |start: u32| {
        let values = &mut buffer[..(documents - start).min(DOCUMENTS) as usize];
        times.get_range(u64::from(start), values);
        values.iter().fold((i64::MAX, i64::MIN), |(min, max), ms| (min.min(*ms), max.max(*ms)))
    };
    starts.map(zone).collect()
}
