//! Each mistake in a configuration is answered by one sentence.

use std::path::{Path, PathBuf};

use super::environment::{KEYS, Kind, variable};
use serde_json::{Value, json};

use super::*;

fn load(text: &str) -> Result<Config, ConfigError> {
    load_with(text, &[])
}

fn load_with(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    load_in(folder.path(), text, variables)
}

fn load_in(folder: &Path, text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let path = folder.join("isthmus.toml");
    std::fs::write(&path, text).unwrap();
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::load_with(&path, variables)
}

/// The sentence with which a configuration is refused, without the folder's name.
fn sentence(text: &str, variables: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let message = load_in(folder.path(), text, variables).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message.replace(&format!("{}/", folder.path().display()), "")
}

const G: &str = "server_name = \"lm.example.org\"\n";

fn with_g(rest: &str) -> String {
    format!("{G}{rest}")
}

fn shown() -> Example {
    Example {
        server_name: "lm.example.org".try_into().unwrap(),
        homeserver: Some(("http://synapse:8008".parse().unwrap(), "example.org".try_into().unwrap())),
        token: "change-me".to_owned(),
    }
}

#[test]
fn a_server_name_is_enough() {
    let config = load(G).unwrap();
    assert_eq!(config.listen.address.port(), 8448);
    assert!(config.appservice.is_none());
    assert!(config.signing_key.is_absolute());
}

#[test]
fn the_example_in_docker_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/isthmus.example.toml");
    if std::env::var_os("ISTHMUS_TEST_WRITE").is_some() {
        std::fs::write(&path, example(&shown())).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert_eq!(kept, example(&shown()), "run this test with ISTHMUS_TEST_WRITE=1 to write {}", path.display());
}

#[test]
fn the_example_parses_with_and_without_a_homeserver() {
    let config = load(&example(&shown())).unwrap();
    assert_eq!(config.appservice.unwrap().homeserver_name, "example.org");
    let config = load(&example(&Example { homeserver: None, ..shown() })).unwrap();
    assert!(config.appservice.is_none());
    assert_eq!(config.admin.token.as_deref(), Some("change-me"));
}

#[test]
fn the_example_shows_every_key_with_its_default() {
    let uncommented: String = example(&shown())
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting) if setting.contains(" = ") => format!("{setting}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    for file in ["tls.pem", "tls.key"] {
        std::fs::write(folder.path().join(file), "").unwrap();
    }
    let all = load_in(folder.path(), &uncommented, &[]).unwrap();
    let defaults = load_in(folder.path(), &example(&shown()), &[]).unwrap();
    let without_examples = Config {
        listen: Listen { tls_certificate: None, tls_private_key: None, well_known: None, ..all.listen },
        federation: Federation { resolve: BTreeMap::new(), ..all.federation },
        ..all
    };
    assert_eq!(format!("{without_examples:?}"), format!("{defaults:?}"));
    for (key, kind) in KEYS {
        let name = key.rsplit('.').next().unwrap();
        let found = match kind {
            Kind::Table => uncommented.contains(&format!("[{key}]")),
            _ => uncommented.lines().any(|line| line.starts_with(&format!("{name} = "))),
        };
        assert!(found, "{key}");
    }
}

/// As Kubernetes and container links set them for a service that is called isthmus.
#[test]
fn variables_about_a_service_are_no_keys() {
    let service = ["PORT", "PORT_8448_TCP_ADDR", "SERVICE_HOST", "SERVICE_PORT"].map(|name| format!("ISTHMUS_{name}"));
    let service: Vec<(&str, &str)> = service.iter().map(|name| (name.as_str(), "tcp://10.0.0.1:8448")).collect();
    assert_eq!(load_with("server_name = \"g\"", &service).unwrap().server_name, "g");
    let hinted = load_with("", &[("ISTHMUS_PORTAL__NOTICES", "true")]).unwrap_err().to_string();
    assert!(hinted.contains("did you mean ISTHMUS_PORTALS__NOTICES?"), "{hinted}");
}

