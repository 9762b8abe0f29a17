//! Listeners: TLS or plain, bounded in how many connections there are and in how long a peer may take to begin, ending in
//! order.

use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::AddExtension;
use axum::{Extension, Router};
use axum_server::accept::Accept;
use axum_server::tls_rustls::RustlsConfig;
use axum_server::{Handle, Server};
use hyper_util::rt::TokioTimer;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tower::Layer as _;

use crate::config::Listen;
use crate::federation::crypto_provider;

/// How long the head of a request may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How many bytes of a connection are buffered at most; also the limit of a request's head.
const BUFFER: usize = 64 << 10;

/// How many connections a listener holds: each costs some 100 KiB and a descriptor.
const CONNECTIONS: usize = 4_096;

/// Why a listener could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be used.
    #[error("the {name} listener cannot use {address}: {source}")]
    Address {
        /// Which listener.
        name: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("tls_certificate {certificate} with tls_private_key {key}: {source}")]
    Tls {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
}

/// A listener that accepts connections.
pub(crate) struct Listener {
    address: SocketAddr,
    handle: Handle<SocketAddr>,
    task: JoinHandle<()>,
}

impl Listener {
    /// Listens as `settings` say, by TLS when they name a certificate.
    pub(crate) async fn open(name: &'static str, settings: &Listen, routes: Router) -> Result<Self, ListenError> {
        let (Some(certificate), Some(key)) = (&settings.tls_certificate, &settings.tls_private_key) else {
            return Self::open_plain(name, settings.address, routes).await;
        };
        // Only the first call in a process does anything; all of them give the same provider.
        let _ = (*crypto_provider()).clone().install_default();
        let tls = RustlsConfig::from_pem_file(certificate, key).await.map_err(|source| ListenError::Tls {
            certificate: certificate.clone(),
            key: key.clone(),
            source,
        })?;
        let (socket, address) = bind(name, settings.address)?;
        let wrong = |source| ListenError::Address { name, address, source };
        let handle = Handle::new();
        let server = axum_server::from_tcp_rustls(socket, tls).map_err(wrong)?.handle(handle.clone());
        let mut server = server.map(|tls| tls.acceptor(Bounded::new(CONNECTIONS)));
        limit(&mut server);
        let task = tokio::spawn(async move { ended(name, server.serve(routes.into_make_service()).await) });
        Ok(Self { address, handle, task })
    }

    /// Listens without TLS.
    pub(crate) async fn open_plain(
        name: &'static str,
        address: SocketAddr,
        routes: Router,
    ) -> Result<Self, ListenError> {
        let (socket, address) = bind(name, address)?;
        let wrong = |source| ListenError::Address { name, address, source };
        let handle = Handle::new();
        let server = axum_server::from_tcp(socket).map_err(wrong)?.handle(handle.clone());
        let mut server = server.acceptor(Bounded::new(CONNECTIONS));
        limit(&mut server);
        let task = tokio::spawn(async move { ended(name, server.serve(routes.into_make_service()).await) });
        Ok(Self { address, handle, task })
    }

    /// Where it listens, with the port that the system chose when none was given.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more requests and gives those under way `grace` to end.
    pub(crate) fn stop(&self, grace: Duration) {
        self.handle.graceful_shutdown(Some(grace));
    }

    /// Returns when the last connection is closed.
    pub(crate) async fn ended(self) {
        let _ = self.task.await;
    }
}

/// Takes a connection while there is a place for it, and closes it at once otherwise. The place is held by what serves the
/// connection and ends with it.
#[derive(Clone)]
struct Bounded {
    places: Arc<Semaphore>,
}

type Place = Extension<Arc<OwnedSemaphorePermit>>;

impl Bounded {
    fn new(connections: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(connections)) }
    }

    fn place(&self) -> io::Result<Place> {
        match self.places.clone().try_acquire_owned() {
            Ok(place) => Ok(Extension(Arc::new(place))),
            Err(_) => {
                tracing::warn!("closed a new connection: there are {CONNECTIONS} already");
                Err(io::Error::other("too many connections"))
            }
        }
    }
}

impl<S> Accept<TcpStream, S> for Bounded {
    type Stream = TcpStream;
    type Service = AddExtension<S, Arc<OwnedSemaphorePermit>>;
    type Future = Ready<io::Result<(Self::Stream, Self::Service)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let accepted = stream.set_nodelay(true).and_then(|()| self.place());
        ready(accepted.map(|place| (stream, place.layer(service))))
    }
}

fn bind(name: &'static str, address: SocketAddr) -> Result<(std::net::TcpListener, SocketAddr), ListenError> {
    let wrong = |source| ListenError::Address { name, address, source };
    let socket = std::net::TcpListener::bind(address).map_err(wrong)?;
    socket.set_nonblocking(true).map_err(wrong)?;
    let address = socket.local_addr().map_err(wrong)?;
    Ok((socket, address))
}

fn limit<A>(server: &mut Server<SocketAddr, A>) {
    server
        .http_builder()
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BUFFER)
        .keep_alive(true);
}

fn ended(name: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(name, %error, "a listener ended");
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn connections_are_bounded_and_their_places_come_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bounded = Bounded::new(1);
        let accept = async || {
            let (_there, here) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
            bounded.accept(here.unwrap().0, ()).await
        };
        let (stream, service) = accept().await.unwrap();
        assert!(stream.nodelay().unwrap());
        assert!(accept().await.is_err());
        drop(stream);
        assert!(accept().await.is_err(), "the connection is still served");
        drop(service);
        assert!(accept().await.is_ok());
    }
}
