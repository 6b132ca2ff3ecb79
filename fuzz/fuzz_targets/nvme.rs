//! Fuzzes an NVMe controller.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ioregion_fuzz::nvme(data));
