//! Highlights: where in its message a line has what was asked for.

use crate::log::query::{Asked, Query};
use crate::query::{Phrase, Test};
use crate::words::{Word, words};

/// Most places of a message.
pub const MAX_HIGHLIGHTS: usize = 100;

/// Where the words of the query stand in a message, each from a character to behind its last one, counted in Unicode scalar
/// values; in their order, none of them overlapping. What the query asks for by `NOT` is none of them.
pub fn highlights(query: &Query, message: &str) -> Vec<(usize, usize)> {
    let mut phrases = Vec::new();
    wanted(query.asked(), &mut phrases);
    if phrases.is_empty() {
        return Vec::new();
    }
    let has = words(message).collect::<Vec<_>>();
    let mut spans = phrases.iter().flat_map(|phrase| spans(phrase, &has)).collect::<Vec<_>>();
    spans.sort_unstable();
    in_characters(message, merged(spans))
}

fn wanted<'a>(asked: &'a Asked, phrases: &mut Vec<&'a Phrase>) {
    match asked {
        Asked::And(some) | Asked::Or(some) => some.iter().for_each(|one| wanted(one, phrases)),
        Asked::Line(term) if term.field == "message" => phrases.extend(match &term.test {
            Test::Words(phrase) => Some(phrase),
            _ => None,
        }),
        Asked::Line(_) | Asked::All | Asked::Not(_) | Asked::Devices(_) => {}
    }
}

/// Where a phrase stands, in bytes.
fn spans<'a>(phrase: &'a Phrase, has: &'a [Word]) -> impl Iterator<Item = (usize, usize)> + 'a {
    let begins = |window: &[Word]| phrase.is_at(window.iter().map(|word| word.text.as_str()));
    has.windows(phrase.words.len())
        .filter(move |window| begins(window))
        .filter_map(|window| Some((window.first()?.start, window.last()?.end)))
}

fn merged(spans: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    let mut merged: Vec<(usize, usize)> = Vec::new();
    for (start, end) in spans {
        match merged.last_mut() {
            Some(last) if start < last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged.truncate(MAX_HIGHLIGHTS);
    merged
}

/// In one walk along the message.
fn in_characters(message: &str, spans: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    let (mut byte, mut character) = (0, 0);
    let mut at = |to: usize| {
        character += message[byte..to].chars().count();
        byte = to;
        character
    };
    spans.into_iter().map(|(start, end)| (at(start), at(end))).collect()
}
