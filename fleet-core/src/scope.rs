//! Scopes: which devices of a tenant a binding is about.
//!
//! A [`Scope`] is what people write: the tenant, a group with all below it, or a selector. An [`Extent`] is what it is compiled
//! to, and what several of them come to together: every device, or those for which one of some [`Conjunction`]s holds. The same
//! extent is asked about one device ([`Extent::contains`]), and told to the database ([`Extent::setting`]), whose row-level
//! security keeps every query within it. Holds: both say the same of every device. Ignorant of: who has which scope.

use std::collections::BTreeMap;

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use sqlx::types::Json;

use crate::device::{DeviceType, GroupPath, Labels};
use crate::error::{Error, Result};
use crate::query::{Expression, Kind, Query, Schema, Term, Test};

/// Longest selector, in bytes.
pub const MAX_SELECTOR_BYTES: usize = 1024;
/// Most alternatives of one selector, when it is written as an `OR` of `AND`s.
pub const MAX_ALTERNATIVES: usize = 16;

/// Which devices a binding is about, as it is written and stored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Scope {
    /// All of the tenant, and what is about no device too.
    #[default]
    Tenant,
    /// The devices of a group and of the groups below it.
    Group {
        /// The path of the group.
        group: GroupPath,
    },
    /// The devices that a selector picks.
    Selector {
        /// It as text, see [`Selector`].
        selector: Selector,
    },
}

impl From<Json<Scope>> for Scope {
    fn from(scope: Json<Scope>) -> Self {
        scope.0
    }
}

impl Scope {
    /// What it is compiled to.
    pub fn extent(&self) -> Extent {
        match self {
            Self::Tenant => Extent::Everything,
            Self::Group { group } => {
                Extent::Any(vec![Conjunction { group: Some(group.clone()), ..Conjunction::default() }])
            }
            Self::Selector { selector } => Extent::Any(selector.alternatives.clone()),
        }
    }

    /// Whether it is about this group, or one below it, by name.
    pub fn names(&self, path: &GroupPath) -> bool {
        match self {
            Self::Tenant => false,
            Self::Group { group } => group.is_within(path),
            Self::Selector { selector } => selector.columns(path).is_ok_and(|columns| !columns.is_empty()),
        }
    }

    /// It, when the group `from` has become `to`.
    ///
    /// # Errors
    /// It would be too long.
    pub fn moved(&self, from: &GroupPath, to: &GroupPath) -> Result<Self> {
        Ok(match self {
            Self::Tenant => Self::Tenant,
            Self::Group { group } => Self::Group { group: group.moved(from, to)? },
            Self::Selector { selector } => Self::Selector { selector: selector.moved(from, to)? },
        })
    }
}

/// Picks devices by what people say of them: `type:freezer AND NOT (label.site:oslo OR group:site/line-3)`.
///
/// The query language over `type:`, `group:` (that group and all below it) and `label.KEY:`, each with a whole value: what a
/// device itself says, such as its firmware, cannot decide who may reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selector {
    text: String,
    alternatives: Vec<Conjunction>,
}

impl Selector {
    /// The devices it picks.
    pub fn extent(&self) -> Extent {
        Extent::Any(self.alternatives.clone())
    }
}

impl Selector {
    /// Where this group, or one below it, is named in the text. What is compiled forgets what says nothing more.
    fn columns(&self, from: &GroupPath) -> Result<Vec<usize>> {
        let query = Query::parse(&self.text, &SCHEMA, DateTime::UNIX_EPOCH)?;
        let mut columns = Vec::new();
        groups(query.expression(), &mut |term, path| {
            if path.parse::<GroupPath>().is_ok_and(|path| path.is_within(from)) {
                columns.push(term.column - 1);
            }
        });
        columns.sort_unstable();
        Ok(columns)
    }

