//! What writes: the days that are open for it, and how far they are.
//!
//! Holds: a day is committed together with the places up to which it has everything, so a line that is read again after a crash or a
//! failure is not added again. What is known besides ([`Followed`]) is replaced only after all days were committed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::ops::Bound;
use std::path::PathBuf;

use chrono::NaiveDate;
use serde::{Deserialize, Serialize};
use tantivy::indexer::{IndexWriterOptions, LogMergePolicy};
use tantivy::query::{Query, RangeQuery};
use tantivy::{IndexWriter, TantivyError, Term};

use super::day::{self, Name, Opened};
use super::schema::{Columns, FIELDS, FORMAT, document};
use super::{FOLLOWED, Followed, Places, Shown};
use crate::Result;
use crate::config::Search;
use crate::log::Line;

/// Threads that merge, for each day that is open.
const MERGE_THREADS: usize = 1;
/// A segment of which more than this was deleted is written anew.
const DELETED_RATIO: f32 = 0.3;

/// What a commit of a day says about itself.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Payload {
    /// All lines of the day up to these places are in it.
    places: Places,
    /// The names that have a column.
    columns: Vec<String>,
}

impl Payload {
    pub(super) fn of(index: &tantivy::Index) -> Result<Self> {
        let text = index.load_metas()?.payload.unwrap_or_default();
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }
}

/// A day that is open for writing.
pub(super) struct Writing {
    pub(super) name: Name,
    writer: IndexWriter,
    columns: Columns,
    /// Lines up to these places are in it already.
    had: Places,
    is_touched: bool,
}

impl Writing {
    pub(super) fn open(name: Name, opened: &Opened, settings: &Search) -> Result<Self> {
        let Payload { places, columns } = Payload::of(&opened.index)?;
        let options = IndexWriterOptions::builder()
            .num_worker_threads(settings.writer_threads)
            .num_merge_threads(MERGE_THREADS)
            .memory_budget_per_thread(settings.writer_bytes)
            .build();
        let writer = opened.index.writer_with_options(options)?;
        let mut policy = LogMergePolicy::default();
        policy.set_del_docs_ratio_before_merge(DELETED_RATIO);
        writer.set_merge_policy(Box::new(policy));
        let columns = Columns::new(columns, settings.max_columns);
        Ok(Self { name, writer, columns, had: places, is_touched: false })
    }

    /// Adds a line, unless it is there.
    pub(super) fn add(&mut self, line: &Line) -> Result<bool> {
        let address = line.address;
        if self.had.get(&address.writer).is_some_and(|had| address.place <= *had) {
            return Ok(false);
        }
        self.put(line)?;
        Ok(true)
    }

    /// Adds a line of which it is known that it is not there.
    fn put(&mut self, line: &Line) -> Result<()> {
        self.is_touched = true;
        self.writer.add_document(document(line, &mut self.columns))?;
        Ok(())
    }

    fn delete(&mut self, query: Box<dyn Query>) -> Result<()> {
        self.is_touched = true;
        self.writer.delete_query(query)?;
        Ok(())
    }

    /// Writes what was added, with the places up to which there is nothing else to add.
    pub(super) fn commit(&mut self, places: &Places) -> Result<()> {
        let columns = self.columns.names().into_iter().map(ToOwned::to_owned).collect();
        let payload = serde_json::to_string(&Payload { places: places.clone(), columns });
        let mut prepared = self.writer.prepare_commit()?;
        prepared.set_payload(&payload.expect("numbers and names are JSON"));
        prepared.commit()?;
        self.is_touched = false;
        Ok(())
    }

    /// Ends merges that are under way, and closes it.
    pub(super) fn close(self) -> Result<()> {
        Ok(self.writer.wait_merging_threads()?)
    }
}

/// What a round of writing came to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Added {
    pub(super) lines: u64,
    /// Values without a column.
    pub(super) without_column: u64,
    /// Days that were closed to open others.
    pub(super) closed: u64,
}

/// All that writes the index. Whoever holds it is alone with the directory.
pub(super) struct Writers {
    pub(super) dir: PathBuf,
    settings: Search,
    /// None before rows were followed for the first time.
    pub(super) followed: Option<Followed>,
    /// Up to where lines were added, committed or not.
    pub(super) reached: Places,
    pub(super) opened: BTreeMap<Name, Opened>,
    /// Those that were used last are at the end.
    writing: Vec<Writing>,
    /// Lines that were not committed yet.
    pub(super) uncommitted: u64,
    /// Set while it works; found set, the work ended in the middle.
    pub(super) is_at_work: bool,
}

