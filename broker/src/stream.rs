//! A socket with what was read and not yet understood, and what is to be written and not yet taken.
//!
//! Holds: an idle connection keeps no buffer; reading takes 16 KiB at a time from one buffer a thread. What was written is
//! also flushed: TLS and WebSocket keep it back otherwise.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Bytes read at once.
const READ_BYTES: usize = 16 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// Whatever carries a client's bytes: one type, so that the code of a connection is compiled once.
pub(crate) enum Socket {
    /// The usual case, without a detour.
    Tcp(TcpStream),
    /// Everything else; large, and apart from the rest of a connection.
    Other(Box<dyn Carrier>),
}

/// A stream of bytes in both directions.
pub(crate) trait Carrier: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Carrier for T {}

impl Socket {
    pub(crate) fn boxed(carrier: impl Carrier + 'static) -> Self {
        Self::Other(Box::new(carrier))
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_read(cx, into),
            Self::Other(socket) => Pin::new(socket).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_write(cx, from),
            Self::Other(socket) => Pin::new(socket).poll_write(cx, from),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_flush(cx),
            Self::Other(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Other(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}

/// What happened on the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Io {
    /// Bytes came in.
    Read,
    /// Some of what was waiting went out.
    Wrote,
    /// The other side has closed.
    Closed,
}

/// A byte stream and its two buffers.
pub(crate) struct Stream<S> {
    socket: S,
    /// Read, not yet understood.
    pub(crate) inbound: BytesMut,
    /// To be written.
    pub(crate) outbound: BytesMut,
    /// Something was written and not flushed.
    unflushed: bool,
    /// Bytes read and written that nobody has asked for yet.
    counted: (u64, u64),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream<S> {
    pub(crate) fn new(socket: S) -> Self {
        let (inbound, outbound) = (BytesMut::new(), BytesMut::new());
        Self { socket, inbound, outbound, unflushed: false, counted: (0, 0) }
    }

    /// Waits until bytes come in (when `reading`) or waiting ones go out. Dropping the future loses nothing.
    pub(crate) async fn ready(&mut self, reading: bool) -> io::Result<Io> {
        poll_fn(|cx| {
            if !self.outbound.is_empty() {
                match self.poll_write(cx) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Ok(Io::Closed)),
                    Poll::Ready(Ok(_)) => return Poll::Ready(Ok(Io::Wrote)),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {}
                }
            }
            // What does not go now goes when the socket wakes this task again.
            if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
                return Poll::Ready(Err(error));
            }
            if reading { self.poll_read(cx) } else { Poll::Pending }
        })
        .await
    }

    /// Writes and flushes what the socket takes at once.
    pub(crate) async fn write_some(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            while !self.outbound.is_empty() {
                match self.poll_write(cx) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => break,
                }
            }
            match self.poll_flush(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                _ => Poll::Ready(Ok(())),
            }
        })
        .await
    }

    /// Writes everything, then closes the sending half.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        while !self.outbound.is_empty() {
            if self.ready(false).await? == Io::Closed {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        poll_fn(|cx| Pin::new(&mut self.socket).poll_flush(cx)).await?;
        poll_fn(|cx| Pin::new(&mut self.socket).poll_shutdown(cx)).await
    }

    /// Reads and forgets until the other side closes. A socket that is closed with something unread is reset, and a
    /// reset takes the last words with it that were on their way.
    pub(crate) async fn drain(&mut self) {
        self.inbound = BytesMut::new();
        while let Ok(Io::Read | Io::Wrote) = self.ready(true).await {
            self.inbound.clear();
        }
    }

    /// Bytes read and written since it was asked last.
    pub(crate) fn take_counted(&mut self) -> (u64, u64) {
        std::mem::take(&mut self.counted)
    }

    /// Gives an empty read buffer back.
    pub(crate) fn release_inbound(&mut self) {
        if self.inbound.is_empty() {
            self.inbound = BytesMut::new();
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let written = std::task::ready!(Pin::new(&mut self.socket).poll_write(cx, &self.outbound))?;
        self.outbound.advance(written);
        self.unflushed = true;
        self.counted.1 += written as u64;
        if self.outbound.is_empty() {
            self.outbound = BytesMut::new();
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unflushed {
            std::task::ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Io>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut read = ReadBuf::new(scratch);
            std::task::ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(Io::Closed));
            }
            self.inbound.extend_from_slice(read.filled());
            self.counted.0 += read.filled().len() as u64;
            Poll::Ready(Ok(Io::Read))
        })
    }
}