    /// It, when the group `from` has become `to`; all else stays as it was written.
    fn moved(&self, from: &GroupPath, to: &GroupPath) -> Result<Self> {
        let mut text = self.text.chars().collect::<Vec<_>>();
        // From behind, so that what was read in front of it stays where it is.
        for column in self.columns(from)?.into_iter().rev() {
            let rest = text[column..].iter().collect::<String>();
            let value = rest.strip_prefix("group:").unwrap_or(&rest).trim_start().trim_start_matches('"');
            let at = column + rest[..rest.len() - value.len()].chars().count();
            if !value.starts_with(from.as_str()) {
                return Err(Error::Invalid(format!("the selector {:?} cannot be changed with its group", self.text)));
            }
            text.splice(at..at + from.as_str().len(), to.as_str().chars());
        }
        Self::try_from(text.into_iter().collect::<String>())
    }
}

/// The groups that an expression names.
fn groups(expression: &Expression, found: &mut impl FnMut(&Term, &str)) {
    match expression {
        Expression::All => {}
        Expression::Not(inner) => groups(inner, found),
        Expression::And(parts) | Expression::Or(parts) => parts.iter().for_each(|part| groups(part, found)),
        Expression::Term(term) => {
            if let Test::Within(path) = &term.test {
                found(term, path);
            }
        }
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.text
    }
}

impl TryFrom<String> for Selector {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        if text.len() > MAX_SELECTOR_BYTES {
            return Err(Error::Invalid(format!(
                "the selector is too long: expected at most {MAX_SELECTOR_BYTES} bytes"
            )));
        }
        if text.trim().is_empty() {
            return Err(refused(1, "one of type:, group:, label.NAME:"));
        }
        // There are no times in it for which now would matter.
        let query = Query::parse(&text, &SCHEMA, DateTime::UNIX_EPOCH)?;
        match picked(query.expression(), false)? {
            Extent::Everything => Err(refused(1, "a choice: the scope of all devices is the tenant")),
            Extent::Any(alternatives) if alternatives.is_empty() => {
                Err(refused(1, "what a device can be: this picks none"))
            }
            Extent::Any(alternatives) => Ok(Self { text, alternatives }),
        }
    }
}

impl std::str::FromStr for Selector {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::try_from(text.to_owned())
    }
}

const SCHEMA: Schema = Schema {
    noun: "selector",
    fields: &[("type", Kind::Name), ("group", Kind::Path)],
    families: &[("label.", Kind::Name)],
    words: None,
};

fn refused(column: usize, expected: &str) -> Error {
    Error::Invalid(format!("selector, column {column}: expected {expected}"))
}

/// What an expression picks, or what it does not; `NOT` is taken down to the terms (De Morgan).
fn picked(expression: &Expression, is_not: bool) -> Result<Extent> {
    let extent = match expression {
        Expression::All if is_not => Extent::NOTHING,
        Expression::All => Extent::Everything,
        Expression::Not(inner) => picked(inner, !is_not)?,
        Expression::Term(term) => {
            let one = conjunction(term)?;
            let one = if is_not { Conjunction { not: vec![one], ..Conjunction::default() } } else { one };
            Extent::Any(vec![one])
        }
        Expression::And(parts) if is_not => any_of(parts, is_not)?,
        Expression::Or(parts) if !is_not => any_of(parts, is_not)?,
        Expression::And(parts) | Expression::Or(parts) => {
            parts.iter().try_fold(Extent::Everything, |all, part| bounded(all.and(&picked(part, is_not)?)))?
        }
    };
    bounded(extent)
}

fn any_of(parts: &[Expression], is_not: bool) -> Result<Extent> {
    parts.iter().try_fold(Extent::NOTHING, |some, part| bounded(some.or(&picked(part, is_not)?)))
}

fn bounded(extent: Extent) -> Result<Extent> {
    match &extent {
        Extent::Any(some) if some.len() > MAX_ALTERNATIVES => {
            Err(refused(1, &format!("at most {MAX_ALTERNATIVES} alternatives, when it is written as an OR of ANDs")))
        }
        _ => Ok(extent),
    }
}

