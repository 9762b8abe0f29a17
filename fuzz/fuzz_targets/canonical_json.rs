#![no_main]
//! See `isthmus_fuzz::canonical_json_of`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| isthmus_fuzz::canonical_json_of(data));
