//! What a network address says of who is at the other end.

use std::net::{IpAddr, Ipv6Addr};

use super::dialler::is_public;

/// The address by which the owner of a machine is told from others: an IPv4 address, or an IPv6 network of 64 bits, since whoever
/// has one of its addresses has them all. None for private and loopback addresses: there a reverse proxy stands for everybody.
pub fn peer_address(address: IpAddr) -> Option<IpAddr> {
    let address = address.to_canonical();
    is_public(address).then_some(match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => {
            let network = u128::from(address) >> 64 << 64;
            Ipv6Addr::from(network).into()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_known_by_its_address_or_network_unless_a_proxy_may_stand_there() {
        for (address, expected) in [
            ("1.2.3.4", Some("1.2.3.4")),
            ("::ffff:1.2.3.4", Some("1.2.3.4")),
            ("2a00:1450:1:2:3:4:5:6", Some("2a00:1450:1:2::")),
            ("127.0.0.1", None),
            ("::ffff:10.0.0.1", None),
            ("::1", None),
            ("fd00::1", None),
        ] {
            let expected = expected.map(|address| address.parse().unwrap());
            assert_eq!(peer_address(address.parse().unwrap()), expected, "{address}");
        }
    }
}