#[test]
fn every_key_can_be_set_in_the_environment() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["a.pem", "b.pem"] {
        std::fs::write(folder.path().join(file), "").unwrap();
    }
    // Those that need each other stand together.
    let appservice = "[appservice]\nhomeserver_url = \"http://a/\"\nhomeserver_name = \"a\"\nregistration = \"a\"";
    let tls = "[listen]\ntls_certificate = \"b.pem\"\ntls_private_key = \"b.pem\"";
    let cases = [
        ("server_name", "other.example", ""),
        ("signing_key", "/k", ""),
        ("listen.address", "[::1]:1", ""),
        ("listen.tls_certificate", "a.pem", tls),
        ("listen.tls_private_key", "a.pem", tls),
        ("listen.well_known", "g.example:443", ""),
        ("listen.connections_per_address", "9", ""),
        ("database.url", "postgres://u:p@h/d", ""),
        ("database.keep_days", "9", ""),
        ("appservice.homeserver_url", "https://h/x", appservice),
        ("appservice.homeserver_name", "h", appservice),
        ("appservice.registration", "r", appservice),
        ("federation.custom_ca", "a.pem, b.pem", ""),
        ("federation.leaked_keys", "Noi6WqcDj0QmPxCNQqgezwTlBKrfqehY1u2FyWP9uYw", ""),
        ("federation.notaries", "matrix.example, hub.example:8448", ""),
        ("federation.allow_private_networks", "true", ""),
        ("federation.resolve", "a.example=http://127.0.0.1:1,b=https://c", ""),
        ("access.hubs", "a,*.b", ""),
        ("access.matrix_servers", "[\"a\"]", ""),
        ("access.create_by_alias", "off", ""),
        ("access.create_by_invite", "hub.example,@*:b", ""),
        ("access.create_by_matrix_invite", "@a:hs.example", ""),
        ("access.create_by_ghost_invite", "hs.example,@a:hub.example", ""),
        ("access.admins", "@a:b", ""),
        ("access.max_portals", "7", ""),
        ("hub_transfer.give", "true", ""),
        ("hub_transfer.accept", "hub.example,!room:b", ""),
        ("portals.matrix_room_version", "11", ""),
        ("portals.encryption", "refuse", ""),
        ("portals.notices", "false", ""),
        ("portals.import_history", "0", ""),
        ("portals.hub_spaces", "true", ""),
        ("bridge.typing", "false", ""),
        ("bridge.receipts", "false", ""),
        ("bridge.presence", "true", ""),
        ("budgets.events_per_second", "9", ""),
        ("budgets.bytes_per_day", "9", ""),
        ("budgets.ghosts_per_hour", "9", ""),
        ("budgets.backlog", "9", ""),
        ("budgets.portals_per_hour", "9", ""),
        ("budgets.open_invites_per_user", "9", ""),
        ("budgets.open_invites_per_server", "9", ""),
        ("budgets.edus_per_second", "9", ""),
        ("media.max_bytes", "70000", ""),
        ("media.cache_bytes", "9000000000", ""),
        ("media.cache_dir", "/media", ""),
        ("admin.address", "127.0.0.1:1", ""),
        ("admin.token", "12345", ""),
        ("caches.events", "99", ""),
        ("caches.rooms", "98", ""),
    ];
    for (key, text, base) in cases {
        let base = with_g(base);
        let unset = load_in(folder.path(), &base, &[]).unwrap();
        let set =
            load_in(folder.path(), &base, &[(&variable(key), text)]).unwrap_or_else(|error| panic!("{key}: {error}"));
        let secret = ["admin.token", "database.url"].contains(&key);
        assert!(
            secret || key == "portals.encryption" || format!("{set:?}") != format!("{unset:?}"),
            "{key} was not read"
        );
    }
    let untested = KEYS.iter().find(|(key, _)| cases.iter().all(|(tested, _, _)| tested != key));
    assert!(untested.is_none(), "a new key belongs into this test: {untested:?}");
    let config = load_with(G, &[("ISTHMUS_ADMIN__TOKEN", "12345"), ("ISTHMUS_SERVER_NAME", "")]).unwrap();
    assert_eq!(config.admin.token.as_deref(), Some("12345"));
    assert_eq!(config.server_name, "lm.example.org", "empty variables are as good as absent");
}

