//! What of a line is in the index, and how: the fields, their tokenizer, and the document of a line.
//!
//! Nothing is stored: a document leads to its line by `ts`, `writer` and `place`. Whatever is changed here changes [`FORMAT`] with it.

use std::collections::{BTreeMap, HashSet};
use std::sync::LazyLock;

use serde_json::Value;
use tantivy::TantivyDocument;
use tantivy::schema::{
    FAST, Field, INDEXED, IndexRecordOption, JsonObjectOptions, NumericOptions, OwnedValue, Schema, TextFieldIndexing,
    TextOptions,
};
use tantivy::tokenizer::{TextAnalyzer, Token, TokenStream, Tokenizer, TokenizerManager};

use crate::log::{Line, pattern};
use crate::words::{Word, words};

/// What an index is made by; one of another format is made anew.
pub const FORMAT: u32 = 1;
/// The tokenizer by [`crate::words`].
pub const WORDS: &str = "words";
/// Longest text that is counted for top values, in bytes; a longer one is a sentence and not a value.
pub const MAX_COLUMN_BYTES: usize = 256;

const RAW: &str = "raw";

/// The fields of a document.
#[derive(Debug)]
pub struct Fields {
    /// All of them.
    pub schema: Schema,
    /// The tenant's key: `u64`, indexed.
    pub tenant: Field,
    /// The device's key: `u64`, indexed and a column.
    pub device: Field,
    /// The time in ms since the epoch: `i64`, a column.
    pub ts: Field,
    /// Who stored the line: `u64`, a column.
    pub writer: Field,
    /// Where among what it stored: `u64`, a column.
    pub place: Field,
    /// [`crate::level::Level::number`]: `u64`, indexed and a column.
    pub level: Field,
    /// The target as a whole, indexed and a column.
    pub target: Field,
    /// The trace id as a whole, indexed.
    pub trace: Field,
    /// The words of the message, with their positions.
    pub message: Field,
    /// [`crate::log::pattern::Pattern::hash`]: `u64`, indexed and a column.
    pub pattern: Field,
    /// Each field by its name: the words of texts, with their positions; numbers and flags. A path is one flat name. Numbers went in
    /// as `f64`, of which tantivy indexes whole ones as `i64` (`u64` above its greatest).
    pub fields: Field,
    /// Each field by its name as a column, numbers as `f64`; only the first so many names of a day ([`Columns`]), only short texts.
    pub columns: Field,
    /// What the line has, by the names of the query language: `target`, `trace_id`, `fields.NAME`.
    pub names: Field,
    /// What is true of the line: `cut`, `clamped`.
    pub flags: Field,
}

/// The fields; they are the same for every index.
pub static FIELDS: LazyLock<Fields> = LazyLock::new(Fields::new);

impl Fields {
    fn new() -> Self {
        let mut schema = Schema::builder();
        let both = || NumericOptions::default().set_indexed().set_fast();
        let raw = || TextOptions::default().set_indexing_options(indexing(RAW, IndexRecordOption::Basic));
        let words = || indexing(WORDS, IndexRecordOption::WithFreqsAndPositions);
        Self {
            tenant: schema.add_u64_field("tenant", INDEXED),
            device: schema.add_u64_field("device", both()),
            ts: schema.add_i64_field("ts", FAST),
            writer: schema.add_u64_field("writer", FAST),
            place: schema.add_u64_field("place", FAST),
            level: schema.add_u64_field("level", both()),
            target: schema.add_text_field("target", raw().set_fast(RAW)),
            trace: schema.add_text_field("trace", raw()),
            message: schema.add_text_field("message", TextOptions::default().set_indexing_options(words())),
            pattern: schema.add_u64_field("pattern", both()),
            fields: schema.add_json_field("fields", JsonObjectOptions::default().set_indexing_options(words())),
            columns: schema.add_json_field("columns", JsonObjectOptions::default().set_fast(RAW)),
            names: schema.add_text_field("names", raw()),
            flags: schema.add_text_field("flags", raw()),
            schema: schema.build(),
        }
    }
}

fn indexing(tokenizer: &str, record: IndexRecordOption) -> TextFieldIndexing {
    TextFieldIndexing::default().set_tokenizer(tokenizer).set_index_option(record).set_fieldnorms(false)
}

/// The tokenizers that the fields name.
pub fn tokenizers() -> TokenizerManager {
    // With those of tantivy: `raw` is among them, and `default`, which it wants for fields that have none.
    let manager = TokenizerManager::default();
    manager.register(WORDS, TextAnalyzer::from(WordTokenizer));
    manager
}

