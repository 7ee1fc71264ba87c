//! Questions that are gathered and answered together.
//!
//! Holds: while one batch is answered the next one gathers, so a lone question waits for nothing and a thousand cost
//! four answers; no more questions wait than [`Batcher::start`] was told, and none for longer; whoever has stopped
//! waiting is not asked for any more.
//! Ignorant of: what is asked.

use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Questions answered at once.
pub(crate) const MAX_BATCH: usize = 256;

/// Why a question has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// As many wait as may.
    Full,
    /// Its time was up before its turn came.
    Late,
    /// The batch it was in could not be answered.
    Failed,
}

/// Bounds of a [`Batcher`].
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    /// Questions that may wait at once.
    pub(crate) waiting: usize,
    /// How long one may wait, and how long answering a batch may take.
    pub(crate) within: Duration,
    /// Shows how many wait.
    pub(crate) gauge: IntGauge,
}

/// Asks in batches. The task behind it ends with it.
pub(crate) struct Batcher<Q, A> {
    asked: mpsc::Sender<Asked<Q, A>>,
    bounds: Bounds,
}

struct Asked<Q, A> {
    question: Q,
    answer: oneshot::Sender<Result<A, NoAnswer>>,
}

impl<Q: Send + 'static, A: Send + 'static> Batcher<Q, A> {
    /// Starts the task that has each batch answered: as many answers as questions, in their order; `None` when that
    /// failed.
    pub(crate) fn start<F>(bounds: Bounds, answer: impl Fn(Vec<Q>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Option<Vec<A>>> + Send + 'static,
    {
        let (asked, waiting) = mpsc::channel(bounds.waiting);
        tokio::spawn(work(waiting, bounds.within, answer));
        Self { asked, bounds }
    }

    /// Waits for the answer.
    pub(crate) async fn ask(&self, question: Q) -> Result<A, NoAnswer> {
        let (answer, answered) = oneshot::channel();
        self.asked.try_send(Asked { question, answer }).map_err(|_| NoAnswer::Full)?;
        let _waits = Waits::begin(&self.bounds.gauge);
        match timeout(self.bounds.within, answered).await {
            Ok(answer) => answer.unwrap_or(Err(NoAnswer::Failed)),
            Err(_) => Err(NoAnswer::Late),
        }
    }
}

/// Counted while it lives, also when whoever waits is dropped.
struct Waits<'a>(&'a IntGauge);

impl<'a> Waits<'a> {
    fn begin(gauge: &'a IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

async fn work<Q, A, F>(mut waiting: mpsc::Receiver<Asked<Q, A>>, within: Duration, answer: impl Fn(Vec<Q>) -> F)
where
    F: Future<Output = Option<Vec<A>>>,
{
    let mut batch = Vec::new();
    while waiting.recv_many(&mut batch, MAX_BATCH).await > 0 {
        batch.retain(|asked| !asked.answer.is_closed());
        let (questions, askers): (Vec<_>, Vec<_>) = batch.drain(..).map(|asked| (asked.question, asked.answer)).unzip();
        if questions.is_empty() {
            continue;
        }
        let answers = timeout(within, answer(questions)).await.ok().flatten().unwrap_or_default();
        let answers = answers.into_iter().map(Ok).chain(std::iter::repeat_with(|| Err(NoAnswer::Failed)));
        for (asker, answer) in askers.into_iter().zip(answers) {
            // Whoever asked may have gone meanwhile.
            let _ = asker.send(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::future::join_all;
    use parking_lot::Mutex;
    use tokio::sync::Semaphore;

    use super::*;

    fn bounds(waiting: usize) -> Bounds {
        Bounds { waiting, within: Duration::from_secs(5), gauge: IntGauge::new("waiting", "waiting").unwrap() }
    }

    /// Doubles numbers, a batch whenever `turns` has a permit; notes the sizes of the batches.
    fn doubling(bounds: Bounds, turns: &Arc<Semaphore>, sizes: &Arc<Mutex<Vec<usize>>>) -> Arc<Batcher<u32, u32>> {
        let (turns, sizes) = (turns.clone(), sizes.clone());
        let batcher = Batcher::start(bounds, move |questions: Vec<u32>| {
            let (turns, sizes) = (turns.clone(), sizes.clone());
            async move {
                turns.acquire().await.unwrap().forget();
                sizes.lock().push(questions.len());
                Some(questions.into_iter().map(|number| number * 2).collect())
            }
        });
        Arc::new(batcher)
    }

    #[tokio::test(start_paused = true)]
    async fn what_gathers_meanwhile_is_answered_together() {
        let (turns, sizes) = (Arc::new(Semaphore::new(0)), Arc::default());
        let batcher = doubling(bounds(1000), &turns, &sizes);
        let first = tokio::spawn({
            let batcher = batcher.clone();
            async move { batcher.ask(1).await }
        });
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        let asking = join_all((0..300).map(|number| batcher.ask(number)));
        let (answers, ()) = tokio::join!(asking, async { turns.add_permits(3) });
        assert_eq!(first.await.unwrap(), Ok(2));
        let expected: Vec<_> = (0..300).map(|number| Ok(number * 2)).collect();
        assert_eq!(answers, expected, "everybody gets its own answer");
        assert_eq!(*sizes.lock(), [1, MAX_BATCH, 300 - MAX_BATCH]);
        assert_eq!(batcher.bounds.gauge.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever_and_no_more_than_may() {
        let (turns, sizes) = (Arc::new(Semaphore::new(0)), Arc::default());
        let batcher = doubling(bounds(2), &turns, &sizes);
        let mut answers = join_all((0..5).map(|number| batcher.ask(number))).await;
        answers.sort_by_key(|answer| *answer == Err(NoAnswer::Full));
        assert!(answers[..2].iter().all(|answer| matches!(answer, Err(NoAnswer::Late | NoAnswer::Failed))));
        assert_eq!(answers[2..], [Err(NoAnswer::Full); 3]);
        // The clock is the test's own: by then the hanging batch was given up.
        tokio::time::sleep(Duration::from_millis(1)).await;
        turns.add_permits(1);
        assert_eq!(batcher.ask(7).await, Ok(14), "a batch that hung does not hold up the next one");
        assert_eq!(*sizes.lock(), [1], "those who had gone were not asked for");
    }

    #[tokio::test]
    async fn a_failed_batch_fails_all_of_it_and_nothing_else() {
        let failing =
            Batcher::start(
                bounds(9),
                |questions: Vec<u32>| async move { (!questions.contains(&13)).then_some(questions) },
            );
        assert_eq!(join_all([failing.ask(1), failing.ask(13)]).await, [Err(NoAnswer::Failed); 2]);
        assert_eq!(failing.ask(2).await, Ok(2));
    }
}