#[test]
fn paths_are_relative_to_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("with space%20?");
    std::fs::create_dir(&inner).unwrap();
    let config = load_in(&inner, &with_g("signing_key = \"k\"\n[database]\nurl = \"sqlite://d.db?x=y\""), &[]).unwrap();
    assert_eq!(config.signing_key, inner.join("k"));
    let url = config.database.url.strip_prefix("sqlite://").unwrap();
    let (path, query) = url.split_once('?').unwrap();
    let path = percent_encoding::percent_decode_str(path).decode_utf8().unwrap();
    assert_eq!((PathBuf::from(path.as_ref()), query), (inner.join("d.db"), "x=y"));
}

#[test]
fn secrets_are_in_no_debug_output_and_no_message() {
    let text = with_g("[database]\nurl = \"postgres://u:hushhush@h/d\"\n[admin]\ntoken = \"hushhush\"");
    assert!(!format!("{:?}", load(&text).unwrap()).contains("hushhush"));
    for text in [
        "[admin]\ntoken = \"hush hush\"",
        "[database]\nurl = \"mysql://u:hush@h/d\"",
        "[database]\nurl = \"postgres://u:hush@:x/d\"",
        "[admin]\ntoken = [\"hush\"]",
        "[admin]\ntoken = \"hush",
    ] {
        let message = sentence(&with_g(text), &[]);
        assert!(!message.contains("hush"), "{message}");
    }
}

#[test]
fn a_missing_file_says_how_to_make_one() {
    let message = Config::load(Path::new("/nowhere/isthmus.toml")).unwrap_err().to_string();
    assert!(message.starts_with("there is no configuration file /nowhere/isthmus.toml: write one with"), "{message}");
    let message = Config::load(Path::new("/")).unwrap_err().to_string();
    assert!(message.contains("cannot be read"), "{message}");
}

