//! Files of devices: CSV, a JSON array, or JSON line by line.
//!
//! Holds: whatever is in the file, every row of it is either read or told to be wrong, with what was expected; nothing
//! beyond the bound on rows is read. Spreadsheets' habits are known: a byte order mark, CRLF, a leading `'` before what would be
//! a formula; their semicolons are refused, with a word about it.

use std::collections::BTreeMap;
use std::str::FromStr;

use csv::{ByteRecord, ReaderBuilder};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Errors, Import, Row};
use crate::device::{Labels, NewDevice};
use crate::id::DeviceId;

/// Columns of a CSV file.
const MAX_COLUMNS: usize = 256;
const BOM: &[u8] = b"\xEF\xBB\xBF";
const LABEL_COLUMN: &str = "labels.";
const COLUMNS: &str = "id, type, group, gateway, or labels. with the key of a label behind it";

/// What a file is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Comma separated, the first line names the columns (RFC 4180).
    Csv,
    /// A JSON array of objects.
    Json,
    /// A JSON object a line.
    JsonLines,
}

/// A row as it was written.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    id: Option<String>,
    r#type: Option<String>,
    group: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    gateway: Option<String>,
}

/// Reads at most `max_rows` rows of a file.
pub fn read(format: Format, file: &[u8], max_rows: usize) -> Import {
    let mut reader = Reader { import: Import::default(), max_rows };
    if file.starts_with(b"\xFF\xFE") || file.starts_with(b"\xFE\xFF") {
        reader.refuse(&"the file is UTF-16: expected UTF-8");
        return reader.import;
    }
    let file = file.strip_prefix(BOM).unwrap_or(file);
    match format {
        Format::Csv => reader.csv(file),
        Format::Json => reader.json(file),
        Format::JsonLines => reader.json_lines(file),
    }
    if reader.import.count == 0 && reader.import.errors.is_empty() {
        reader.refuse(&"the file has no rows: expected at least one device");
    }
    reader.import
}

struct Reader {
    import: Import,
    max_rows: usize,
}

impl Reader {
    fn errors(&mut self) -> &mut Errors {
        &mut self.import.errors
    }

    /// The file as a whole is wrong.
    fn refuse(&mut self, error: &impl ToString) {
        self.errors().add(1, None, error);
    }

    /// Counts a row; `false` when there are too many.
    fn has_room(&mut self) -> bool {
        self.import.is_too_long = self.import.count == self.max_rows;
        if self.import.is_too_long {
            return false;
        }
        self.import.count += 1;
        true
    }

    // JSON

    fn json(&mut self, file: &[u8]) {
        let rows = match serde_json::from_slice::<Vec<&RawValue>>(file) {
            Ok(rows) => rows,
            Err(error) => return self.refuse(&format!("expected a JSON array of objects: {error}")),
        };
        for (place, row) in (1..).zip(rows) {
            if !self.has_room() {
                return;
            }
            self.object(place, row.get().as_bytes());
        }
    }

    fn json_lines(&mut self, file: &[u8]) {
        for (line, text) in (1..).zip(file.split(|byte| *byte == b'\n')) {
            let text = text.trim_ascii();
            if text.is_empty() {
                continue;
            }
            if !self.has_room() {
                return;
            }
            self.object(line, text);
        }
    }

    fn object(&mut self, line: u64, text: &[u8]) {
        // Serde would take an array for a struct as well, member by member.
        if !text.starts_with(b"{") {
            return self.errors().add(line, None, &"expected a JSON object such as {\"id\": \"boiler-1\"}");
        }
        match serde_json::from_slice::<Written>(text) {
            Ok(written) => self.row(line, written),
            Err(error) => self.errors().add(line, None, &error),
        }
    }

    // CSV

