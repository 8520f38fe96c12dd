//! Every form of the engine against the definition.

use super::naive::{quadratic, recurrence};
use super::*;
use attn_testkit::compare::{Tol, assert_close};

const TOL: Tol = Tol::ScaledMax(6e-6);

/// Numbers between -1 and 1, different for every seed.
pub(super) fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_769).wrapping_add(12345);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / (u32::MAX / 2) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// How strongly things fade.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Strength {
    Slow,
    Mixed,
    Strong,
}

/// A whole sequence: unit keys with a step of up to 2 for erases, decays of the given strength.
fn sequence(o: &Options, len: usize, strength: Strength, seed: u32) -> Chunk {
    let mut x = Chunk::new(o, len);
    x.q = numbers(x.q.len(), seed);
    x.k = numbers(x.k.len(), seed + 1);
    x.v = numbers(x.v.len(), seed + 2);
    x.b = numbers(x.b.len(), seed + 3);
    x.bonus = numbers(x.bonus.len(), seed + 4);
    for row in x.k.chunks_exact_mut(o.key_dim).chain(x.b.chunks_exact_mut(o.key_dim)) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-3);
        row.iter_mut().for_each(|x| *x /= norm);
    }
    let steps = numbers(len * o.writes, seed + 5);
    let erased = x.k.chunks_exact(o.key_dim).zip(x.a.chunks_exact_mut(o.key_dim)).zip(&steps);
    // beta in (0, 2); untied, `a` is its own direction of norm at most 1.
    erased.for_each(|((k, a), step)| a.iter_mut().zip(k).for_each(|(a, k)| *a = -(1.0 + step) * k));
    if o.erase == Erase::Untied {
        x.a.iter_mut().zip(numbers(len * o.writes * o.key_dim, seed + 6)).for_each(|(a, r)| *a *= 0.5 * r);
    }
    if o.erase == Erase::Tied && seed % 2 == 1 {
        x.strength = numbers(x.v.len(), seed + 8).iter().map(|s| s.abs()).collect();
    }
    let decays = numbers(x.log_decay.len(), seed + 7);
    x.log_decay.iter_mut().zip(decays).enumerate().for_each(|(at, (g, r))| {
        *g = match (strength, at % 7) {
            (Strength::Slow, _) => 0.05 * (r - 1.0),
            (Strength::Strong, _) => -20.0,
            (Strength::Mixed, 0) => -20.0,
            (Strength::Mixed, 1) => 0.0,
            (Strength::Mixed, 2) if at > 40 => f32::NEG_INFINITY,
            (Strength::Mixed, _) => 3.0 * (r - 1.0),
        }
    });
    x
}

fn all_options() -> Vec<Options> {
    let mut all = Vec::new();
    for decay in [Decay::None, Decay::Scalar, Decay::Key, Decay::Value] {
        for erase in [Erase::None, Erase::Tied, Erase::Untied] {
            for erase_at in [EraseAt::Before, EraseAt::After] {
                for (read, writes) in [(Read::Post, 1), (Read::Pre, 1), (Read::Post, 3)] {
                    for norm in [false, true] {
                        let o = Options {
                            norm,
                            decay,
                            erase,
                            erase_at,
                            read,
                            writes,
                            scale: 0.7,
                            ..Options::new("test", 5, 9)
                        };
                        let repeated = erase == Erase::None && erase_at == EraseAt::Before;
                        if o.check().is_ok() && !repeated {
                            all.push(o);
                        }
                    }
                }
            }
        }
    }
    all
}

