//! Many topic filters asked as one: does any of them match a topic, cover a filter, overlap with one?
//!
//! Holds: each filter alone answers as MQTT 5 §4.7 says. A filter may have the variables [`TENANT`] and [`DEVICE`], each
//! a level of its own; their values come with the question, so that one set serves every connection of a role.
//! Why a tree: a question follows the levels of its topic and meets few of a thousand filters.

use std::collections::HashMap;
use std::str::Split;

use crate::id::{DeviceId, TenantId};

/// The level that stands for the tenant's name.
pub(crate) const TENANT: &str = "{tenant}";
/// The level that stands for the device's name; it matches nothing for who is no device.
pub(crate) const DEVICE: &str = "{device}";

/// The values of the variables.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) tenant: TenantId,
    pub(crate) device: Option<DeviceId>,
}

/// The filters. Whoever adds one has checked it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FilterSet {
    root: Node,
}

/// What follows some levels. Every node leads to the end of a filter.
#[derive(Debug, Default, PartialEq, Eq)]
struct Node {
    texts: HashMap<Box<str>, Node>,
    tenant: Option<Box<Node>>,
    device: Option<Box<Node>>,
    /// Behind `+`.
    any: Option<Box<Node>>,
    /// A filter ends here.
    ends: bool,
    /// A filter ends here with `#`, which takes in this level itself and all below it.
    rest: bool,
}

impl FilterSet {
    /// Adds a valid filter that is not shared.
    pub(crate) fn insert(&mut self, filter: &str) {
        // No topic is without a first level, so these two are one.
        let filter = if filter == "+/#" { "#" } else { filter };
        let mut node = &mut self.root;
        for level in filter.split('/') {
            node = match level {
                "#" => {
                    node.rest = true;
                    return;
                }
                "+" => node.any.get_or_insert_default(),
                TENANT => node.tenant.get_or_insert_default(),
                DEVICE => node.device.get_or_insert_default(),
                text => node.texts.entry(text.into()).or_default(),
            };
        }
        node.ends = true;
    }

    /// Whether some filter matches `topic`.
    pub(crate) fn matches(&self, topic: &str, names: &Names) -> bool {
        self.root.matches(topic.split('/'), names, topic.starts_with('$'))
    }

    /// Whether some one filter matches every topic that `filter` can match.
    pub(crate) fn covers(&self, filter: &str, names: &Names) -> bool {
        self.root.covers(filter.split('/'), names, filter.starts_with('$'))
    }

    /// Whether some filter matches a topic that `filter` matches too.
    pub(crate) fn overlaps(&self, filter: &str, names: &Names) -> bool {
        let first = if filter.starts_with('$') { First::Dollar } else { First::Other };
        self.root.overlaps(filter.split('/'), names, first)
    }
}

/// A leading wildcard never matches what begins with `$` (MQTT 5 §4.7.2), so the first level is unlike the others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    /// The first level, which begins with `$`.
    Dollar,
    /// The first level, which does not.
    Other,
    /// A later level.
    No,
}

