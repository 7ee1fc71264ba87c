//! The way in for sockets: accepts, admits, and hands each to a task of its own.
//!
//! Holds: a handshake never delays the next accept; no more connections than `mqtt.max_connections`, and those
//! beyond it are told so while a bounded number of refusals is under way.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;

use crate::connection;
use crate::metrics::Limit;
use crate::{Shared, StartError};

/// Sockets the kernel holds for us in a storm.
const BACKLOG: u32 = 4096;
/// Refusals told at once when the broker is full; beyond it a socket is just closed.
const REFUSALS_AT_ONCE: usize = 64;
/// Pause after the system ran out of something, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(crate) fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|error| StartError::Listen { address, error })
}

/// Accepts until it is dropped.
pub(crate) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let room = Arc::new(Semaphore::new(shared.settings.max_connections));
    let refusals = Arc::new(Semaphore::new(REFUSALS_AT_ONCE));
    let mut number = 0;
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        number += 1;
        if let Ok(place) = room.clone().try_acquire_owned() {
            spawn(shared.clone(), socket, peer, number, place, connection::serve);
        } else {
            shared.metrics.hit(Limit::Connections);
            if let Ok(place) = refusals.clone().try_acquire_owned() {
                spawn(shared.clone(), socket, peer, number, place, connection::refuse);
            }
        }
    }
}

fn spawn<F: Future<Output = ()> + Send + 'static>(
    shared: Arc<Shared>,
    socket: TcpStream,
    peer: SocketAddr,
    number: u64,
    place: tokio::sync::OwnedSemaphorePermit,
    serve: impl FnOnce(Arc<Shared>, TcpStream, SocketAddr, u64) -> F,
) {
    // Acknowledgements are small and must not wait for more to send.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%peer, %error, "the connection ended before it began");
        return;
    }
    let served = serve(shared, socket, peer, number);
    tokio::spawn(async move {
        served.await;
        drop(place);
    });
}

async fn pause_after(error: &io::Error) {
    let passing = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset, io::ErrorKind::Interrupted];
    if !passing.contains(&error.kind()) {
        tracing::error!(%error, "cannot accept connections");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}
