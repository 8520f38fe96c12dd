//! Promises about influence: which inputs may change which outputs, and how far.

use super::subject::{Outcome, Subject, agree, all, at, same_bits, widen};
use crate::inputs::Problem;
use crate::tolerance;
use attn_core::{AttnShape, Causality, DType, Target};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Changing q, k and v from some position on changes no earlier output, not by one bit.
pub(super) fn strict_causality(v: &Subject<'_>) -> Outcome {
    later_inputs(v, true)
}

/// Changing v from some position on changes no earlier output, not by one bit.
pub(super) fn masked_causality(v: &Subject<'_>) -> Outcome {
    later_inputs(v, false)
}

fn later_inputs(v: &Subject<'_>, queries_and_keys: bool) -> Outcome {
    let shape = AttnShape::square(2, 130, 16);
    let (problem, other) = (Problem::normal(shape, 1), Problem::normal(shape, 2).scale_values(1e3));
    let before = v.forward(&problem)?;
    for t in [1, 2, 16, 31, 63, 64, 65, 127, 128, 129] {
        let mut changed = problem.clone();
        let tensors = [(&mut changed.v, &other.v), (&mut changed.q, &other.q), (&mut changed.k, &other.k)];
        for (to, from) in tensors.into_iter().take(if queries_and_keys { 3 } else { 1 }) {
            let heads = to.chunks_exact_mut(130 * 16).zip(from.chunks_exact(130 * 16));
            heads.for_each(|(to, from)| to[t * 16..].copy_from_slice(&from[t * 16..]));
        }
        let what = format!("out before position {t}, after a change from there on");
        same_bits(&what, &shape, &v.forward(&changed)?, &before, |_, _, i| i < t)?;
    }
    Ok(())
}

/// `causal=true` gives a variant that promises causality.
pub(super) fn causal_option(v: &Subject<'_>) -> Outcome {
    match v.profile.causality {
        Causality::Strict | Causality::Masked => Ok(()),
        other => Err(format!("with causal=true the profile says {other:?}, expected Strict or Masked")),
    }
}

/// Each output coordinate lies between the smallest and the largest value of the keys seen.
pub(super) fn convexity(v: &Subject<'_>) -> Outcome {
    // Values around 3: weights that do not sum to one leave the interval at once.
    let shape = AttnShape { head_dim_v: 8, ..AttnShape::square(2, 130, 16) };
    for seed in 0..2 {
        let problem = Problem::normal(shape, seed).shift_values(3.0);
        let (out, truth) = (v.forward(&problem)?, v.definition(&problem)?.out);
        let largest = problem.v.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let slack = 2.0 * v.profile.max_error as f32 * largest;
        for (row, (out, truth)) in out.chunks_exact(8).zip(truth.chunks_exact(8)).enumerate() {
            if truth.iter().all(|t| *t == 0.0) {
                continue; // sees nothing
            }
            let (head, i) = (row / 130, row % 130);
            let end = if v.profile.causality.is_causal() { i + 1 } else { 130 };
            let seen = &problem.v[head * 130 * 8..][..end * 8];
            for (c, got) in out.iter().enumerate() {
                let column = || seen.iter().skip(c).step_by(8);
                let (min, max) = column().fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
                if !(min - slack <= *got && *got <= max + slack) {
                    let place = [0, head, i, c];
                    let span = format!("outside the values it may see, {min:e} to {max:e}");
                    return Err(format!("out{place:?} is {got:e}, {span}; {}", at(&shape)));
                }
            }
        }
    }
    Ok(())
}