/// The names of a day that have a column.
#[derive(Debug, Clone, Default)]
pub struct Columns {
    names: HashSet<String>,
    most: usize,
    /// Values that got none, for want of a place.
    pub refused: u64,
}

impl Columns {
    /// Those that a day has already; more come in up to `most`.
    pub fn new(names: impl IntoIterator<Item = String>, most: usize) -> Self {
        Self { names: names.into_iter().collect(), most, refused: 0 }
    }

    /// The names, in their order.
    pub fn names(&self) -> Vec<&str> {
        let mut names = self.names.iter().map(String::as_str).collect::<Vec<_>>();
        names.sort_unstable();
        names
    }

    fn take(&mut self, name: &str) -> bool {
        if self.names.contains(name) {
            return true;
        }
        if self.names.len() >= self.most {
            self.refused += 1;
            return false;
        }
        self.names.insert(name.to_owned())
    }
}

/// The document of a line.
pub fn document(line: &Line, columns: &mut Columns) -> TantivyDocument {
    let f = &*FIELDS;
    let mut document = TantivyDocument::new();
    document.add_u64(f.tenant, line.tenant.0.cast_unsigned());
    document.add_u64(f.device, line.device.0.cast_unsigned());
    document.add_i64(f.ts, line.address.ts_ms);
    document.add_u64(f.writer, u64::from(line.address.writer.cast_unsigned()));
    document.add_u64(f.place, line.address.place.cast_unsigned());
    document.add_u64(f.level, u64::from(line.level.number().cast_unsigned()));
    document.add_text(f.message, &line.message);
    document.add_u64(f.pattern, pattern::of(&line.message).hash());
    if let Some(target) = &line.target {
        document.add_text(f.target, target);
        document.add_text(f.names, "target");
    }
    if let Some(trace) = &line.trace {
        document.add_text(f.trace, trace);
        document.add_text(f.names, "trace_id");
    }
    if line.cut.is_any() {
        document.add_text(f.flags, "cut");
    }
    if line.sent_at_ms.is_some() {
        document.add_text(f.flags, "clamped");
    }
    add_fields(&mut document, line, columns);
    document
}

fn add_fields(document: &mut TantivyDocument, line: &Line, columns: &mut Columns) {
    let (mut indexed, mut column) = (BTreeMap::new(), BTreeMap::new());
    for (name, value) in &line.fields {
        let values = owned(value);
        if values.is_empty() {
            continue;
        }
        document.add_text(FIELDS.names, format!("fields.{name}"));
        let short = values.iter().filter(|value| is_short(value)).cloned().collect::<Vec<_>>();
        if !short.is_empty() && columns.take(name) {
            column.insert(name.clone(), OwnedValue::Array(short));
        }
        indexed.insert(name.clone(), OwnedValue::Array(values));
    }
    if !indexed.is_empty() {
        document.add_object(FIELDS.fields, indexed);
    }
    if !column.is_empty() {
        document.add_object(FIELDS.columns, column);
    }
}

/// The scalars of a field. Numbers are `f64`, as they are to a matcher in memory.
fn owned(value: &Value) -> Vec<OwnedValue> {
    match value {
        Value::Null | Value::Object(_) => Vec::new(),
        Value::Bool(flag) => vec![OwnedValue::Bool(*flag)],
        Value::Number(number) => number.as_f64().map(OwnedValue::F64).into_iter().collect(),
        Value::String(text) => vec![OwnedValue::Str(text.clone())],
        Value::Array(values) => values.iter().flat_map(owned).collect(),
    }
}

fn is_short(value: &OwnedValue) -> bool {
    !matches!(value, OwnedValue::Str(text) if text.len() > MAX_COLUMN_BYTES)
}

/// Divides as [`words`] does.
#[derive(Debug, Clone, Copy)]
struct WordTokenizer;

struct Words<'a> {
    words: Box<dyn Iterator<Item = Word> + 'a>,
    token: Token,
}

impl Tokenizer for WordTokenizer {
    type TokenStream<'a> = Words<'a>;

    fn token_stream<'a>(&'a mut self, text: &'a str) -> Words<'a> {
        Words { words: Box::new(words(text)), token: Token::default() }
    }
}

impl TokenStream for Words<'_> {
    fn advance(&mut self) -> bool {
        let Some(Word { text, start, end }) = self.words.next() else { return false };
        // The first one wraps from the default to 0.
        let position = self.token.position.wrapping_add(1);
        self.token = Token { offset_from: start, offset_to: end, position, text, position_length: 1 };
        true
    }

    fn token(&self) -> &Token {
        &self.token
    }

    fn token_mut(&mut self) -> &mut Token {
        &mut self.token
    }
}