    fn csv(&mut self, file: &[u8]) {
        let mut csv = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(file);
        let mut record = ByteRecord::new();
        let mut lines = Lines { file, at: 0, line: 1 };
        let columns = match csv.read_byte_record(&mut record) {
            Ok(true) => match columns(&record) {
                Ok(columns) => columns,
                Err(error) => return self.refuse(&error),
            },
            Ok(false) => return,
            Err(error) => return self.refuse(&error),
        };
        loop {
            match csv.read_byte_record(&mut record) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.refuse(&error),
            }
            let line = lines.of(&record);
            // A spreadsheet writes rows that were emptied as commas.
            if record.iter().all(<[u8]>::is_empty) {
                continue;
            }
            if !self.has_room() {
                return;
            }
            match cells(&columns, &record) {
                Ok(written) => self.row(line, written),
                Err(error) => self.errors().add(line, None, &error),
            }
        }
    }

    // Both

    /// Checks each value by itself, so that all that is wrong with a row is told at once.
    fn row(&mut self, line: u64, written: Written) {
        let Written { id: given, r#type, group, labels, gateway } = written;
        let mut wrong = Vec::new();
        if given.is_none() {
            wrong.push("id: expected one".to_owned());
        }
        let id = value::<DeviceId>("id", given.as_ref(), &mut wrong);
        let kind = value("type", r#type.as_ref(), &mut wrong);
        let group = value("group", group.as_ref(), &mut wrong);
        let gateway = value("gateway", gateway.as_ref(), &mut wrong);
        let labels =
            Labels::try_from(labels).map_err(|error| wrong.push(format!("labels: {error}"))).unwrap_or_default();
        if let Some(id) = &id {
            let before = *self.import.first.entry(id.clone()).or_insert(line);
            if before != line {
                wrong.push(format!("id: {id} is in line {before} already"));
            }
        }
        for error in &wrong {
            self.errors().add(line, given.as_deref(), error);
        }
        if let Some(id) = id.filter(|_| wrong.is_empty()) {
            self.import.rows.push(Row { line, device: NewDevice { id, kind, group, labels, gateway } });
        }
    }
}

fn value<T: FromStr<Err: ToString>>(column: &str, given: Option<&String>, wrong: &mut Vec<String>) -> Option<T> {
    given?.parse().map_err(|error: T::Err| wrong.push(format!("{column}: {}", error.to_string()))).ok()
}

/// Counts lines. The reader of CSV does too, but takes the LF of a CRLF for a part of the next record.
struct Lines<'a> {
    file: &'a [u8],
    at: usize,
    line: u64,
}

impl Lines<'_> {
    /// Where a record begins; records are to be asked for in their order.
    fn of(&mut self, record: &ByteRecord) -> u64 {
        let begins = record.position().and_then(|position| usize::try_from(position.byte()).ok()).unwrap_or_default();
        while let Some(byte) = self.file.get(self.at)
            && (self.at < begins || matches!(byte, b'\r' | b'\n'))
        {
            self.line += u64::from(*byte == b'\n');
            self.at += 1;
        }
        self.line
    }
}

/// What a column of a CSV file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Column {
    Id,
    Type,
    Group,
    Gateway,
    Label(String),
}

fn columns(header: &ByteRecord) -> Result<Vec<Column>, String> {
    if header.len() > MAX_COLUMNS {
        return Err(format!("{} columns: expected at most {MAX_COLUMNS}", header.len()));
    }
    let mut columns = Vec::new();
    for name in header {
        let name = str::from_utf8(name).map_err(|_| "the first line is not UTF-8".to_owned())?.trim();
        let column = match name {
            "id" => Column::Id,
            "type" => Column::Type,
            "group" => Column::Group,
            "gateway" => Column::Gateway,
            name => match name.strip_prefix(LABEL_COLUMN) {
                Some(key) if !key.is_empty() => Column::Label(key.to_owned()),
                _ => return Err(no_column(name)),
            },
        };
        if columns.contains(&column) {
            return Err(format!("column {name:?} is there twice: expected once"));
        }
        columns.push(column);
    }
    if columns.contains(&Column::Id) { Ok(columns) } else { Err(format!("expected a column id among {COLUMNS}")) }
}

fn no_column(name: &str) -> String {
    let shown = name.chars().take(80).collect::<String>();
    match name {
        name if name.contains(';') => "the columns are separated by semicolons: expected commas".to_owned(),
        name if name.contains('\t') => "the columns are separated by tabs: expected commas".to_owned(),
        _ => format!("column {shown:?} is not known: expected {COLUMNS}"),
    }
}

/// An empty cell says nothing.
fn cells(columns: &[Column], record: &ByteRecord) -> Result<Written, String> {
    if record.len() != columns.len() {
        return Err(format!("{} cells: expected {}, as the first line has", record.len(), columns.len()));
    }
    let mut written = Written::default();
    for (column, cell) in columns.iter().zip(record) {
        let cell = str::from_utf8(cell).map_err(|_| "the line is not UTF-8".to_owned())?;
        if cell.contains('\n') {
            return Err("a cell holds a line break: is there a quote that does not end?".to_owned());
        }
        if cell.is_empty() {
            continue;
        }
        let name = Some(unguarded(cell).to_owned());
        match column {
            Column::Id => written.id = name,
            Column::Type => written.r#type = name,
            Column::Group => written.group = name,
            Column::Gateway => written.gateway = name,
            Column::Label(key) => {
                written.labels.insert(key.clone(), cell.to_owned());
            }
        }
    }
    Ok(written)
}

