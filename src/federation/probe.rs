//! Requests as whoever examines a server sends them: with any path, any headers and any body, and an answer that nothing has
//! looked at yet. Discovery and the dialler are those of the client.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri, header};
use http_body_util::Full;
use ruma::ServerName;
use rustls::pki_types::ServerName as TlsName;

use super::client::{Client, RemoteError};
use super::discovery::Route;
use super::{connector, dialler};

/// How much of an answer is read.
const LIMIT: usize = 16 << 20;
/// How long each step of a bare TLS handshake may take.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);

/// A request as it goes over the wire.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The method.
    pub method: Method,
    /// Path and query.
    pub uri: String,
    /// The values of `Authorization`, each in a header of its own.
    pub authorization: Vec<String>,
    /// The body.
    pub body: Option<Bytes>,
    /// How long everything may take.
    pub timeout: Duration,
}

/// An answer as it came.
#[derive(Debug, Clone)]
pub struct ProbeAnswer {
    /// HTTP status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// What a TLS handshake agreed on.
#[derive(Debug, Clone)]
pub struct TlsFacts {
    /// The version of TLS, as `TLSv1_3`.
    pub version: String,
    /// What was agreed on to be spoken, of `h2` and `http/1.1`.
    pub alpn: Option<String>,
}

impl Client {
    /// Sends a request as it is; any status is an answer.
    pub async fn probe(&self, destination: &ServerName, probe: Probe) -> Result<ProbeAnswer, RemoteError> {
        let Probe { method, uri, authorization, body, timeout } = probe;
        let asking = async {
            let (route, http) = self.route(destination).await;
            let mut request = http.request(method, whole(&route, &uri)?)?;
            for value in authorization {
                request = request.header(header::AUTHORIZATION, value);
            }
            if body.is_some() {
                request = request.header(header::CONTENT_TYPE, "application/json");
            }
            let request = request.body(Full::new(body.unwrap_or_default()));
            let request = request.map_err(|error| RemoteError::Unreachable(error.to_string()))?;
            http.send(destination.as_str(), request, timeout, LIMIT, LIMIT).await
        };
        match tokio::time::timeout(timeout, asking).await {
            Ok(answer) => answer.map(|a| ProbeAnswer { status: a.status, headers: a.headers, body: a.body }),
            Err(_) => Err(RemoteError::Unreachable(format!("no answer within {timeout:?}"))),
        }
    }

    /// What a TLS handshake with a server agrees on, when it is offered HTTP/2; none where it is reached without TLS.
    pub async fn tls_facts(&self, destination: &ServerName) -> Result<Option<TlsFacts>, RemoteError> {
        let (route, http) = self.route(destination).await;
        let wrong = |problem: String| RemoteError::Unreachable(problem);
        let dialled = http.dialled(whole(&route, "/")?)?;
        if dialled.scheme_str() != Some("https") {
            return Ok(None);
        }
        let host = connector::bare(dialled.host().unwrap_or_default()).to_owned();
        let port = dialled.port_u16().unwrap_or(443);
        let mut config = dialler::tls_config(self.custom_ca()).map_err(|error| wrong(error.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let shake = tokio::task::spawn_blocking(move || handshake(&host, port, config));
        match shake.await {
            Ok(facts) => facts.map(Some).map_err(|error| wrong(error.to_string())),
            Err(error) => Err(wrong(error.to_string())),
        }
    }
}

fn whole(route: &Route, uri: &str) -> Result<Uri, RemoteError> {
    let text = format!("{}{uri}", route.base);
    text.parse().map_err(|error| RemoteError::Unreachable(format!("{text:?}: {error}")))
}

fn handshake(host: &str, port: u16, config: rustls::ClientConfig) -> io::Result<TlsFacts> {
    use std::net::ToSocketAddrs as _;
    let name = TlsName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let address = (host, port).to_socket_addrs()?.next().ok_or_else(|| io::Error::other("it has no address"))?;
    let mut stream = std::net::TcpStream::connect_timeout(&address, TLS_TIMEOUT)?;
    stream.set_read_timeout(Some(TLS_TIMEOUT))?;
    stream.set_write_timeout(Some(TLS_TIMEOUT))?;
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    Ok(TlsFacts {
        version: connection.protocol_version().map(|version| format!("{version:?}")).unwrap_or_default(),
        alpn: connection.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned()),
    })
}
