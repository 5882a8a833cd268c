#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| blockmount_fuzz_targets::bridge_server(bytes));
