//! Fuzzes split rings.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ioregion_fuzz::split(data));