/// Runs `x` in pieces of `chunk_len` tokens; gives outputs, with their norms behind them, and the final state.
fn run(isa: Isa, o: &Options, x: &Chunk, initial: &[f32], chunk_len: usize) -> (Vec<f32>, Vec<f32>) {
    let mut engine = Engine::new(o, chunk_len);
    let (mut out, mut norms, mut state) = (Vec::new(), Vec::new(), initial.to_vec());
    for first in (0..x.len).step_by(chunk_len) {
        let piece = x.slice(o, first..(first + chunk_len).min(x.len));
        let reads = engine.run(isa, piece.piece(o), &mut state);
        out.extend(reads.rows.iter().map(|read| o.scale * read));
        norms.extend(reads.norms.iter().map(|norm| o.scale * norm));
    }
    out.extend(norms);
    (out, state)
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

#[test]
fn every_form_gives_the_definition_for_every_option_length_and_chunk() {
    for o in all_options() {
        for strength in [Strength::Slow, Strength::Mixed, Strength::Strong] {
            for (seed, len) in [1, 2, 3, 17, 40].into_iter().enumerate() {
                let x = sequence(&o, len, strength, seed as u32);
                let initial = numbers(o.state_len(), 99);
                let want = recurrence(&o, &x, &widen(&initial));
                let again = quadratic(&o, &x, &widen(&initial));
                assert_close(
                    &format!("quadratic {o:?} {strength:?} {len}"),
                    &again.iter().map(|x| *x as f32).collect::<Vec<_>>(),
                    &want.out,
                    TOL,
                );
                for chunk_len in [1, 3, 5, 16, 17, 64] {
                    let (out, state) = run(Isa::current(), &o, &x, &initial, chunk_len);
                    let what = format!("{o:?} {strength:?} len {len} chunk {chunk_len}");
                    assert_close(&format!("out, {what}"), &out, &[&want.out[..], &want.norms].concat(), TOL);
                    assert_close(&format!("state, {what}"), &state, &want.state, TOL);
                }
            }
        }
    }
}

#[test]
fn every_isa_gives_the_definition_in_every_width() {
    for isa in Isa::available() {
        for (key_dim, value_dim) in [(1, 1), (3, 2), (16, 16), (8, 70), (33, 40), (64, 64)] {
            for o in all_options() {
                let o = Options { key_dim, value_dim, ..o };
                let x = sequence(&o, 21, Strength::Mixed, 7);
                // Of terms of order one: a single number may be what is left of their cancellation.
                let tol = Tol::AllClose { atol: 6e-6, rtol: 6e-6 };
                let initial = vec![0.0; o.state_len()];
                let want = recurrence(&o, &x, &widen(&initial));
                for chunk_len in [2, 16] {
                    let (out, state) = run(isa, &o, &x, &initial, chunk_len);
                    let what = format!("{isa} {o:?} chunk {chunk_len}");
                    assert_close(&format!("out, {what}"), &out, &[&want.out[..], &want.norms].concat(), tol);
                    assert_close(&format!("state, {what}"), &state, &want.state, tol);
                }
            }
        }
    }
}

#[test]
fn later_tokens_change_no_bit_of_earlier_outputs() {
    for o in all_options() {
        let x = sequence(&o, 32, Strength::Mixed, 3);
        let mut changed = sequence(&o, 32, Strength::Strong, 4);
        for (to, from) in [
            (&mut changed.q, &x.q),
            (&mut changed.k, &x.k),
            (&mut changed.v, &x.v),
            (&mut changed.log_decay, &x.log_decay),
            (&mut changed.a, &x.a),
            (&mut changed.b, &x.b),
        ] {
            let kept = to.len() / 32 * 13;
            to[..kept].copy_from_slice(&from[..kept]);
            to[kept..].iter_mut().step_by(3).for_each(|x| *x = f32::NAN);
        }
        changed.bonus.clone_from(&x.bonus);
        changed.strength.clone_from(&x.strength);
        let initial = numbers(o.state_len(), 5);
        for chunk_len in [16, 32] {
            let (before, _) = run(Isa::current(), &o, &x, &initial, chunk_len);
            let (after, _) = run(Isa::current(), &o, &changed, &initial, chunk_len);
            let bits = |x: &[f32]| x[..13 * o.value_dim].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&before), bits(&after), "{o:?} chunk {chunk_len}");
        }
    }
}

#[test]
fn a_slow_decay_is_not_rounded_away() {
    // A state that remembers a million tokens: gamma = 1 - 2^-20 is one of 17 f32 below 1.
    let log_decay = (-(-20f64).exp2()).ln_1p() as f32;
    let (n, ones) = (20_000, |len| vec![1.0; len]);
    for decay in [Decay::Scalar, Decay::Key, Decay::Value] {
        let o = Options { decay, ..Options::new("slow", 1, 1) };
        let x = Chunk {
            len: n,
            q: ones(n),
            k: ones(n),
            v: ones(n),
            log_decay: vec![log_decay; n],
            ..Chunk::default()
        };
        let want = (n as f64 * f64::from(log_decay)).exp_m1() / f64::from(log_decay).exp_m1();
        for chunk_len in [1, 16, 64] {
            let got = f64::from(run(Isa::current(), &o, &x, &[0.0], chunk_len).0[n - 1]);
            assert!((got - want).abs() < 2e-5 * want, "{decay:?} chunk {chunk_len}: {got} {want}");
        }
    }
}

/// The weighted sum of outputs, norms and final state that gradients are taken of, in f64.
fn loss(o: &Options, x: &Chunk, initial: &[f64], by_out: &[f64], by_state: &[f64]) -> f64 {
    let got = recurrence(o, x, initial);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&got.out, by_out) + dot(&got.norms, by_out) + dot(&got.state, by_state)
}

