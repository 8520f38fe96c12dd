//! One attention call made from arbitrary bytes, through the public interface alone, and everything it must keep:
//!
//! - it never panics;
//! - if it is refused, no element of `out` or `lse` has changed;
//! - else every row was written and nothing between rows, on every instruction set the CPU has;
//! - numbers are those of the definition in f64, where the inputs are such that f32 can give them; infinities and NaN
//!   stand exactly where the definition has them;
//! - 1 and 2 threads give the same bits, with and without `lse`;
//! - of its backward pass: it never panics, writes everything or, if it is refused, nothing, with the same bits by 1 and 2
//!   threads.

mod bytes;
mod call;
mod gradients;
mod judge;
mod masks;
mod numbers;
mod score_mods;
mod sequences;
mod tensor;

use attn_core::mask::{And, Mask};
use attn_core::score::{ScoreMod, Then};
use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnError, Result};
use attn_flash::FlashCall;
use bytes::Bytes;
use call::{Call, Parts};
use gradients::Gradients;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::LazyLock;
use tensor::Tensor;

/// What became of a call.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Refused, with this error.
    Refused(AttnError),
    /// Ran, with numbers that f32 cannot hold apart: only what holds for any numbers was checked.
    Ran,
    /// Ran and agreed with the definition.
    Agreed,
}

/// The call that `bytes` make, in words; without the numbers of the tensors.
pub fn describe(bytes: &[u8]) -> String {
    format!("{:#?}", Call::draw(&mut Bytes::new(bytes)))
}

/// Makes a call from `bytes` and checks it.
///
/// # Panics
/// If something does not hold.
pub fn check(bytes: &[u8]) -> Outcome {
    let call = Call::draw(&mut Bytes::new(bytes));
    match call.build() {
        Ok(parts) => Attempt { call: &call, parts: &parts }.check(),
        Err(error) => Outcome::Refused(error),
    }
}

static POOLS: LazyLock<[ThreadPool; 2]> = LazyLock::new(|| {
    [1, 2].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads"))
});

/// A call with its parts.
struct Attempt<'a> {
    call: &'a Call,
    parts: &'a Parts<'a>,
}

/// What a run wrote.
struct Written {
    out: Tensor,
    lse: Option<Vec<f32>>,
}

impl Written {
    fn bits(&self) -> Vec<u32> {
        self.out.bits()
    }

    fn lse_bits(&self) -> Option<Vec<u32>> {
        self.lse.as_ref().map(|lse| lse.iter().map(|x| x.to_bits()).collect())
    }
}

