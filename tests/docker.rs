//! What stands in `docker/` and `deploy/` fits together: the compose file is YAML, names files that are there and sets keys that
//! exist; the unit starts the gateway as the command line has it.

use std::path::Path;

use isthmus::config::Config;
use serde_yaml_ng::Value;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/docker"))
}

fn compose() -> Value {
    serde_yaml_ng::from_str(&std::fs::read_to_string(folder().join("compose.yaml")).unwrap()).unwrap()
}

#[test]
fn the_compose_file_starts_the_gateway_with_the_example() {
    let compose = compose();
    let isthmus = &compose["services"]["isthmus"];
    let variables = isthmus["environment"].as_mapping().unwrap().iter().map(|(name, value)| {
        // As compose fills in what is required from .env.
        let value = value.as_str().unwrap();
        let filled = match (value.find("${"), value.find('}')) {
            (Some(start), Some(end)) => format!("{}random{}", &value[..start], &value[end + 1..]),
            _ => value.to_owned(),
        };
        (name.as_str().unwrap().to_owned(), filled)
    });
    let config = Config::load_with(&folder().join("isthmus.example.toml"), variables).unwrap();
    assert_eq!(config.database.url, "postgres://matrix:random@postgres/isthmus");
    assert_eq!(config.listen.address, "0.0.0.0:8448".parse().unwrap());
    assert_eq!(config.appservice.unwrap().registration, Path::new("/registration/isthmus.yaml"));
}

#[test]
fn the_compose_file_names_files_that_are_there() {
    let compose = compose();
    let services = compose["services"].as_mapping().unwrap();
    let names: Vec<&str> = services.keys().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(names, ["postgres", "synapse", "isthmus"]);
    for volume in services.values().flat_map(|service| service["volumes"].as_sequence().unwrap()) {
        let from = match volume.as_str() {
            Some(short) => short.split(':').next().unwrap(),
            None => volume["source"].as_str().unwrap(),
        };
        match from.strip_prefix("./") {
            // Made in the course of the first start.
            Some("synapse" | "isthmus.toml") => {}
            Some(file) => assert!(folder().join(file).exists(), "{file}"),
            None => assert!(compose["volumes"].get(from).is_some(), "{from}"),
        }
    }
    let dockerfile = services["isthmus"]["build"]["dockerfile"].as_str().unwrap();
    assert!(folder().join("..").join(dockerfile).exists());
}

#[test]
fn the_image_runs_without_rights_and_says_how_it_is() {
    let dockerfile = std::fs::read_to_string(folder().join("Dockerfile")).unwrap();
    let last_stage = dockerfile.rsplit("\nFROM ").next().unwrap();
    for part in ["\nUSER isthmus\n", "\nHEALTHCHECK ", "ENTRYPOINT [\"isthmus\"]", "ISTHMUS_CONFIG=/data/isthmus.toml"]
    {
        assert!(last_stage.contains(part), "{part}");
    }
}

#[test]
fn the_unit_starts_the_gateway_again_and_again_with_few_rights() {
    let unit = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/isthmus.service"));
    let text = std::fs::read_to_string(unit).unwrap();
    let values = |key: &str| -> Vec<&str> {
        text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
    };
    assert_eq!(values("ExecStart"), ["/usr/local/bin/isthmus serve --config isthmus.toml"]);
    for (key, value) in [("Restart", "always"), ("LimitNOFILE", "16384"), ("ProtectSystem", "strict")] {
        assert_eq!(values(key), [value], "{key}");
    }
    // Where there is a systemd, it is asked; it wants to see the program and the user.
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("isthmus.service");
    let text = text.replace("/usr/local/bin/isthmus", env!("CARGO_BIN_EXE_isthmus"));
    std::fs::write(&copy, text.replace("User=isthmus", "User=daemon").replace("Group=isthmus", "Group=daemon"))
        .unwrap();
    let verify = std::process::Command::new("systemd-analyze").arg("verify").arg(&copy).output();
    let Ok(verify) = verify else { return };
    let told = String::from_utf8_lossy(&verify.stderr);
    // What it says of other units of this machine is not about this one.
    assert!(!told.contains("isthmus.service:"), "{told}");
}