/// Gradients of a whole sequence, chunk by chunk backwards; and that of the initial state.
fn gradients(
    o: &Options,
    x: &Chunk,
    initial: &[f32],
    by_out: &[f64],
    by_state: &[f64],
    len: usize,
) -> (Chunk, Vec<f32>) {
    let mut engine = Engine::new(o, len);
    let (mut states, mut state) = (Vec::new(), initial.to_vec());
    let pieces: Vec<_> = (0..x.len).step_by(len).map(|first| first..(first + len).min(x.len)).collect();
    for piece in &pieces {
        states.push(state.clone());
        engine.run(Isa::current(), x.slice(o, piece.clone()).piece(o), &mut state);
    }
    let mut all = Chunk { bonus: vec![0.0; x.bonus.len()], ..Chunk::default() };
    let mut d_state: Vec<f32> = by_state.iter().map(|x| *x as f32).collect();
    for (piece, state) in pieces.iter().zip(&states).rev() {
        let d_reads: Vec<f32> = by_out[piece.start * o.value_dim..piece.end * o.value_dim]
            .iter()
            .map(|d| o.scale * *d as f32)
            .collect();
        // The norms' weights are the first of the outputs'.
        let norms = if o.norm { piece.clone() } else { 0..0 };
        let d_norms: Vec<f32> = by_out[norms].iter().map(|d| o.scale * *d as f32).collect();
        let mut grads = Chunk::default();
        engine.backward(
            Isa::current(),
            x.slice(o, piece.clone()).piece(o),
            state,
            [&d_reads, &d_norms],
            &mut d_state,
            &mut grads,
        );
        for (all, part) in [
            (&mut all.q, grads.q),
            (&mut all.k, grads.k),
            (&mut all.v, grads.v),
            (&mut all.log_decay, grads.log_decay),
            (&mut all.a, grads.a),
            (&mut all.b, grads.b),
            (&mut all.strength, grads.strength),
        ] {
            *all = [part, std::mem::take(all)].concat();
        }
        all.bonus.iter_mut().zip(&grads.bonus).for_each(|(all, d)| *all += d);
    }
    (all, d_state)
}

#[test]
fn gradients_are_those_of_the_definition() {
    for o in all_options() {
        for (seed, strength) in [(0, Strength::Slow), (1, Strength::Mixed), (3, Strength::Strong)] {
            let o = Options { key_dim: 3, value_dim: 4, ..o };
            let x = sequence(&o, 7, strength, seed);
            let initial = numbers(o.state_len(), 21);
            let (by_out, by_state) = (widen(&numbers(7 * 4, 22)), widen(&numbers(o.state_len(), 23)));
            for chunk_len in [1, 3, 16] {
                let (got, d_initial) = gradients(&o, &x, &initial, &by_out, &by_state, chunk_len);
                let value = |x: &Chunk, initial: &[f64]| loss(&o, x, initial, &by_out, &by_state);
                let field: [fn(&mut Chunk) -> &mut Vec<f32>; 8] = [
                    |x| &mut x.q,
                    |x| &mut x.k,
                    |x| &mut x.v,
                    |x| &mut x.log_decay,
                    |x| &mut x.a,
                    |x| &mut x.b,
                    |x| &mut x.strength,
                    |x| &mut x.bonus,
                ];
                for (f, field) in field.into_iter().enumerate() {
                    let (mut got, mut moved) = (got.clone(), x.clone());
                    let want: Vec<f64> = (0..field(&mut moved).len())
                        .map(|at| {
                            let here = field(&mut moved)[at];
                            // Exact in f32, so that both sides move by the same.
                            let mut side = |step: f32| {
                                field(&mut moved)[at] = here + step;
                                let there = f64::from(field(&mut moved)[at]);
                                let value = value(&moved, &widen(&initial));
                                field(&mut moved)[at] = here;
                                (value, there)
                            };
                            let ((up, right), (down, left)) = (side(1.0 / 256.0), side(-1.0 / 256.0));
                            if here.is_finite() { (up - down) / (right - left) } else { 0.0 }
                        })
                        .collect();
                    let what = format!("field {f}, {o:?} {strength:?} chunk {chunk_len}");
                    assert_close(&what, field(&mut got), &want, Tol::ScaledMax(1e-4));
                }
                let want: Vec<f64> = (0..initial.len())
                    .map(|at| {
                        let mut moved = widen(&initial);
                        moved[at] += 1.0;
                        value(&x, &moved) - value(&x, &widen(&initial))
                    })
                    .collect();
                assert_close(&format!("state, {o:?} {strength:?}"), &d_initial, &want, Tol::ScaledMax(1e-5));
            }
        }
    }
}

#[test]
fn gradients_of_long_chunks_are_those_of_short_ones() {
    for o in all_options() {
        for strength in [Strength::Slow, Strength::Mixed] {
            let o = Options { key_dim: 17, value_dim: 20, ..o };
            let x = sequence(&o, 45, strength, 2);
            let initial = numbers(o.state_len(), 21);
            let (by_out, by_state) = (widen(&numbers(45 * 20, 22)), widen(&numbers(o.state_len(), 23)));
            let (want, want_initial) = gradients(&o, &x, &initial, &by_out, &by_state, 3);
            for chunk_len in [16, 33, 64] {
                let (got, d_initial) = gradients(&o, &x, &initial, &by_out, &by_state, chunk_len);
                for (field, got, want) in [
                    ("q", &got.q, &want.q),
                    ("k", &got.k, &want.k),
                    ("v", &got.v, &want.v),
                    ("log_decay", &got.log_decay, &want.log_decay),
                    ("a", &got.a, &want.a),
                    ("b", &got.b, &want.b),
                    ("strength", &got.strength, &want.strength),
                    ("bonus", &got.bonus, &want.bonus),
                    ("state", &d_initial, &want_initial),
                ] {
                    let what = format!("{field}, {o:?} {strength:?} chunk {chunk_len}");
                    assert_close(&what, got, &widen(want), Tol::ScaledMax(2e-5));
                }
            }
        }
    }
}