impl Writers {
    /// Opens the days that there are; says which had to be given up, and have to be made anew.
    pub(super) fn open(dir: PathBuf, settings: Search, followed: Option<Followed>) -> Result<(Self, BTreeSet<Name>)> {
        day::heal(&dir)?;
        let (opened, writing) = (BTreeMap::new(), Vec::new());
        let mut writers = Self {
            dir,
            settings,
            followed,
            reached: Places::new(),
            opened,
            writing,
            uncommitted: 0,
            is_at_work: false,
        };
        writers.abandon();
        let mut broken = BTreeSet::new();
        if writers.followed.is_none() {
            return Ok((writers, broken));
        }
        writers.drop_days_before(writers.first())?;
        for name in day::names(&writers.dir)? {
            if let Err(error) = writers.opened(name) {
                tracing::error!(day = %name, %error, "a day of the index cannot be read; it is made anew");
                writers.remove(name)?;
                writers.opened(name)?;
                broken.insert(name);
            }
        }
        Ok((writers, broken))
    }

    /// Begins from nothing: lines of days from `first` on get a directory each.
    pub(super) fn begin(&mut self, first: NaiveDate) -> Result<()> {
        self.abandon();
        for name in day::names(&self.dir)? {
            self.remove(name)?;
        }
        self.opened.clear();
        self.reached = Places::new();
        self.save(Followed { format: FORMAT, first, places: Places::new() })
    }

    pub(super) fn first(&self) -> NaiveDate {
        self.followed.as_ref().map(|followed| followed.first).unwrap_or_default()
    }

    /// Adds lines of one writer, all there are up to `reached`, in the order of their places.
    pub(super) fn add(&mut self, lines: &[Line], writer: i16, reached: i64) -> Result<Added> {
        let first = self.first();
        let mut days = BTreeMap::<Name, Vec<&Line>>::new();
        for line in lines {
            days.entry(Name::at(line.address.ts_ms, first)).or_default().push(line);
        }
        self.reached.insert(writer, reached);
        let mut added = Added::default();
        // Open days first: whoever opens another may have to commit one of them, which must have all of its lines by then.
        let (open, closed): (Vec<_>, Vec<_>) = days.into_iter().partition(|(name, _)| self.is_open(*name));
        for (name, lines) in open.into_iter().chain(closed) {
            added.closed += self.make_room_for(name)?;
            let writing = self.writing(name)?;
            let refused = writing.columns.refused;
            for line in lines {
                added.lines += u64::from(writing.add(line)?);
            }
            added.without_column += writing.columns.refused - refused;
        }
        self.uncommitted += added.lines;
        Ok(added)
    }

    fn is_open(&self, name: Name) -> bool {
        self.writing.iter().any(|writing| writing.name == name)
    }

    /// Closes the days that were not written for longest, until another one may be opened; says how many.
    fn make_room_for(&mut self, name: Name) -> Result<u64> {
        let mut closed = 0;
        while !self.is_open(name) && self.writing.len() >= self.settings.open_days {
            let mut writing = self.writing.remove(0);
            if writing.is_touched {
                writing.commit(&self.reached)?;
                self.opened[&writing.name].reader.reload()?;
            }
            closed += 1;
        }
        Ok(closed)
    }

    /// A day, open for writing.
    fn writing(&mut self, name: Name) -> Result<&mut Writing> {
        let at = self.writing.iter().position(|writing| writing.name == name);
        let writing = if let Some(at) = at {
            self.writing.remove(at)
        } else {
            let opened = self.opened(name)?.clone();
            Writing::open(name, &opened, &self.settings)?
        };
        self.writing.push(writing);
        Ok(self.writing.last_mut().expect("it was just put there"))
    }

    fn opened(&mut self, name: Name) -> Result<&Opened> {
        if !self.opened.contains_key(&name) {
            self.opened.insert(name, day::open(&self.dir, name)?);
        }
        Ok(&self.opened[&name])
    }

    /// Commits all that was added, and then notes how far that is.
    pub(super) fn commit(&mut self) -> Result<()> {
        let mut committed = Vec::new();
        for writing in self.writing.iter_mut().filter(|writing| writing.is_touched) {
            writing.commit(&self.reached)?;
            committed.push(writing.name);
        }
        for name in committed {
            self.opened[&name].reader.reload()?;
        }
        self.uncommitted = 0;
        match &self.followed {
            Some(followed) if followed.places != self.reached => {
                let followed = Followed { places: self.reached.clone(), ..followed.clone() };
                self.save(followed)
            }
            _ => Ok(()),
        }
    }