fn conjunction(term: &Term) -> Result<Conjunction> {
    let at = |error: Error| refused(term.column, &error.to_string());
    let mut one = Conjunction::default();
    match (&term.test, term.field.as_str()) {
        (Test::Within(path), _) => one.group = Some(path.parse().map_err(at)?),
        (Test::Is(kind), "type") => one.kind = Some(kind.parse().map_err(at)?),
        (Test::Is(value), field) => {
            let key = field.strip_prefix("label.").unwrap_or(field);
            let label = BTreeMap::from([(key.to_owned(), value.clone())]);
            one.labels = Labels::try_from(label).map_err(at)?.into();
        }
        _ => return Err(refused(term.column, &format!("the whole value of {}, without *", term.field))),
    }
    Ok(one)
}

/// What an extent asks about a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Its group.
    pub group: Option<GroupPath>,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: Option<DeviceType>,
    /// Its labels.
    pub labels: Labels,
}

/// What must be true of a device, all of it: in this group or below it, of this type, with these labels, and not such or such.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conjunction {
    /// In this group or below it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub group: Option<GroupPath>,
    /// Of this type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none", default)]
    pub kind: Option<DeviceType>,
    /// With these labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub labels: BTreeMap<String, String>,
    /// And for which none of these holds.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub not: Vec<Self>,
}

impl Conjunction {
    /// Whether it holds for a device.
    pub fn contains(&self, device: &Attributes) -> bool {
        let in_group =
            self.group.as_ref().is_none_or(|group| device.group.as_ref().is_some_and(|of| of.is_within(group)));
        in_group
            && self.kind.as_ref().is_none_or(|kind| device.kind.as_ref() == Some(kind))
            && self.labels.iter().all(|(key, value)| device.labels.as_map().get(key) == Some(value))
            && !self.not.iter().any(|not| not.contains(device))
    }

    /// See [`Extent::before_move`]; `None`: it holds for nothing that comes.
    fn before_move(&self, from: &GroupPath, to: &GroupPath) -> Option<Self> {
        let group = match &self.group {
            None => from.clone(),
            Some(group) if to.is_within(group) => from.clone(),
            Some(group) if group.is_within(to) => group.moved(to, from).ok()?,
            Some(_) => return None,
        };
        let not = self.not.iter().filter_map(|not| not.before_move(from, to)).collect();
        Some(Self { group: Some(group), not, ..self.clone() })
    }

    /// What holds when both do; `None` when they never do.
    fn and(&self, other: &Self) -> Option<Self> {
        let group = match (&self.group, &other.group) {
            (Some(a), Some(b)) if a.is_within(b) => Some(a.clone()),
            (Some(a), Some(b)) if b.is_within(a) => Some(b.clone()),
            (Some(_), Some(_)) => return None,
            (a, b) => a.clone().or_else(|| b.clone()),
        };
        let kind = match (&self.kind, &other.kind) {
            (Some(a), Some(b)) if a != b => return None,
            (a, b) => a.clone().or_else(|| b.clone()),
        };
        let mut labels = self.labels.clone();
        for (key, value) in &other.labels {
            if labels.insert(key.clone(), value.clone()).is_some_and(|old| old != *value) {
                return None;
            }
        }
        let mut not = self.not.clone();
        not.extend(other.not.iter().filter(|more| !self.not.contains(more)).cloned());
        let wanted = Self { group, kind, labels, not: Vec::new() };
        // What is already impossible need not be ruled out, and what is ruled out whole is nothing.
        not.retain(|not| wanted.and(not).is_some());
        (!not.iter().any(|not| not.covers(&wanted))).then_some(Self { not, ..wanted })
    }

    /// Whether it is seen to hold wherever `other` holds.
    fn covers(&self, other: &Self) -> bool {
        let rules_out = |not: &Self| other.and(not).is_none() || other.not.iter().any(|wider| wider.covers(not));
        self.not.iter().all(rules_out) && self.wants_no_more_than(other)
    }

    fn wants_no_more_than(&self, other: &Self) -> bool {
        self.group.as_ref().is_none_or(|group| other.group.as_ref().is_some_and(|of| of.is_within(group)))
            && self.kind.as_ref().is_none_or(|kind| other.kind.as_ref() == Some(kind))
            && self.labels.iter().all(|(key, value)| other.labels.get(key) == Some(value))
    }
}

