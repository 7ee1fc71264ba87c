//! A queue bounded in count and bytes: what does not fit comes back, and whoever brought it waits for room.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// The way in. Cloning shares it.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    items: mpsc::Sender<Held<T>>,
    room: Arc<Semaphore>,
    max_bytes: u32,
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self { items: self.items.clone(), room: self.room.clone(), max_bytes: self.max_bytes }
    }
}

/// An item and its share of the queue's bytes, which is given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Held<T> {
    pub(crate) item: T,
    _room: OwnedSemaphorePermit,
}

/// A queue of at most so many items and so many bytes; its other end is for one reader.
pub(crate) fn bounded<T>(max_items: usize, max_bytes: usize) -> (Queue<T>, mpsc::Receiver<Held<T>>) {
    let (items, taken) = mpsc::channel(max_items);
    let max_bytes = u32::try_from(max_bytes.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
    let permits = usize::try_from(max_bytes).unwrap_or(Semaphore::MAX_PERMITS);
    (Queue { items, room: Arc::new(Semaphore::new(permits)), max_bytes }, taken)
}

impl<T> Queue<T> {
    /// Adds an item of so many bytes without waiting.
    ///
    /// # Errors
    /// The item comes back when there is no room, or nobody reads any more.
    pub(crate) fn offer(&self, item: T, bytes: usize) -> Result<(), T> {
        let Ok(room) = self.room.clone().try_acquire_many_owned(self.permits(bytes)) else { return Err(item) };
        let held = Held { item, _room: room };
        self.items.try_send(held).map_err(|refused| refused.into_inner().item)
    }

    /// Adds an item, waiting for room as long as it takes; `false` when nobody reads any more.
    pub(crate) async fn wait(&self, item: T, bytes: usize) -> bool {
        let Ok(room) = self.room.clone().acquire_many_owned(self.permits(bytes)).await else { return false };
        self.items.send(Held { item, _room: room }).await.is_ok()
    }

    /// A permit is a byte. One item larger than the whole queue takes all of it, alone.
    fn permits(&self, bytes: usize) -> u32 {
        u32::try_from(bytes).unwrap_or(u32::MAX).min(self.max_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_bounds_hold_and_room_comes_back() {
        let (queue, mut taken) = bounded(2, 10);
        assert_eq!(queue.offer("a", 6), Ok(()));
        assert_eq!(queue.offer("too many bytes", 5), Err("too many bytes"));
        assert_eq!(queue.offer("b", 4), Ok(()));
        assert_eq!(queue.offer("too many items", 0), Err("too many items"));
        drop(taken.recv().await);
        assert_eq!(queue.offer("c", 6), Ok(()));
    }

    #[tokio::test]
    async fn one_larger_than_the_queue_passes_alone() {
        let (queue, mut taken) = bounded(8, 10);
        assert_eq!(queue.offer("small", 1), Ok(()));
        assert_eq!(queue.offer("large", 100), Err("large"));
        drop(taken.recv().await);
        assert!(queue.wait("large", 100).await);
    }
}