/// Permuting keys together with their values changes nothing but rounding.
pub(super) fn key_order(v: &Subject<'_>) -> Outcome {
    let mut shapes = vec![AttnShape::square(2, 65, 16), AttnShape::square(2, 130, 8)];
    if v.profile.cross_lengths {
        shapes.push(AttnShape { n_kv: 130, ..AttnShape::square(2, 17, 8) });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for shape in shapes {
        let problem = Problem::normal(shape, 4);
        let mut order: Vec<usize> = (0..shape.n_kv).collect();
        order.shuffle(&mut rng);
        let mut shuffled = problem.clone();
        for (to, from) in [(&mut shuffled.k, &problem.k), (&mut shuffled.v, &problem.v)] {
            let (rows, width) = (shape.n_kv, shape.head_dim);
            let heads = to.chunks_exact_mut(rows * width).zip(from.chunks_exact(rows * width));
            for (to, from) in heads {
                let rows = to.chunks_exact_mut(width).zip(&order);
                rows.for_each(|(to, &j)| to.copy_from_slice(&from[j * width..][..width]));
            }
        }
        let want = widen(&v.forward(&problem)?);
        let tol = tolerance::same(&v.profile);
        agree("out with shuffled keys", &shape, &v.forward(&shuffled)?, &want, tol)?;
    }
    Ok(())
}

/// A batch entry does not influence another one, and entries can be exchanged.
pub(super) fn batch_independence(v: &Subject<'_>) -> Outcome {
    let shape = AttnShape { batch: 3, ..AttnShape::square(2, 65, 16) };
    let problem = Problem::normal(shape, 6);
    let before = v.forward(&problem)?;
    let other = Problem::normal(shape, 7).scale_values(1e3);
    let mut changed = problem.clone();
    let entry = 2 * 65 * 16;
    for (to, from) in [(&mut changed.q, &other.q), (&mut changed.k, &other.k), (&mut changed.v, &other.v)] {
        to[entry..2 * entry].copy_from_slice(&from[entry..2 * entry]);
    }
    let after = v.forward(&changed)?;
    same_bits(
        "out of batch entries 0 and 2, after a change of entry 1",
        &shape,
        &after,
        &before,
        |b, _, _| b != 1,
    )?;

    let mut turned = problem;
    [&mut turned.q, &mut turned.k, &mut turned.v].into_iter().for_each(|x| x.rotate_left(entry));
    let mut want = widen(&before);
    want.rotate_left(entry);
    let tol = tolerance::same(&v.profile);
    agree("out with batch entries exchanged", &shape, &v.forward(&turned)?, &want, tol)
}

/// A key/value head reaches the query heads of its group alone: those are consecutive.
pub(super) fn head_independence(v: &Subject<'_>) -> Outcome {
    let heads = if v.profile.grouped_heads { (6, 3) } else { (3, 3) };
    let shape = AttnShape { n_heads_kv: heads.1, ..AttnShape::square(heads.0, 65, 16) };
    let problem = Problem::normal(shape, 8);
    let before = v.forward(&problem)?;
    let other = Problem::normal(shape, 9).scale_values(1e3);
    for kv_head in 0..3 {
        let mut changed = problem.clone();
        let group = shape.group_size();
        for (to, from, heads) in [
            (&mut changed.q, &other.q, kv_head * group..(kv_head + 1) * group),
            (&mut changed.k, &other.k, kv_head..kv_head + 1),
            (&mut changed.v, &other.v, kv_head..kv_head + 1),
        ] {
            let range = heads.start * 65 * 16..heads.end * 65 * 16;
            to[range.clone()].copy_from_slice(&from[range]);
        }
        let after = v.forward(&changed)?;
        let what = format!("out of other heads, after a change of key/value head {kv_head} and its queries");
        same_bits(&what, &shape, &after, &before, |_, h, _| h / group != kv_head)?;
        if same_bits("", &shape, &after, &before, |_, h, _| h / group == kv_head).is_ok() {
            return Err(format!("key/value head {kv_head} and its queries change nothing; {}", at(&shape)));
        }
    }
    if v.profile.target != Target::Softmax {
        return Ok(()); // other variants may have parameters that differ by head
    }
    let (q_step, kv_step) = (shape.group_size() * 65 * 16, 65 * 16);
    let mut turned = problem;
    turned.q.rotate_left(q_step);
    [&mut turned.k, &mut turned.v].into_iter().for_each(|x| x.rotate_left(kv_step));
    let mut want = widen(&before);
    want.rotate_left(q_step);
    let tol = tolerance::same(&v.profile);
    agree("out with groups of heads exchanged", &shape, &v.forward(&turned)?, &want, tol)
}

/// A NaN reaches the rows that see it: a query its own, a key or value no earlier row of a causal variant.
pub(super) fn nan_rows(v: &Subject<'_>) -> Outcome {
    let shape = AttnShape::square(2, 70, 16);
    let problem = Problem::normal(shape, 10);
    let clean = v.forward(&problem)?;

    let mut query = problem.clone();
    query.q_row(0, 1, 20).fill(f32::NAN);
    let got = v.forward(&query)?;
    let others = |_: usize, h: usize, i: usize| (h, i) != (1, 20);
    same_bits("rows beside the one whose query is NaN", &shape, &got, &clean, others)?;
    let row = (70 + 20) * 16;
    let truth = v.definition(&query)?.out;
    if truth[row..row + 16].iter().all(|x| x.is_nan()) && !got[row..row + 16].iter().all(|x| x.is_nan()) {
        return Err(format!("the row whose query is NaN is {:e}, not NaN; {}", got[row], at(&shape)));
    }

    for (what, is_key) in [("key", true), ("value", false)] {
        let mut late = problem.clone();
        if is_key { late.k_row(0, 0, 40) } else { late.v_row(0, 0, 40) }.fill(f32::NAN);
        let got = v.forward(&late)?;
        same_bits(&format!("head 1, with a NaN {what} in head 0"), &shape, &got, &clean, |_, h, _| h == 1)?;
        if v.profile.causality == Causality::Strict {
            let earlier = |_: usize, h: usize, i: usize| h == 1 || i < 40;
            same_bits(
                &format!("rows before position 40, whose {what} is NaN"),
                &shape,
                &got,
                &clean,
                earlier,
            )?;
        }
        if v.profile.target == Target::Softmax {
            let tol = tolerance::output(&v.profile, DType::F32);
            let what = format!("out with a NaN {what} at position 40 of head 0");
            agree(&what, &shape, &got, &v.definition(&late)?.out, tol)?;
        }
    }
    same_bits("out once the NaN is gone", &shape, &v.forward(&problem)?, &clean, all)
}
