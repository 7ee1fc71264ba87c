//! Places: how many may do something at once, in all and each user.
//!
//! Holds: whoever has gone is not counted, however they went. Ignorant of: what is done.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::id::UserId;

/// The places there are; cloning shares them.
#[derive(Debug, Clone)]
pub struct Places(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    most_each: usize,
    taken: Mutex<HashMap<UserId, usize>>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    user: UserId,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// All are taken.
    All,
    /// The user has as many as one may.
    OfUser,
}

impl Places {
    /// So many in all, and so many for each user.
    pub fn new(most: usize, most_each: usize) -> Self {
        Self(Arc::new(Inner { most, most_each, taken: Mutex::default() }))
    }

    /// Takes one.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&self, user: UserId) -> Result<Place, Full> {
        let mut taken = self.0.taken.lock();
        if taken.values().sum::<usize>() >= self.0.most {
            return Err(Full::All);
        }
        if taken.get(&user).is_some_and(|own| *own >= self.0.most_each) || self.0.most_each == 0 {
            return Err(Full::OfUser);
        }
        *taken.entry(user).or_default() += 1;
        Ok(Place { places: self.clone(), user })
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.0.taken.lock().values().sum()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.taken.lock();
        if let Some(own) = taken.get_mut(&self.user) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_only_so_many_and_they_come_back() {
        let (places, ada, bob, eve) = (Places::new(3, 2), UserId::new(), UserId::new(), UserId::new());
        let take = |user| places.take(user);
        let held = [take(ada).unwrap(), take(ada).unwrap()];
        assert_eq!(take(ada).unwrap_err(), Full::OfUser);
        let other = take(bob).unwrap();
        assert_eq!((take(bob).unwrap_err(), take(eve).unwrap_err(), places.taken()), (Full::All, Full::All, 3));
        drop(other);
        assert_eq!(take(ada).unwrap_err(), Full::OfUser, "which counts nothing");
        let _eve = take(eve).unwrap();
        drop(held);
        assert_eq!(places.taken(), 1);
        assert!(places.0.taken.lock().len() == 1, "nobody is remembered who has none");
        assert_eq!(Places::new(1, 0).take(ada).unwrap_err(), Full::OfUser);
    }
}
