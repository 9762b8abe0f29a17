#![no_main]
//! See `isthmus_fuzz::send`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| isthmus_fuzz::send(data));