#[test]
fn each_mistake_gets_one_sentence() {
    let mut failures = Vec::new();
    for (text, variables, expected) in [
        ("", &[][..], "isthmus.toml: `server_name` is missing: add it, or set ISTHMUS_SERVER_NAME in the environment"),
        (
            "server_name = lm\n",
            &[],
            "the configuration file isthmus.toml is not valid TOML: at line 1, column 15: expected",
        ),
        ("server_name = \"a b\"", &[], "isthmus.toml: `server_name` is \"a b\", which is not valid ("),
        ("server_name = \"https://a\"", &[], "): write a server name, as in \"lm.example.org\""),
        ("server_name = 7", &[], "isthmus.toml: `server_name` is 7: write a server name, as in \"lm.example.org\""),
        (
            "server_name = \"g\"\n[listn]",
            &[],
            "isthmus.toml: `listn` is not a key of the configuration: did you mean the section [listen]?",
        ),
        ("server_name = \"g\"\nlisten = 1", &[], "isthmus.toml: `listen` is 1: write it as a section, in brackets"),
        ("server_name = \"g\"\nsigning_key = 1", &[], "isthmus.toml: `signing_key` is 1: write a text in quotes"),
        (
            "server_name = \"g\"\n[portals]\nnotices = \"yes\"",
            &[],
            "isthmus.toml: `portals.notices` is \"yes\": write true or false without quotes",
        ),
        (
            "server_name = \"g\"\n[access]\nhubs = \"hub\"",
            &[],
            "isthmus.toml: `access.hubs` is \"hub\": write a list of texts, as in [\"one\", \"two\"]",
        ),
        (
            "server_name = \"g\"\n[budgets]\nbacklog = -1",
            &[],
            "isthmus.toml: `budgets.backlog` is -1: write a whole number from 0 to 4294967295 without quotes",
        ),
        (
            "server_name = \"g\"\n[federation.resolve]\n\"hub.example\" = \"192.0.2.7\"",
            &[],
            "): write server names and URLs, as in \"hub.example\" = \"https://192.0.2.7:8448\"",
        ),
        (
            "server_name = \"g\"\n[appservice]\nhomeserver_url = \"h\"\nhomeserver_name = \"h\"\nregistration = \"r\"",
            &[],
            "): write a URL, as in \"http://127.0.0.1:8008\"",
        ),
        (
            "server_name = \"g\"\n[listen]\nadress = \"x\"",
            &[],
            "isthmus.toml: `listen.adress` is not a key of the configuration: did you mean `listen.address`?",
        ),
        (
            "server_name = \"g\"\nadmin_token = \"x\"",
            &[],
            "isthmus.toml: `admin_token` is not a key of the configuration: did you mean `admin.token`?",
        ),
        ("server_name = \"g\"\nqwx = 1", &[], "isthmus.toml: `qwx` is not a key of the configuration: take it out"),
        (
            "server_name = \"g\"",
            &[("ISTHMUS_LISTEN_ADDRESS", "x")],
            "the environment variable ISTHMUS_LISTEN_ADDRESS sets no key of the configuration: did you mean \
             ISTHMUS_LISTEN__ADDRESS?",
        ),
        (
            "server_name = \"g\"\n[listen]\naddress = \"localhost\"",
            &[],
            "isthmus.toml: `listen.address` is \"localhost\", which is not valid (invalid socket address syntax): write \
             \"IP:PORT\", as in \"127.0.0.1:8448\"",
        ),
        (
            "server_name = \"g\"",
            &[("ISTHMUS_LISTEN__ADDRESS", "8448")],
            "ISTHMUS_LISTEN__ADDRESS: `listen.address` is \"8448\", which is not valid (invalid socket address syntax): write \
             \"IP:PORT\"",
        ),
        (
            "server_name = \"g\"",
            &[("ISTHMUS_ACCESS__MAX_PORTALS", "many")],
            "ISTHMUS_ACCESS__MAX_PORTALS: `access.max_portals` is \"many\": write a whole number",
        ),
        (
            "server_name = \"g\"\n[access]\ncreate_by_alias = \"all\"",
            &[],
            "isthmus.toml: `access.create_by_alias` is \"all\", but it must be one of appservice, anyone, off",
        ),
        (
            "server_name = \"g\"\n[portals]\nencryption = \"all\"",
            &[],
            "isthmus.toml: `portals.encryption` is \"all\", but it must be refuse, the only one that there is",
        ),
        (
            "server_name = \"LM.example.org\"",
            &[],
            "isthmus.toml: `server_name` is LM.example.org, but servers compare names letter by letter: write lm.example.org",
        ),
        (
            "server_name = \"g\"\n[listen]\ntls_certificate = \"tls.pem\"",
            &[],
            "isthmus.toml: `listen.tls_private_key` is missing although `listen.tls_certificate` is set: ",
        ),
        (
            "server_name = \"g\"\n[federation]\nnotaries = [\"g\"]",
            &[],
            "isthmus.toml: `federation.notaries` holds g, which is this gateway: name other servers only",
        ),
        (
            "server_name = \"g\"\n[federation]\nleaked_keys = [\"AAAA\"]",
            &[],
            "isthmus.toml: `federation.leaked_keys` holds \"AAAA\", which is no public key (",
        ),
        (
            "server_name = \"g\"\n[federation]\ncustom_ca = [\"ca.pem\"]",
            &[],
            "isthmus.toml: `federation.custom_ca` is ca.pem, which cannot be read (No such file",
        ),
        (
            "server_name = \"g\"\n[federation.resolve]\n\"hub.example\" = \"http://192.0.2.1:3000\"",
            &[],
            "isthmus.toml: `federation.resolve` leads hub.example to http://192.0.2.1:3000/, but plain http is for loopback",
        ),
        (
            "server_name = \"g\"\n[portals]\nmatrix_room_version = \"9\"",
            &[],
            "isthmus.toml: `portals.matrix_room_version` is \"9\", but isthmus makes Matrix rooms of version",
        ),
        (
            "server_name = \"g\"\n[database]\nurl = \"isthmus.db\"",
            &[],
            "isthmus.toml: `database.url` must begin with sqlite:// or postgres://",
        ),
        (
            "server_name = \"g\"\n[database]\nurl = \"sqlite://data/isthmus.db\"",
            &[],
            "isthmus.toml: `database.url` names a file in data, which is no folder: make it first",
        ),
        (
            "server_name = \"g\"\n[appservice]\nhomeserver_url = \"http://h\"\nhomeserver_name = \"g\"\nregistration = \"r\"",
            &[],
            "isthmus.toml: `appservice.homeserver_name` is g, the same as `server_name`: ",
        ),
        (
            "server_name = \"g\"\n[appservice]\nhomeserver_url = \"h:8008\"\nhomeserver_name = \"h\"\nregistration = \"r\"",
            &[],
            "isthmus.toml: `appservice.homeserver_url` is \"h:8008\", but it must begin with http:// or https://",
        ),
        (
            "server_name = \"g\"",
            &[("ISTHMUS_APPSERVICE__HOMESERVER_URL", "http://h")],
            "`appservice.homeserver_name` is missing: add it, or set ISTHMUS_APPSERVICE__HOMESERVER_NAME",
        ),
        (
            "server_name = \"192.0.2.1:8448\"",
            &[],
            "isthmus.toml: `server_name` is 192.0.2.1:8448, but LM knows no names that are addresses: give the gateway",
        ),
        (
            "server_name = \"g\"\n[admin]\naddress = \"127.0.0.1:8448\"",
            &[],
            "isthmus.toml: `admin.address` is 127.0.0.1:8448, which `listen.address` has already",
        ),
        (
            "server_name = \"g\"\n[access]\nhubs = [\"https://hub\"]",
            &[],
            "isthmus.toml: `access.hubs` holds \"https://hub\", but it must hold server names",
        ),
        (
            "server_name = \"g\"\n[access]\ncreate_by_invite = [\"@bob\"]",
            &[],
            "isthmus.toml: `access.create_by_invite` holds \"@bob\", but it must hold server names or user IDs",
        ),
        (
            "server_name = \"g\"\n[access]\nadmins = [\"admin\"]",
            &[],
            "isthmus.toml: `access.admins.0` is \"admin\", which is not valid (leading sigil is incorrect or missing): write a \
             list of user IDs, as in [\"@admin:example.org\"]",
        ),
        (
            "server_name = \"g\"\n[media]\nmax_bytes = 9",
            &[],
            "isthmus.toml: `media.max_bytes` is 9, but must be at least 65536",
        ),
        (
            "server_name = \"g\"\n[media]\ncache_bytes = 104857600",
            &[],
            "isthmus.toml: `media.cache_bytes` is 104857600, but must be at least 419430400, which is 4 times",
        ),
        ("server_name = \"g\"\n[caches]\nrooms = 0", &[], "isthmus.toml: `caches.rooms` is 0, but a cache must hold"),
    ] {
        let message = sentence(text, variables);
        if !message.contains(expected) {
            failures.push(format!("{text:?}\n   got {message}\nwanted {expected}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_well_known_name_is_the_one_that_is_set_or_the_one_that_is_true() {
    let delegated = |name: &str, listen: Value| {
        let config: Config = serde_json::from_value(json!({ "server_name": name, "listen": listen })).unwrap();
        config.delegated()
    };
    let tls = json!({ "tls_certificate": "c", "tls_private_key": "k", "address": "0.0.0.0:443" });
    for (name, listen, expected) in [
        ("g.example", json!({}), None),
        ("g.example", json!({ "address": "0.0.0.0:443" }), None),
        ("g.example", tls, Some("g.example:443")),
        ("g.example:8449", json!({}), Some("g.example:8449")),
        ("g.example", json!({ "well_known": "proxy.example:443" }), Some("proxy.example:443")),
        ("g.example:8449", json!({ "well_known": "proxy.example" }), Some("proxy.example")),
    ] {
        assert_eq!(delegated(name, listen.clone()).as_deref(), expected, "{name} {listen}");
    }
}
