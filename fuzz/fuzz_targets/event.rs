#![no_main]
//! See `isthmus_fuzz::event`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| isthmus_fuzz::event(data));
