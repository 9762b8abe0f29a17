#![no_main]
//! See `isthmus_fuzz::x_matrix`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| isthmus_fuzz::x_matrix(data));
