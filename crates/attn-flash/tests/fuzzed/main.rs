//! The fuzz target's calls, made from random bytes by proptest: a bounded version that runs everywhere.

#[allow(unreachable_pub)] // `fuzz/` compiles the module too
mod attention;

use attention::{Outcome, check, describe};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

#[test]
fn arbitrary_calls_are_refused_cleanly_or_right() {
    let config = Config { cases: 3000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let counts = std::cell::Cell::new([0; 3]);
    let bytes = proptest::collection::vec(any::<u8>(), 0..400);
    let result = runner.run(&bytes, |bytes| {
        let mut now = counts.get();
        now[match check(&bytes) {
            Outcome::Refused(_) => 0,
            Outcome::Ran => 1,
            Outcome::Agreed => 2,
        }] += 1;
        counts.set(now);
        Ok(())
    });
    match result {
        Ok(()) => {}
        Err(TestError::Fail(why, bytes)) => panic!("{why}\n{}\n{bytes:?}", describe(&bytes)),
        Err(error) => panic!("{error}"),
    }
    // Neither all refused nor all accepted, else the bytes say nothing.
    let [refused, ran, agreed] = counts.get();
    assert!(refused > 300 && ran > 30 && agreed > 600, "{refused} refused, {ran} ran, {agreed} agreed");
}
