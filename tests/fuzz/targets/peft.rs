#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lory_fuzz::peft(data));