/// A name without the mark by which a spreadsheet is told that it is text, as [`super::guarded`] sets it.
fn unguarded(cell: &str) -> &str {
    cell.strip_prefix('\'').unwrap_or(cell)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn csv(text: &str) -> Import {
        read(Format::Csv, text.as_bytes(), 100)
    }

    fn ids(import: &Import) -> Vec<(u64, &str)> {
        import.rows.iter().map(|row| (row.line, row.device.id.as_str())).collect()
    }

    fn errors(import: Import) -> Vec<(u64, String)> {
        import.errors.listed().into_iter().map(|error| (error.line, error.error)).collect()
    }

    /// The one thing that is wrong with a file.
    fn wrong(import: Import) -> String {
        let mut errors = errors(import);
        assert_eq!(errors.len(), 1, "{errors:?}");
        errors.remove(0).1
    }

    #[test]
    fn a_spreadsheets_file_is_read() {
        let text = "\u{feff}id, type ,group,labels.site,labels.a/b,gateway\r\n\
                    gw-1,gateway,oslo/harbour,\"Oslo, \"\"Harbour\"\"\",,\r\n\
                    ,,,,,\r\n\
                    '-1,,,,x,gw-1\r\n";
        let import = csv(text);
        assert_eq!(ids(&import), [(2, "gw-1"), (4, "-1")]);
        assert_eq!(import.rows(), 2);
        let first = &import.rows[0].device;
        assert_eq!(first.kind.as_ref().unwrap().as_str(), "gateway");
        assert_eq!(first.group.as_ref().unwrap().as_str(), "oslo/harbour");
        assert_eq!(first.labels.as_map()["site"], "Oslo, \"Harbour\"");
        assert_eq!(first.labels.as_map().len(), 1, "an empty cell says nothing");
        assert_eq!(import.rows[1].device.gateway.as_ref().unwrap().as_str(), "gw-1");
        assert!(import.errors.is_empty());
    }

    #[test]
    fn what_spreadsheets_do_otherwise_is_refused_with_a_word() {
        for (file, said) in [
            ("id;type\nd;x\n", "semicolons"),
            ("sep=;\nid;type\n", "semicolons"),
            ("id\ttype\n", "tabs"),
            ("boiler-1,boiler\n", "\"boiler-1\" is not known: expected id, type"),
            ("type\nboiler\n", "expected a column id"),
            ("id,id\nd,d\n", "twice"),
            ("id,labels.\nd,d\n", "\"labels.\" is not known"),
            ("id,labels.a,labels.a\nd,1,2\n", "twice"),
            ("id\n", "no rows"),
            ("", "no rows"),
            ("id,type\nd\n", "1 cells: expected 2"),
            ("id,type\nd,a,b\n", "3 cells: expected 2"),
            ("id,labels.a\nd,\"x\nd2,y\n", "quote that does not end"),
        ] {
            let error = wrong(csv(file));
            assert!(error.contains(said), "{file:?}: {error}");
        }
        assert!(wrong(csv(&",".repeat(MAX_COLUMNS))).contains("at most 256"));
        assert!(wrong(read(Format::Csv, b"\xFF\xFEi\0d\0", 9)).contains("UTF-8"));
        assert!(wrong(read(Format::Csv, b"id\nd\xE5\n", 9)).contains("UTF-8"));
        assert!(wrong(read(Format::Csv, b"i\xE5d\nd\n", 9)).contains("UTF-8"));
    }

    #[test]
    fn all_that_is_wrong_is_told_by_its_line() {
        let text = "id,type,group,labels.x y,gateway\n\
                    a,,,,\n\
                    _b,x y,/,1,a/b\n\
                    ,x,,,\n\
                    a,,,,\n";
        let import = csv(text);
        assert_eq!((ids(&import), import.rows()), (vec![(2, "a")], 4));
        let listed = import.errors.clone().listed();
        assert_eq!(listed[0].id.as_deref(), Some("_b"));
        let told = errors(import).into_iter().map(|(line, error)| format!("{line} {error}")).collect::<Vec<_>>();
        let beginnings = [
            "3 id:",
            "3 type:",
            "3 group:",
            "3 gateway:",
            "3 labels:",
            "4 id: expected one",
            "5 id: a is in line 2 already",
        ];
        assert_eq!(told.len(), beginnings.len(), "{told:?}");
        for (told, beginning) in told.iter().zip(beginnings) {
            assert!(told.starts_with(beginning), "{told}: {beginning}");
        }
    }

    #[test]
    fn json_is_read_as_an_array_and_line_by_line() {
        let array = br#" [{"id":"a","labels":{"x":""}},{"id":"b","gateway":"a","type":null}] "#;
        let import = read(Format::Json, array, 9);
        assert_eq!(ids(&import), [(1, "a"), (2, "b")]);
        assert_eq!(import.rows[0].device.labels.as_map()["x"], "", "an empty label is a label");
        let lines = b"\xEF\xBB\xBF{\"id\":\"a\"}\r\n\r\n {\"id\":\"b\"}";
        assert_eq!(ids(&read(Format::JsonLines, lines, 9)), [(1, "a"), (3, "b")]);
        for (file, said) in [
            (&br#"{"id":"a"}"#[..], "JSON array"),
            (b"[", "JSON array"),
            (b"[]", "no rows"),
            (b"[[\"a\"]]", "JSON object"),
            (b"[{\"id\":\"a\",\"labels\":{\"x\":1}}]", "expected a string"),
            (b"[{\"id\":\"a\",\"site\":\"x\"}]", "unknown field"),
            (b"[{}]", "id: expected one"),
            (b"[{\"id\":null}]", "id: expected one"),
            (b"[{\"id\":\"a\",\"id\":\"b\"}]", "duplicate field"),
        ] {
            let error = wrong(read(Format::Json, file, 9));
            assert!(error.contains(said), "{}: {error}", String::from_utf8_lossy(file));
        }
        assert!(wrong(read(Format::JsonLines, b"{\"id\":\"a\"}{}", 9)).contains("trailing"));
    }

    #[test]
    fn rows_and_told_errors_are_bounded() {
        let file = |rows: usize| format!("id\n{}", "_\n".repeat(rows));
        let import = read(Format::Csv, file(200).as_bytes(), 200);
        assert!(!import.is_too_long);
        assert_eq!((import.errors.count(), import.errors.listed().len()), (200, super::super::MAX_LISTED));
        let import = read(Format::Csv, file(201).as_bytes(), 200);
        assert!(import.is_too_long && import.rows() == 200);
        assert!(read(Format::Json, b"[{\"id\":\"a\"},{\"id\":\"b\"}]", 1).is_too_long);
        assert!(read(Format::JsonLines, b"{\"id\":\"a\"}\n{\"id\":\"b\"}", 1).is_too_long);
    }

    fn any_device() -> impl Strategy<Value = (String, String, String)> {
        ("[A-Za-z0-9.-][A-Za-z0-9._-]{1,9}", "[a-z]{0,5}", "[^\\x00-\\x1f\\x7f-\\x9f]{0,20}")
    }

    proptest! {
        #[test]
        fn no_file_panics_and_every_row_is_read_or_wrong(
            file in "(id|type|labels\\.a|,|\"|\\r\\n|\\n|;|\\{\"id\":\"a\"\\}|\\[|\\]|\\PC){0,40}", format in 0..3,
        ) {
            let format = [Format::Csv, Format::Json, Format::JsonLines][usize::try_from(format).unwrap()];
            let import = read(format, file.as_bytes(), 10);
            let right = import.rows.len();
            prop_assert!(right <= import.rows() && import.rows() <= 10);
            prop_assert!(right == import.rows() && right > 0 || import.is_too_long || !import.errors.is_empty());
        }

        #[test]
        fn devices_are_read_as_they_were_written(devices in proptest::collection::vec(any_device(), 1..20)) {
            let mut csv = csv::WriterBuilder::new().from_writer(Vec::new());
            csv.write_record(["labels.x", "id", "type"]).unwrap();
            let mut json = Vec::new();
            for (place, (id, kind, label)) in devices.iter().enumerate() {
                let id = format!("{place}{id}");
                csv.write_record([label, &id, kind]).unwrap();
                json.push(serde_json::json!({"id": id, "labels": {"x": label}}));
            }
            let import = read(Format::Csv, &csv.into_inner().unwrap(), 20);
            prop_assert!(import.errors.is_empty(), "{:?}", import.errors);
            let lines = json.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
            let other = read(Format::JsonLines, lines.as_bytes(), 20);
            for (place, (id, kind, label)) in devices.iter().enumerate() {
                let device = &import.rows[place].device;
                prop_assert_eq!(device.id.as_str(), format!("{place}{id}"));
                prop_assert_eq!(device.kind.as_ref().map_or("", |kind| kind.as_str()), kind);
                prop_assert_eq!(device.labels.as_map().get("x").map_or("", String::as_str), label);
                prop_assert_eq!(&other.rows[place].device.labels.as_map()["x"], label);
            }
        }
    }
}
