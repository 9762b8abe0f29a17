//! The commented example that `generate-config` writes. The copy in `docker/` is kept current by a test.

use ruma::OwnedServerName;
use url::Url;

/// What the example is written for.
#[derive(Debug, Clone)]
pub struct Example {
    /// G.
    pub server_name: OwnedServerName,
    /// The Synapse's client API and server name; without one its section is commented out.
    pub homeserver: Option<(Url, OwnedServerName)>,
    /// The admin API's token.
    pub token: String,
}

/// The text of a configuration file.
pub fn example(example: &Example) -> String {
    let Example { server_name, homeserver, token } = example;
    let (off, url, name) = match homeserver {
        Some((url, name)) => ("", url.as_str().trim_end_matches('/').to_owned(), name.to_string()),
        None => ("# ", "http://127.0.0.1:8008".to_owned(), "example.org".to_owned()),
    };
    format!(
        r##"# The configuration of isthmus, a gateway between Matrix and Linearized Matrix (LM).
#
# Lines that begin with "# " and a key show the default. Relative paths are relative to this file's folder. Each key can
# also be set in the environment, which wins: `address` under [listen] is ISTHMUS_LISTEN__ADDRESS, lists are separated by
# commas, and `resolve` is written NAME=URL,NAME=URL.

# The gateway's own server name, on both sides. It must lead to this gateway (DNS, .well-known or SRV, like any Matrix
# server's) and must not be the homeserver's.
server_name = "{server_name}"

# The file with the key that signs events; made when it is absent. Keep it: other servers know the gateway by it.
# signing_key = "isthmus.signing.key"

# Where other servers reach the gateway, directly or through a reverse proxy.
[listen]
# address = "127.0.0.1:8448"
# Certificate chain and key in PEM files; leave both out when a reverse proxy does TLS.
# tls_certificate = "tls.pem"
# tls_private_key = "tls.key"
# What /.well-known/matrix/server says, which servers ask on port 443 of the gateway's name: the name and port where they
# reach it. Without it isthmus names its own port when it does TLS itself; behind a proxy it answers 404, which sends them to
# port 8448 of the name. Set it when the proxy has the gateway on another port and passes this path on.
# well_known = "lm.example.org:443"
# How many connections one address (of IPv6: one network of 64 bits) may have. Private and loopback addresses, where a proxy is,
# may have any number. 0 when a proxy with a public address stands in front: then nobody is told apart by addresses.
# connections_per_address = 256

[database]
# A SQLite file, or postgres://USER:PASSWORD@HOST/DATABASE. It holds the portals: with another one the gateway knows none of its
# rooms any more. Keep it together with the signing key.
# url = "sqlite://isthmus.db"
# How many days records of what went wrong are kept: why an event did not cross (`isthmus explain`, `isthmus portal show`),
# what a hub did wrong, what was given up for the homeserver, and portals that have ended (`isthmus portal list`). The newest of
# each room stay, and the newest portals; of one room there are never more than ten thousand. 0 keeps them for ever.
# keep_days = 30

# The Synapse whose users join LM rooms by alias. Leave the section out to run without one.
{off}[appservice]
# Where its client API is, and its server name.
{off}homeserver_url = "{url}"
{off}homeserver_name = "{name}"
# The registration file, written by `isthmus register` and named in homeserver.yaml under app_service_config_files.
{off}registration = "registration/isthmus.yaml"

[federation]
# PEM files of certificate authorities that are trusted besides the system's.
# custom_ca = []
# Whether private and loopback addresses may be dialled.
# allow_private_networks = false
# Public keys (ed25519 in unpadded base64, as servers publish them) that are known to have leaked, whosever they are:
# nothing that is signed with them is believed.
# leaked_keys = []
# Servers that are asked for the signing keys of others which do not answer themselves, one after the other. Whoever is named
# here is believed about servers that are away and whose keys are not known yet; about others only what one of the known keys signs.
# notaries = []

# Servers that are reached at a given base URL, without discovery; plain http for loopback only.
[federation.resolve]
# "hub.example" = "http://127.0.0.1:3000"

[access]
# LM servers with which portals may be made, and Matrix servers whose users may take part; * and ? are wildcards.
# hubs = ["*"]
# matrix_servers = ["*"]
# Who can cause a portal by naming an alias: "appservice" (whoever asks the Synapse above, which takes no account there),
# "anyone" or "off".
# create_by_alias = "appservice"
# LM servers whose users, and single LM users ("@bob:hub.example") who, make a portal of their room by inviting the
# gateway's bot, @isthmus and the gateway's server name, to it; * and ? are wildcards. The admins below always may.
# create_by_invite = []
# The same for Matrix: servers whose users, and single users ("@alice:example.org") who, make a portal of their Matrix room, with
# an LM room hubbed here, by inviting the bot to it.
# create_by_matrix_invite = []
# Who, of either side, makes a portal of their room by inviting users of the other side into it, as for a direct chat: servers, and
# single users. It is made when the invited user accepts.
# create_by_ghost_invite = ["*"]
# Users who may ask the Synapse's bot for the portals and have it invite into them, and whose portals stay.
# admins = []
# How many portals there may be. Where there are as many, the oldest that nobody uses gives way, but no admin's.
# max_portals = 10000

# Whether the logs of LM rooms change hands (docs/hub-transfer.md).
[hub_transfer]
# Whether an admin may hand the logs that the gateway keeps over to other servers.
# give = false
# Which servers' logs the gateway takes over when they ask it to, or which rooms' ("!room:hub.example"); "*" is any.
# accept = []

[portals]
# The version of Matrix rooms that the gateway makes: "10", "11" or "12".
# matrix_room_version = "12"
# What is done with encrypted rooms: "refuse" gives them no portal.
# encryption = "refuse"
# Whether the bot tells senders, in the room, why something of theirs did not cross.
# notices = true
# How many of the last events of a room that lives elsewhere are said again in the room across that is made of it, as far as who comes
# in later may read them; at most 1000, 0 for none.
# import_history = 100
# Whether there is a space for each LM hub, #hub_SERVER at the gateway's name, which holds those of its rooms here that anybody may join or
# ask to join.
# hub_spaces = false

# What crosses besides events; each costs a request to every server in the room across.
[bridge]
# Whether it is seen on the other side who is typing, and up to where somebody has read (public receipts only).
# typing = true
# receipts = true
# Whether it is seen who is online; of each user at most twice a minute.
# presence = false

# How much of one server's users may cross in one portal; what is over waits, and is refused after ten minutes. 0 is no limit.
[budgets]
# Events a second; a server that was quiet may send those of a minute at once.
# events_per_second = 1000
# Bytes of content a day.
# bytes_per_day = 4294967296
# Users who come in an hour.
# ghosts_per_hour = 5000
# Events of a foreign hub that may wait in a portal; with more, the hub is told to wait.
# backlog = 20000
# Portals of one LM server's rooms that are made in an hour by naming aliases, or by inviting the gateway's bot.
# portals_per_hour = 60
# How many invites into rooms without a portal may wait for their answer, of one user and of all users of one server.
# open_invites_per_user = 50
# open_invites_per_server = 1000
# What one server says a second besides events (typing, receipts, presence, messages for devices), in all rooms together; a server
# that was quiet may say that of a minute at once. What is over is dropped.
# edus_per_second = 100

# Images and other files that users of one side send. The other side's servers fetch them from the gateway, which fetches them from
# where they are when somebody first asks.
[media]
# How large a file may be, in bytes.
# max_bytes = 104857600
# How many bytes of files are kept on disk; those that nobody has asked for longest go first. At least four times `max_bytes`.
# cache_bytes = 2147483648
# The folder where they are kept, and nothing else is; made when it is absent. What is in it can be deleted while isthmus is stopped.
# cache_dir = "isthmus.media"

# The admin API, /health and /metrics. Keep this listener from the internet.
[admin]
# address = "127.0.0.1:9090"
# The admin API's bearer token; without one the API is off.
token = "{token}"

[caches]
# Events, and rooms with their state, that are kept in memory on each side.
# events = 50000
# rooms = 2000
"##
    )
}
