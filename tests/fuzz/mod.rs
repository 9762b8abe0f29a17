//! The fuzz targets of `fuzz/`, run over their corpora and over mutations of these, made of a seed: `ISTHMUS_SEED=N` chooses it,
//! `ISTHMUS_MUTATIONS=N` how many are made of each file.

#[path = "../../fuzz/src/lib.rs"]
mod bodies;
mod sent;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// How many mutations are made of each file of a corpus.
const MUTATIONS: usize = 150;
/// How long a mutation may become, in bytes.
const MOST: usize = 20_000;

#[test]
fn events_hold_what_is_promised_whatever_comes() {
    run("event", bodies::event);
}

#[test]
fn canonical_json_holds_what_is_promised_whatever_comes() {
    run("canonical_json", bodies::canonical_json_of);
}

#[test]
fn x_matrix_headers_hold_what_is_promised_whatever_comes() {
    run("x_matrix", bodies::x_matrix);
}

#[test]
fn transactions_hold_what_is_promised_whatever_comes() {
    run("send", bodies::send);
}

/// Each file as it is, and mutations of it.
fn run(target: &str, body: fn(&[u8])) {
    let corpus = corpus(target);
    assert!(corpus.len() > 20, "hardly anything is in the corpus of {target}");
    let seed = number("ISTHMUS_SEED").unwrap_or(1);
    let mutations = number("ISTHMUS_MUTATIONS").map_or(MUTATIONS, |number| usize::try_from(number).unwrap());
    let mut random = StdRng::seed_from_u64(seed);
    for (name, data) in &corpus {
        holds(&format!("{target}/{name}"), body, data);
        for number in 0..mutations {
            let other = &corpus[random.gen_range(0..corpus.len())].1;
            let mutated = mutated(data, other, &mut random);
            holds(&format!("mutation {number} of {target}/{name}, seed {seed}"), body, &mutated);
        }
    }
}

fn holds(name: &str, body: fn(&[u8]), data: &[u8]) {
    let held = catch_unwind(AssertUnwindSafe(|| body(data)));
    assert!(held.is_ok(), "{name}: {}", data.escape_ascii());
}

/// The files of a corpus, in the order of their names.
pub fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|file| file.unwrap())
        .map(|file| (file.file_name().into_string().unwrap(), std::fs::read(file.path()).unwrap()))
        .collect();
    files.sort();
    files
}

pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// What parsers trip over.
const TOKENS: [&[u8]; 28] = [
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"\"\"",
    b"-0",
    b"0.0",
    b"1e400",
    b"1e1",
    b"9007199254740993",
    b"\\ud800",
    b"\\u0000",
    b"\xff",
    b"\xc0\xaf",
    b"\xe2\x80\xa8",
    b"\"content\":",
    b"\"hashes\":",
    b"\"signatures\":",
    b"\"hub_server\":",
    b"\"type\":",
    b"\"state_key\":",
    b"\"event_id\":",
    b"\"unsigned\":",
    b"[[[[[[[[[[",
    b"{\"a\":",
    b",",
    b"\"",
    b"\\",
];

/// A few changes of `data`, as fuzzers make them.
pub fn mutated(data: &[u8], other: &[u8], random: &mut StdRng) -> Vec<u8> {
    let mut bytes = data.to_vec();
    for _ in 0..random.gen_range(1..5) {
        let at = random.gen_range(0..=bytes.len());
        let to = random.gen_range(at..=bytes.len().min(at + 30));
        match random.gen_range(0..8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.gen_range(0..8),
            1 if at < bytes.len() => bytes[at] = random.r#gen(),
            2 => drop(bytes.drain(at..to)),
            3 => {
                let piece = bytes[at..to].to_vec();
                let place = random.gen_range(0..=bytes.len());
                bytes.splice(place..place, piece);
            }
            4 | 5 => {
                let token = TOKENS[random.gen_range(0..TOKENS.len())];
                bytes.splice(at..at, token.iter().copied());
            }
            6 => {
                let token = TOKENS[random.gen_range(0..TOKENS.len())];
                bytes.splice(at..to, token.iter().copied());
            }
            _ => {
                let from = random.gen_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
        bytes.truncate(MOST);
    }
    bytes
}