    /// Replaces what is known besides the days, as a whole.
    pub(super) fn save(&mut self, followed: Followed) -> Result<()> {
        let text = serde_json::to_vec(&followed).expect("numbers and dates are JSON");
        let written = self.dir.join(format!("{FOLLOWED}.new"));
        let write = || {
            let mut file = File::create(&written)?;
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&written, self.dir.join(FOLLOWED))?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(TantivyError::from)?;
        self.followed = Some(followed);
        Ok(())
    }

    /// Forgets what was not committed. It is read again.
    pub(super) fn abandon(&mut self) {
        self.writing.clear();
        self.uncommitted = 0;
        self.is_at_work = false;
        self.reached = self.followed.as_ref().map(|followed| followed.places.clone()).unwrap_or_default();
    }

    /// What can be searched now.
    pub(super) fn shown(&self) -> Shown {
        let first = self.first();
        let days = self.opened.iter().map(|(name, opened)| (*name, opened.shown(*name, first)));
        let places = self.followed.as_ref().map(|followed| followed.places.clone()).unwrap_or_default();
        Shown { days: days.collect(), places }
    }

    /// Deletes a day with all that is in it.
    pub(super) fn remove(&mut self, name: Name) -> Result<()> {
        self.writing.retain(|writing| writing.name != name);
        self.opened.remove(&name);
        day::remove(&self.dir, &name.to_string())
    }

    /// Deletes from a day the lines of these devices.
    pub(super) fn delete_devices(&mut self, name: Name, devices: &[u64]) -> Result<()> {
        self.make_room_for(name)?;
        let writing = self.writing(name)?;
        for device in devices {
            writing.is_touched = true;
            writing.writer.delete_term(Term::from_field_u64(FIELDS.device, *device));
        }
        Ok(())
    }

    /// Deletes from [`Name::Other`] the lines from one time to before another.
    pub(super) fn delete_other(&mut self, from: Bound<i64>, to_ms: i64) -> Result<()> {
        if !self.opened.contains_key(&Name::Other) {
            return Ok(());
        }
        let term = |ts_ms| Term::from_field_i64(FIELDS.ts, ts_ms);
        let range = RangeQuery::new(from.map(term), Bound::Excluded(term(to_ms)));
        self.make_room_for(Name::Other)?;
        self.writing(Name::Other)?.delete(Box::new(range))
    }

    /// Begins to move the oldest day that has a directory up to `first`. What there is, or comes, of the days in between belongs to
    /// [`Name::Other`] then.
    pub(super) fn begin_move(&mut self, first: NaiveDate) -> Result<()> {
        self.commit()?;
        // They are there already if this was begun before and did not end.
        let (from, to) = (Name::Of(self.first()).span(first).0, Name::Of(first).span(first).0);
        self.delete_other(Bound::Included(from), to)
    }

    /// Adds lines of the days in between.
    pub(super) fn add_late(&mut self, late: &[Line]) -> Result<()> {
        if late.is_empty() {
            return Ok(());
        }
        self.make_room_for(Name::Other)?;
        let other = self.writing(Name::Other)?;
        late.iter().try_for_each(|line| other.put(line))
    }

    /// Ends what [`Self::begin_move`] began, and drops the days in between.
    pub(super) fn end_move(&mut self, first: NaiveDate) -> Result<()> {
        self.commit()?;
        let Some(followed) = self.followed.clone() else { return Ok(()) };
        self.save(Followed { first, ..followed })?;
        self.drop_days_before(first)
    }

    /// Drops the days that have no directory of their own any more.
    pub(super) fn drop_days_before(&mut self, first: NaiveDate) -> Result<()> {
        let is_before = |name: &Name| matches!(name, Name::Of(day) if *day < first);
        for name in day::names(&self.dir)?.into_iter().filter(is_before) {
            self.remove(name)?;
        }
        Ok(())
    }

    /// Puts the directory `name.new`, which has everything up to the places that were reached, in the place of a day's.
    pub(super) fn swap(&mut self, name: Name) -> Result<()> {
        self.writing.retain(|writing| writing.name != name);
        self.opened.remove(&name);
        day::swap(&self.dir, name)?;
        self.opened(name).map(drop)
    }
}
