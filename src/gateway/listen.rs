//! Listeners: TLS or plain, bounded in how many connections there are and in how long a peer may take to begin, ending in
//! order.

use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum_server::accept::Accept;
use axum_server::tls_rustls::RustlsConfig;
use axum_server::{Handle, Server};
use hyper_util::rt::TokioTimer;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::connections::{Bounds, Connections, Patience, Peer, Serving, Watched};
use crate::config::Listen;
use crate::federation::{crypto_provider, peer_address};

/// How long the head of a request may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How many bytes of a connection are buffered at most; also the limit of a request's head.
const BUFFER: usize = 64 << 10;

/// How many connections a listener holds: each costs some 100 KiB and a descriptor.
const CONNECTIONS: usize = 4_096;
/// How many requests one connection may have under way.
const STREAMS: u32 = 128;

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

impl ListenError {
    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Tls { .. } => {
                "give a PEM file with the certificate chain, the server's own first, and the key that belongs to it"
            }
            Self::Address { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => "another program has the port: stop it, or give the listener another port",
                io::ErrorKind::AddrNotAvailable => {
                    "the address is not of this machine: listen on 0.0.0.0 or on one that is"
                }
                io::ErrorKind::PermissionDenied => {
                    "ports below 1024 need a permission: take another, or a reverse proxy"
                }
                _ => "give the listener another address",
            },
        }
    }
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
            let (of_one, patience) = (settings.connections_per_address, Patience::default());
            return Self::open_bounded(name, settings.address, of_one, patience, routes).await;
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
        let mut server =
            server.map(|tls| tls.acceptor(Bounded::new(settings.connections_per_address, Patience::default())));
        limit(&mut server);
        let task = tokio::spawn(async move { ended(name, server.serve(routes.into_make_service()).await) });
        Ok(Self { address, handle, task })
    }

    /// Listens without TLS, for whoever may reach the address.
    pub(crate) async fn open_plain(
        name: &'static str,
        address: SocketAddr,
        routes: Router,
    ) -> Result<Self, ListenError> {
        Self::open_bounded(name, address, 0, Patience::default(), routes).await
    }

    async fn open_bounded(
        name: &'static str,
        address: SocketAddr,
        of_one: usize,
        patience: Patience,
        routes: Router,
    ) -> Result<Self, ListenError> {
        let (socket, address) = bind(name, address)?;
        let wrong = |source| ListenError::Address { name, address, source };
        let handle = Handle::new();
        let server = axum_server::from_tcp(socket).map_err(wrong)?.handle(handle.clone());
        let mut server = server.acceptor(Bounded::new(of_one, patience));
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

/// Gives each connection a place ([`Connections`]).
#[derive(Clone)]
struct Bounded {
    connections: Connections,
    by_address: bool,
}

impl Bounded {
    /// At most `of_one` connections of one address; with 0 addresses say nothing.
    fn new(of_one: usize, patience: Patience) -> Self {
        let of_one = (of_one > 0).then_some(of_one);
        Self {
            connections: Connections::new(Bounds { all: CONNECTIONS, of_one, patience }),
            by_address: of_one.is_some(),
        }
    }
}

impl<S> Accept<TcpStream, S> for Bounded {
    type Stream = Watched;
    type Service = Serving<S>;
    type Future = Ready<io::Result<(Self::Stream, Self::Service)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let address = || if self.by_address { peer_address(stream.peer_addr().ok()?.ip()) } else { None };
        let peer = Peer(address());
        let accepted = stream.set_nodelay(true).and_then(|()| self.connections.open(stream, peer, service));
        ready(accepted)
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
    server.http_builder().http2().timer(TokioTimer::new()).max_concurrent_streams(STREAMS);
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
mod tests;
