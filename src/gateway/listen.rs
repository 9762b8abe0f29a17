//! Listeners: TLS or plain, bounded in how long a peer may take to begin, ending in order.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum_server::tls_rustls::RustlsConfig;
use axum_server::{Handle, Server};
use hyper_util::rt::TokioTimer;
use tokio::task::JoinHandle;

use crate::config::Listen;
use crate::federation::crypto_provider;

/// How long the head of a request may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How many bytes of a connection are buffered at most; also the limit of a request's head.
const BUFFER: usize = 64 << 10;

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
        source: std::io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("tls_certificate {certificate} with tls_private_key {key}: {source}")]
    Tls {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        source: std::io::Error,
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
        let mut server = axum_server::from_tcp_rustls(socket, tls).map_err(wrong)?.handle(handle.clone());
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
        let mut server = axum_server::from_tcp(socket).map_err(wrong)?.handle(handle.clone());
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

fn ended(name: &str, result: std::io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(name, %error, "a listener ended");
    }
}
