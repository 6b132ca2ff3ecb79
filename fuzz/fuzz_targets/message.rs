//! Fuzzes requests of the kernel, and the status that they lead to.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ioregion_fuzz::message(data));
