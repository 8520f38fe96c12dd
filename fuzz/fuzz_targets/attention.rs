//! One attention call from arbitrary bytes; see the module for what it must keep.
#![no_main]

#[path = "../../crates/attn-flash/tests/fuzzed/attention/mod.rs"]
mod attention;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::{Corpus, fuzz_target};
use std::fmt;

/// All bytes, printed as the call that they make.
struct Call(Vec<u8>);

impl<'a> Arbitrary<'a> for Call {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let rest = bytes.len();
        Ok(Self(bytes.bytes(rest)?.to_vec()))
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&attention::describe(&self.0))
    }
}

fuzz_target!(|call: Call| -> Corpus {
    match attention::check(&call.0) {
        attention::Outcome::Refused(_) => Corpus::Reject,
        attention::Outcome::Ran | attention::Outcome::Agreed => Corpus::Keep,
    }
});
