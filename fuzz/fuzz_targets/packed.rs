//! Fuzzes packed rings.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ioregion_fuzz::packed(data));
