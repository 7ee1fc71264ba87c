//! What is remembered of the most recent ones: a map with a bound that forgets whoever was looked at longest ago.

use std::hash::Hash;

use hashlink::LruCache;

/// Entries looked at for every one that is made, to forget those that have said all they had to.
const TIDY_AT_ONCE: usize = 2;

/// Remembers at most so many.
#[derive(Debug)]
pub(crate) struct Recent<K: Eq + Hash, V> {
    kept: LruCache<K, V>,
}

impl<K: Eq + Hash, V: Default> Recent<K, V> {
    pub(crate) fn new(most: usize) -> Self {
        Self { kept: LruCache::new(most) }
    }

    /// What is remembered of `key`, newly made where there is nothing; the flag says that something which still mattered
    /// was forgotten to make room.
    pub(crate) fn of(&mut self, key: K, has_lapsed: impl Fn(&V) -> bool) -> (&mut V, bool) {
        let mut forgot = false;
        if !self.kept.contains_key(&key) {
            self.tidy(&has_lapsed);
            if self.kept.len() >= self.kept.capacity() {
                self.kept.remove_lru();
                forgot = true;
            }
        }
        (self.kept.entry(key).or_insert_with(V::default), forgot)
    }

    fn tidy(&mut self, has_lapsed: impl Fn(&V) -> bool) {
        for _ in 0..TIDY_AT_ONCE {
            if !self.kept.iter().next().is_some_and(|(_, oldest)| has_lapsed(oldest)) {
                return;
            }
            self.kept.remove_lru();
        }
    }

    /// What is remembered of `key`, without touching it.
    pub(crate) fn peek(&self, key: &K) -> Option<&V> {
        self.kept.peek(key)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_looked_at_longest_ago_makes_room() {
        let mut recent: Recent<u32, u32> = Recent::new(2);
        let never = |_: &u32| false;
        for key in [1, 2, 1] {
            let (value, forgot) = recent.of(key, never);
            *value += 1;
            assert!(!forgot);
        }
        assert!(recent.of(3, never).1, "2 had to go, and it mattered");
        assert_eq!((recent.peek(&1), recent.peek(&2), recent.len()), (Some(&2), None, 2));
        assert!(!recent.of(4, |_| true).1, "those that do not matter go silently");
        assert_eq!(recent.len(), 1);
    }
}