impl Node {
    /// What follows a level of this text, wildcards apart.
    fn named<'n>(&'n self, text: &str, names: &Names) -> impl Iterator<Item = &'n Node> {
        let tenant = self.tenant.as_deref().filter(|_| names.tenant.as_str() == text);
        let device = self.device.as_deref().filter(|_| names.device.as_ref().is_some_and(|id| id.as_str() == text));
        self.texts.get(text).into_iter().chain(tenant).chain(device)
    }

    /// What follows a level that a wildcard matches.
    fn children<'n>(&'n self, names: &Names, first: First) -> impl Iterator<Item = &'n Node> {
        let texts = self.texts.iter().filter(move |(text, _)| first == First::No || !text.starts_with('$'));
        let device = self.device.as_deref().filter(|_| names.device.is_some());
        texts.map(|(_, node)| node).chain(self.tenant.as_deref()).chain(device).chain(self.any.as_deref())
    }

    fn matches(&self, mut topic: Split<'_, char>, names: &Names, dollar: bool) -> bool {
        if self.rest && !dollar {
            return true;
        }
        let Some(level) = topic.next() else { return self.ends };
        let any = self.any.as_deref().filter(|_| !dollar);
        self.named(level, names).chain(any).any(|node| node.matches(topic.clone(), names, false))
    }

    fn covers(&self, mut filter: Split<'_, char>, names: &Names, dollar: bool) -> bool {
        if self.rest && !dollar {
            return true;
        }
        let any = self.any.as_deref().filter(|_| !dollar);
        match filter.next() {
            None => self.ends,
            Some("#") => false,
            Some("+") => any.is_some_and(|node| node.covers(filter, names, false)),
            Some(text) => self.named(text, names).chain(any).any(|node| node.covers(filter.clone(), names, false)),
        }
    }

    fn overlaps(&self, mut filter: Split<'_, char>, names: &Names, first: First) -> bool {
        if self.rest && first != First::Dollar {
            return true;
        }
        match filter.next() {
            None => self.ends,
            Some("#") => self.ends || self.children(names, first).any(|node| node.leads_somewhere(names)),
            Some("+") => self.children(names, first).any(|node| node.overlaps(filter.clone(), names, First::No)),
            Some(text) => {
                let any = self.any.as_deref().filter(|_| first != First::Dollar);
                self.named(text, names).chain(any).any(|node| node.overlaps(filter.clone(), names, First::No))
            }
        }
    }

    /// Whether some filter from here on can match at all: one with a variable that has no value cannot.
    fn leads_somewhere(&self, names: &Names) -> bool {
        self.ends || self.rest || self.children(names, First::No).any(|node| node.leads_somewhere(names))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::topic;

    /// Levels so few that topics and filters meet often; `a` is the tenant and `b` the device.
    const LEVELS: [&str; 4] = ["a", "b", "", "$s"];

    pub(crate) fn names(device: bool) -> Names {
        Names { tenant: "a".parse().unwrap(), device: device.then(|| "b".parse().unwrap()) }
    }

    fn filter_of(levels: Vec<&'static str>) -> impl Strategy<Value = String> {
        (vec(select(levels), 0..4), any::<bool>())
            .prop_map(|(mut levels, rest)| {
                levels.extend(rest.then_some("#"));
                levels.join("/")
            })
            .prop_filter("not empty", |filter| !filter.is_empty())
    }

    /// A filter that may be asked for.
    pub(crate) fn filter() -> impl Strategy<Value = String> {
        filter_of([&LEVELS[..], &["+", "+"]].concat())
    }

    /// A filter of a rule.
    pub(crate) fn pattern() -> impl Strategy<Value = String> {
        filter_of([&LEVELS[..], &["+", "+", TENANT, DEVICE]].concat())
    }

    /// Every topic of up to five levels over the alphabet of the filters and one level that no filter names. The empty
    /// one is among them: `/#` and `+` are said to overlap, though only in a name nobody may publish to.
    pub(crate) fn every_topic() -> Vec<String> {
        let mut topics: Vec<String> = Vec::new();
        let mut longest = vec![String::new()];
        for depth in 0..5 {
            let deeper = |topic: &String| {
                let start = if depth == 0 { String::new() } else { format!("{topic}/") };
                ["a", "b", "", "$s", "z"].map(|level| format!("{start}{level}"))
            };
            longest = longest.iter().flat_map(deeper).collect();
            topics.extend_from_slice(&longest);
        }
        topics
    }

    /// The filter with the variables filled in; `None` when one of them has no value.
    pub(crate) fn filled(pattern: &str, names: &Names) -> Option<String> {
        let levels = pattern.split('/').map(|level| match level {
            TENANT => Some(names.tenant.as_str()),
            DEVICE => names.device.as_ref().map(DeviceId::as_str),
            level => Some(level),
        });
        Some(levels.collect::<Option<Vec<_>>>()?.join("/"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn a_set_answers_as_its_filters_one_by_one(
            patterns in vec(pattern(), 0..5), filter in filter(), device: bool,
        ) {
            let names = names(device);
            let mut set = FilterSet::default();
            for pattern in &patterns {
                set.insert(pattern);
            }
            let filters: Vec<_> = patterns.iter().filter_map(|pattern| filled(pattern, &names)).collect();
            let asked: Vec<_> = every_topic().into_iter().filter(|topic| topic::matches(&filter, topic)).collect();

            for topic in every_topic() {
                let expected = filters.iter().any(|filter| topic::matches(filter, &topic));
                prop_assert_eq!(set.matches(&topic, &names), expected, "{}", topic);
            }
            let covers = filters.iter().any(|wide| asked.iter().all(|topic| topic::matches(wide, topic)));
            prop_assert_eq!(set.covers(&filter, &names), covers);
            let overlaps = filters.iter().any(|other| asked.iter().any(|topic| topic::matches(other, topic)));
            prop_assert_eq!(set.overlaps(&filter, &names), overlaps);
        }
    }

    #[test]
    fn an_empty_set_has_no_answer_but_no() {
        let set = FilterSet::default();
        assert!(!set.matches("a", &names(true)) && !set.covers("a", &names(true)) && !set.overlaps("#", &names(true)));
    }

    #[test]
    fn a_variable_is_a_whole_level_or_a_text() {
        let mut set = FilterSet::default();
        set.insert("x/{tenant}s/#");
        assert!(!set.matches("x/as/1", &names(true)), "nobody is given another tenant's name by its beginning");
        assert!(set.matches("x/{tenant}s/1", &names(true)));
    }
}
