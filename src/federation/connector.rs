//! How a connection to a server comes about: where its name leads, which of those addresses may be dialled, and what is offered
//! to be spoken there. What goes over the wire names the server (`Host`, `:authority`); what is dialled, and for which name its
//! certificate must be, may be another.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::Uri;
use http::uri::{Authority, Scheme};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName as TlsName;
use tokio::net::TcpStream;
use tower::{BoxError, Service};
use url::{Host, Url};

use super::dialler::Reach;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many addresses of one name are tried.
const MAX_ADDRESSES: usize = 16;
/// The port of federation.
const PORT: u16 = 8448;

/// A name's addresses and ports, in the order in which they are to be tried; port 0 stands for the dialled URI's.
pub(super) type Targets = Vec<(String, u16)>;

/// Where the server of a request is dialled.
pub(super) trait TargetSource: Send + Sync + 'static {
    /// What is dialled for `uri`: its host is the name that the certificate must be for.
    fn dialled(&self, uri: Uri) -> Uri {
        uri
    }

    /// The hosts that stand behind the name `name` of what is dialled.
    fn targets(&self, name: String) -> BoxFuture<'static, Targets> {
        Box::pin(std::future::ready(vec![(name, 0)]))
    }
}

/// The URI's own host and port.
pub(super) struct Itself;

impl TargetSource for Itself {}

/// The URI's own host; the port is 8448 unless the URI has one.
pub(super) struct Federation;

impl TargetSource for Federation {
    fn dialled(&self, uri: Uri) -> Uri {
        if uri.port().is_some() || uri.scheme() != Some(&Scheme::HTTPS) {
            return uri;
        }
        let authority = format!("{}:{PORT}", uri.host().unwrap_or_default());
        with_authority(Scheme::HTTPS, authority.parse().ok()).unwrap_or(uri)
    }
}

/// One place, whatever the URI.
pub(super) struct Fixed(Uri);

impl Fixed {
    /// The place of a base URL.
    pub(super) fn new(base: &Url) -> Result<Self, http::uri::InvalidUri> {
        Ok(Self(base.as_str().parse()?))
    }
}

impl TargetSource for Fixed {
    fn dialled(&self, _: Uri) -> Uri {
        self.0.clone()
    }
}

fn with_authority(scheme: Scheme, authority: Option<Authority>) -> Option<Uri> {
    Uri::builder().scheme(scheme).authority(authority?).path_and_query("/").build().ok()
}

/// Opens connections; over TLS HTTP/2 is offered before HTTP/1.1.
#[derive(Clone)]
pub(super) struct Connector {
    tcp: HttpsConnector<HttpConnector<GuardedResolver>>,
    targets: Arc<dyn TargetSource>,
    reach: Reach,
}

impl Connector {
    pub(super) fn new(mut tls: rustls::ClientConfig, reach: Reach, targets: Arc<dyn TargetSource>) -> Self {
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut tcp = HttpConnector::new_with_resolver(GuardedResolver { targets: targets.clone(), reach });
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_keepalive(Some(Duration::from_secs(30)));
        tcp.set_nodelay(true);
        Self { tcp: HttpsConnector::new(tcp, tls, false, Arc::new(certified)), targets, reach }
    }

    /// What is dialled for `uri`, unless that may not be. Addresses that stand in the URI itself never reach the resolver.
    pub(super) fn dialled(&self, uri: Uri) -> Result<Uri, String> {
        let dialled = self.targets.dialled(uri);
        // A URL parser knows all the ways in which an address can be written.
        let url = Url::parse(&dialled.to_string()).map_err(|error| format!("{dialled}: {error}"))?;
        let literal = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        };
        match literal.filter(|address| !self.reach.allows(*address)) {
            Some(address) => Err(format!("{address} may not be dialled")),
            None => Ok(dialled),
        }
    }
}

/// A host without the brackets of IPv6 addresses.
pub(super) fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

/// The name that the certificate must be for.
fn certified(dialled: &Uri) -> Result<TlsName<'static>, rustls::pki_types::InvalidDnsNameError> {
    TlsName::try_from(bare(dialled.host().unwrap_or_default()).to_owned())
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.dialled(uri).map(|dialled| self.tcp.call(dialled));
        Box::pin(async move {
            match tokio::time::timeout(CONNECT_TIMEOUT, connecting?).await {
                Ok(connected) => connected,
                Err(_) => Err(format!("no connection within {CONNECT_TIMEOUT:?}").into()),
            }
        })
    }
}

/// Addresses of names, without those that may not be dialled.
#[derive(Clone)]
pub(super) struct GuardedResolver {
    pub targets: Arc<dyn TargetSource>,
    pub reach: Reach,
}

impl GuardedResolver {
    async fn addresses(self, name: String) -> io::Result<Vec<SocketAddr>> {
        let mut found = Vec::new();
        let mut problem = format!("{name} has no address");
        for (host, port) in self.targets.targets(name).await {
            match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host.as_str(), port))).await {
                Ok(Ok(addresses)) => {
                    for address in addresses {
                        if self.reach.allows(address.ip()) {
                            found.push(address);
                        } else {
                            problem = format!("{host} is at {}, which may not be dialled", address.ip());
                        }
                    }
                }
                Ok(Err(error)) => problem = format!("{host}: {error}"),
                Err(_) => problem = format!("{host} was not resolved in time"),
            }
        }
        if found.is_empty() {
            return Err(io::Error::other(problem));
        }
        found.truncate(MAX_ADDRESSES);
        Ok(found)
    }
}

impl Service<Name> for GuardedResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let looking_up = self.clone().addresses(name.as_str().to_owned());
        Box::pin(async move { Ok(looking_up.await?.into_iter()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn hc_57_names_of_private_addresses_are_refused_after_the_look_up() {
        let resolver = GuardedResolver { targets: Arc::new(Itself), reach: Reach::Public };
        let error = resolver.addresses("localhost".to_owned()).await.unwrap_err();
        assert!(error.to_string().contains("may not be dialled"), "{error}");
        let resolver = GuardedResolver { targets: Arc::new(Itself), reach: Reach::Everything };
        let found = resolver.addresses("localhost".to_owned()).await.unwrap();
        assert!(found.iter().all(|found| found.ip().is_loopback()));
    }

    #[test]
    fn what_is_dialled_may_be_another_place_than_what_is_asked() {
        let named: Url = "http://127.0.0.1:3000/base".parse().unwrap();
        let named = Fixed::new(&named).unwrap();
        for (source, uri, expected) in [
            (&Itself as &dyn TargetSource, "https://a.example/x", "https://a.example/x"),
            (&Federation, "https://a.example/x", "https://a.example:8448/"),
            (&Federation, "https://a.example:443/", "https://a.example:443/"),
            (&Federation, "https://1.2.3.4/", "https://1.2.3.4:8448/"),
            (&Federation, "https://[2001:db8::1]/", "https://[2001:db8::1]:8448/"),
            (&named, "http://a.example/", "http://127.0.0.1:3000/base"),
        ] {
            assert_eq!(source.dialled(uri.parse().unwrap()), expected, "{uri}");
        }
    }
}