impl Attempt<'_> {
    fn check(&self) -> Outcome {
        let (result, first) = self.run(&POOLS[0], true);
        if let Err(error) = result {
            assert_eq!(first.bits(), self.call.out.bits(), "out has changed, but: {error}");
            let lse = Written { out: self.call.out.clone(), lse: self.call.lse.clone() }.lse_bits();
            assert_eq!(first.lse_bits(), lse, "lse has changed, but: {error}");
            return Outcome::Refused(error);
        }
        let (again, second) = self.run(&POOLS[1], true);
        assert_eq!(again, Ok(()));
        assert_eq!(first.bits(), second.bits(), "out by 1 and by 2 threads");
        assert_eq!(first.lse_bits(), second.lse_bits(), "lse by 1 and by 2 threads");
        let (without, third) = self.run(&POOLS[0], false);
        assert_eq!(without, Ok(()));
        assert_eq!(first.bits(), third.bits(), "out with and without lse");

        let truth = judge::Truth::of(self.call, self.parts);
        for isa in Isa::available() {
            let (result, written) = with_isa(isa, || self.run(&POOLS[0], true)).expect("an available one");
            assert_eq!(result, Ok(()), "{isa}");
            assert!(
                written.out.written_exactly(),
                "{isa}: a row is not written, or something between rows is"
            );
            if let Some(lse) = written.lse_bits() {
                assert!(!lse.contains(&tensor::LSE_CANARY.to_bits()), "{isa}: a log-sum-exp is not written");
            }
            truth.judge(isa, self.call, &written.out, written.lse.as_deref());
        }
        if let Some(lse) = &first.lse {
            self.check_backward(&first.out, lse);
        }
        if truth.is_fair() { Outcome::Agreed } else { Outcome::Ran }
    }

    /// After a forward pass that gave `out` and `lse`.
    fn check_backward(&self, out: &Tensor, lse: &[f32]) {
        let untouched = self.call.gradients.bits();
        let run = |pool: &ThreadPool| {
            let mut gradients = self.call.gradients.clone();
            let isa = Isa::current();
            let run = || with_isa(isa, || self.backward(out, lse, &mut gradients)).and_then(|result| result);
            (pool.install(run), gradients)
        };
        let (result, first) = run(&POOLS[0]);
        if let Err(error) = result {
            assert_eq!(first.bits(), untouched, "a gradient has changed, but: {error}");
            return;
        }
        let (again, second) = run(&POOLS[1]);
        assert_eq!(again, Ok(()));
        assert_eq!(first.bits(), second.bits(), "gradients by 1 and by 2 threads");
        for isa in Isa::available() {
            let (result, gradients) = with_isa(isa, || run(&POOLS[0])).expect("an available one");
            assert_eq!(result, Ok(()), "{isa}");
            assert!(
                gradients.written_exactly(),
                "{isa}: a gradient is not written, or something between rows is"
            );
        }
    }

    fn backward(&self, out: &Tensor, lse: &[f32], gradients: &mut Gradients) -> Result<()> {
        let parts = self.parts;
        let [a, b] = parts.masks.each_ref().map(|mask| mask.as_deref());
        let [c, d] = parts.score_mods.each_ref().map(|score_mod| score_mod.as_deref());
        let flash = self.with_numbers(parts.flash.call().mask(And(a, b)).score_mod(Then(c, d)));
        let problem = self.call.sequences.problem()?;
        gradients.collect(out, lse, |forward, grad, grads| flash.backward(problem, forward, grad, grads))
    }

    /// Runs the call into fresh buffers.
    fn run(&self, pool: &ThreadPool, with_lse: bool) -> (Result<()>, Written) {
        let mut written =
            Written { out: self.call.out.clone(), lse: self.call.lse.clone().filter(|_| with_lse) };
        let isa = Isa::current();
        let run = || with_isa(isa, || self.forward(&mut written)).and_then(|result| result);
        (pool.install(run), written)
    }

    fn forward(&self, written: &mut Written) -> Result<()> {
        let (call, parts) = (self.call, self.parts);
        let [a, b] = parts.masks.each_ref().map(|mask| mask.as_deref());
        let [c, d] = parts.score_mods.each_ref().map(|score_mod| score_mod.as_deref());
        let mask = And(a, b);
        let score_mod = Then(c, d);
        // As a caller without score mods would: the kernel then knows that scores stay as they are.
        match (c.is_some(), a.is_some()) {
            (false, false) => self.configured(parts.flash.call(), written),
            (false, true) => self.configured(parts.flash.call().mask(mask), written),
            _ => self.configured(parts.flash.call().mask(mask).score_mod(score_mod), written),
        }
        .inspect_err(|error| {
            assert!(!error.to_string().is_empty(), "an error that says nothing, in {call:?}")
        })
    }

    fn configured<'a, M: Mask, C: ScoreMod>(
        &'a self,
        flash: FlashCall<'a, M, C>,
        written: &mut Written,
    ) -> Result<()> {
        let (out, lse) = (written.out.view_mut("out")?, written.lse.as_deref_mut());
        self.with_numbers(flash).forward(self.call.sequences.problem()?, out, lse)
    }

    /// Everything that is added to the call besides masks and score mods.
    fn with_numbers<'a, M: Mask, C: ScoreMod>(
        &'a self,
        mut flash: FlashCall<'a, M, C>,
    ) -> FlashCall<'a, M, C> {
        let (call, parts) = (self.call, self.parts);
        if let Some(bias) = &call.key_bias {
            flash = flash.key_bias(bias);
        }
        if let Some(sinks) = &call.sinks {
            flash = flash.sinks(sinks);
        }
        if let Some(dropout) = parts.dropout {
            flash = flash.dropout(dropout);
        }
        if let Some(norm) = parts.qk_norm {
            flash = flash.qk_norm(norm);
        }
        flash
    }
}