/// Some of a tenant's devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// All there are, and what is about no device too.
    Everything,
    /// Those for which one of these holds; without any: none.
    Any(Vec<Conjunction>),
}

impl Extent {
    /// No device.
    pub const NOTHING: Self = Self::Any(Vec::new());

    /// Whether it is the whole tenant.
    pub fn is_everything(&self) -> bool {
        matches!(self, Self::Everything)
    }

    /// Whether no device can be in it.
    pub fn is_nothing(&self) -> bool {
        *self == Self::NOTHING
    }

    /// Whether a device is in it.
    pub fn contains(&self, device: &Attributes) -> bool {
        match self {
            Self::Everything => true,
            Self::Any(some) => some.iter().any(|one| one.contains(device)),
        }
    }

    /// What is in one of both.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Everything, _) | (_, Self::Everything) => Self::Everything,
            (Self::Any(mut some), Self::Any(more)) => {
                for one in more {
                    if !some.iter().any(|has| has.covers(one)) {
                        some.retain(|has| !one.covers(has));
                        some.push(one.clone());
                    }
                }
                Self::Any(some)
            }
        }
    }

    /// What is in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Everything, both) | (both, Self::Everything) => both.clone(),
            (Self::Any(some), Self::Any(others)) => {
                let pairs = some.iter().flat_map(|one| others.iter().filter_map(|other| one.and(other)));
                Self::NOTHING.or(&Self::Any(pairs.collect()))
            }
        }
    }

    /// Whether all of `other` is seen to be in it. Never wrong when it says so; what only several conjunctions cover together
    /// it does not see.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Everything, _) => true,
            (_, Self::Everything) => false,
            (Self::Any(some), Self::Any(others)) => others.iter().all(|other| some.iter().any(|one| one.covers(other))),
        }
    }

    /// Which devices within the group `from`, as they are before, will be in it when `from` has become `to`.
    #[must_use]
    pub fn before_move(&self, from: &GroupPath, to: &GroupPath) -> Self {
        match self {
            Self::Everything => Self::Everything,
            Self::Any(some) => Self::Any(some.iter().filter_map(|one| one.before_move(from, to)).collect()),
        }
    }

    /// What the database is told, in the setting `muster.scope` of a transaction: nothing for everything, else a JSON array that
    /// the SQL function `in_scope` reads.
    pub fn setting(&self) -> String {
        match self {
            Self::Everything => String::new(),
            Self::Any(some) => serde_json::to_string(some).expect("plain data"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::option;
    use proptest::prelude::*;
    use proptest::sample::select;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;
    use crate::testing::TestDb;

    fn group() -> impl Strategy<Value = GroupPath> {
        select(vec!["a", "a/b", "a/b/c", "a/bc", "b", "b/a"]).prop_map(|path| path.parse().unwrap())
    }

    fn kind() -> impl Strategy<Value = DeviceType> {
        select(vec!["pump", "fan"]).prop_map(|kind| kind.parse().unwrap())
    }

    fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
        let word = |words: &[&str]| select(words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        btree_map(word(&["site", "x"]), word(&["oslo", "rome", ""]), 0..3)
    }

    /// A device of a small world.
    pub(crate) fn attributes() -> impl Strategy<Value = Attributes> {
        (option::of(group()), option::of(kind()), labels()).prop_map(|(group, kind, labels)| Attributes {
            group,
            kind,
            labels: labels.try_into().unwrap(),
        })
    }

    fn plain() -> impl Strategy<Value = Conjunction> {
        (option::of(group()), option::of(kind()), labels()).prop_map(|(group, kind, labels)| Conjunction {
            group,
            kind,
            labels,
            not: Vec::new(),
        })
    }

    fn conjunction() -> impl Strategy<Value = Conjunction> {
        let wanted = (plain(), vec(plain(), 0..3));
        wanted.prop_map(|(plain, not)| Conjunction { not, ..plain })
    }

    /// An extent of that world.
    pub(crate) fn extent() -> impl Strategy<Value = Extent> {
        prop_oneof![1 => Just(Extent::Everything), 6 => vec(conjunction(), 0..4).prop_map(Extent::Any)]
    }

    proptest! {
        #[test]
        fn both_either_and_covering_mean_what_they_say(
            one in extent(), other in extent(), devices in vec(attributes(), 1..20),
        ) {
            let (both, either) = (one.and(&other), one.clone().or(&other));
            for device in &devices {
                prop_assert_eq!(both.contains(device), one.contains(device) && other.contains(device));
                prop_assert_eq!(either.contains(device), one.contains(device) || other.contains(device));
                prop_assert!(!one.covers(&other) || !other.contains(device) || one.contains(device));
            }
            prop_assert!(one.covers(&both) && either.covers(&one));
        }

        #[test]
        fn what_is_in_it_after_a_move_was_looked_up_before(
            extent in extent(), from in group(), to in group(), below in select(vec!["", "/a", "/b", "/c/d"]), device in attributes(),
        ) {
            prop_assume!(!to.is_within(&from));
            let at = |place: &GroupPath| Some(format!("{place}{below}").parse().unwrap());
            let after = Attributes { group: at(&to), ..device.clone() };
            let device = Attributes { group: at(&from), ..device };
            prop_assert_eq!(extent.before_move(&from, &to).contains(&device), extent.contains(&after));
        }

        #[test]
        fn a_selector_moves_with_the_groups_that_it_names(
            groups in vec(group(), 1..4), form in 0..3_usize, from in group(), device in attributes(),
        ) {
            let to: GroupPath = "z/new-place".parse().unwrap();
            let text = match form {
                0 => groups.iter().map(|group| format!("group:{group}")).collect::<Vec<_>>().join(" OR "),
                1 => groups.iter().map(|group| format!("NOT group:\"{group}\"")).collect::<Vec<_>>().join(" AND "),
                _ => format!("type:pump AND group:({})", groups.iter().map(ToString::to_string).collect::<Vec<_>>().join(" OR ")),
            };
            let scope = Scope::Selector { selector: text.parse().unwrap() };
            prop_assert_eq!(scope.names(&from), groups.iter().any(|group| group.is_within(&from)));
            let moved = device.group.as_ref().map(|group| group.moved(&from, &to).unwrap());
            let after = Attributes { group: moved, ..device.clone() };
            // What is nowhere near stays as it was: a group above the old place no longer holds what left it.
            prop_assume!(!groups.iter().any(|group| from.is_within(group) && from != *group));
            let new = scope.moved(&from, &to).unwrap();
            prop_assert_eq!(new.extent().contains(&after), scope.extent().contains(&device), "{:?}", new);
            prop_assert!(!new.names(&from));
        }

        #[test]
        fn no_selector_panics_and_what_is_read_prints_as_it_was(text in "[a-z.:\" ]{0,20}|(AND|OR|type:a|label.x:\"b c\"| ){0,6}") {
            if let Ok(read) = text.parse::<Selector>() {
                prop_assert_eq!(String::from(read), text);
            }
        }
    }

    #[tokio::test]
    async fn the_database_says_the_same_of_every_device() {
        let db = TestDb::new().await;
        let mut runner = TestRunner::deterministic();
        let mut any = || (extent(), attributes()).new_tree(&mut runner).unwrap().current();
        let asked = (0..2_000).map(|_| any()).collect::<Vec<_>>();
        let settings = asked.iter().map(|(extent, _)| extent.setting()).collect::<Vec<_>>();
        let groups = asked.iter().map(|(_, device)| device.group.as_ref().map(ToString::to_string));
        let kinds = asked.iter().map(|(_, device)| device.kind.as_ref().map(ToString::to_string));
        let labels = asked.iter().map(|(_, device)| Json(device.labels.as_map()));
        let said: Vec<bool> = sqlx::query_scalar(
            "select a.scope = '' or in_scope(nullif(a.scope, '')::jsonb, a.group_path, a.type, a.labels)
               from unnest($1::text[], $2::text[], $3::text[], $4::jsonb[]) with ordinality
                    as a (scope, group_path, type, labels, place)
              order by a.place",
        )
        .bind(&settings)
        .bind(groups.collect::<Vec<_>>())
        .bind(kinds.collect::<Vec<_>>())
        .bind(labels.collect::<Vec<_>>())
        .fetch_all(db.pool())
        .await
        .unwrap();
        for ((extent, device), said) in asked.iter().zip(said) {
            assert_eq!(said, extent.contains(device), "{extent:?} {device:?}");
        }
    }

    #[test]
    fn a_selector_picks_what_it_says() {
        let read: Selector = r#"type:pump AND label.site:"New York" group:a OR label.x:1:2"#.parse().unwrap();
        let Extent::Any(picked) = read.extent() else { panic!("a selector is never everything") };
        let [one, other] = picked.as_slice() else { panic!("expected two alternatives, found {picked:?}") };
        assert_eq!(one.kind, Some("pump".parse().unwrap()));
        assert_eq!(one.group, Some("a".parse().unwrap()));
        assert_eq!(one.labels.get("site").map(String::as_str), Some("New York"));
        assert_eq!(other.labels.get("x").map(String::as_str), Some("1:2"));
        assert_eq!(
            read.extent().setting(),
            r#"[{"group":"a","type":"pump","labels":{"site":"New York"}},{"labels":{"x":"1:2"}}]"#
        );
        let without: Selector = "type:pump AND NOT (label.site:oslo OR group:a)".parse().unwrap();
        assert_eq!(without.extent().setting(), r#"[{"type":"pump","not":[{"labels":{"site":"oslo"}},{"group":"a"}]}]"#);
    }

    #[test]
    fn what_is_no_selector_is_refused_where_it_goes_wrong() {
        let many = (0..=MAX_ALTERNATIVES).map(|n| format!("type:a{n}")).collect::<Vec<_>>().join(" OR ");
        for (text, column, said) in [
            ("", 1, "one of type:"),
            ("type:a AND", 11, "one of type:"),
            ("AND type:a", 1, "one of type:"),
            ("type:a OR OR type:b", 11, "one of type:"),
            ("hello", 1, "one of type:"),
            ("type:a type:b", 1, "picks none"),
            ("label.x:1 AND NOT label.x:1", 1, "picks none"),
            ("type:a OR NOT type:a OR *", 1, "the scope of all devices is the tenant"),
            ("type:a label.x:\"b", 16, "double quote"),
            ("type:a group:/", 14, "a path"),
            ("site:oslo", 1, "label.NAME"),
            ("firmware:<2.0", 1, "not a field"),
            ("group:a AND type:fr*", 13, "the whole value of type"),
            ("label.x:*", 1, "the whole value of label.x"),
            (many.as_str(), 1, "at most 16"),
        ] {
            let why = text.parse::<Selector>().unwrap_err().to_string();
            assert!(why.contains(&format!("column {column}:")) && why.contains(said), "{text}: {why}");
        }
        assert!("x".repeat(MAX_SELECTOR_BYTES + 1).parse::<Selector>().unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn a_group_takes_in_what_is_below_it_and_no_namesake() {
        let extent = Scope::Group { group: "site/line-3".parse().unwrap() }.extent();
        for (group, is_in) in
            [("site/line-3", true), ("site/line-3/cell", true), ("site/line-30", false), ("site", false)]
        {
            let device = Attributes { group: Some(group.parse().unwrap()), ..Attributes::default() };
            assert_eq!(extent.contains(&device), is_in, "{group}");
        }
        assert!(!extent.contains(&Attributes::default()));
        assert!(Scope::Tenant.extent().contains(&Attributes::default()));
    }

    #[test]
    fn a_scope_is_written_as_json() {
        for (scope, json) in [
            (Scope::Tenant, r#"{"kind":"tenant"}"#),
            (Scope::Group { group: "a/b".parse().unwrap() }, r#"{"kind":"group","group":"a/b"}"#),
            (Scope::Selector { selector: "type:a".parse().unwrap() }, r#"{"kind":"selector","selector":"type:a"}"#),
        ] {
            assert_eq!(serde_json::to_string(&scope).unwrap(), json);
            assert_eq!(serde_json::from_str::<Scope>(json).unwrap(), scope);
        }
    }
}
