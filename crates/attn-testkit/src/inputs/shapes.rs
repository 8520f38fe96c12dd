//! Shapes at the edges, as a list and as proptest strategies.

use super::Problem;
use attn_core::{AttnShape, Profile};
use proptest::prelude::*;
use proptest::sample::select;

/// Lengths that divide nothing, nothing at all, one row, and both sides of usual tile edges.
const LENGTHS: [usize; 12] = [0, 1, 2, 7, 17, 31, 63, 64, 65, 128, 129, 257];

/// Widths around vector lengths.
const WIDTHS: [usize; 7] = [1, 3, 5, 8, 16, 24, 33];

/// Small shapes of every kind that `profile` promises to accept: lengths around tile edges, odd widths, `head_dim_v`
/// other than `head_dim`, and, where promised, grouped heads and `n_q` other than `n_kv`. None is empty.
pub fn edge_shapes(profile: &Profile) -> Vec<AttnShape> {
    let square = AttnShape::square;
    let mut shapes: Vec<AttnShape> =
        [1, 2, 17, 63, 64, 65, 130, 257].into_iter().map(|n| square(2, n, 16)).collect();
    shapes.extend([
        AttnShape { batch: 2, head_dim_v: 7, ..square(3, 33, 5) },
        AttnShape { head_dim_v: 24, ..square(2, 65, 16) },
        AttnShape { head_dim_v: 8, ..square(1, 129, 33) },
        square(1, 9, 1),
        square(1, 70, 64),
    ]);
    if profile.grouped_heads {
        shapes.extend([
            AttnShape { batch: 2, n_heads_kv: 2, ..square(6, 40, 8) },
            AttnShape { n_heads_kv: 1, head_dim_v: 5, ..square(3, 65, 16) },
        ]);
    }
    if profile.cross_lengths {
        let cross = |n_q, n_kv| AttnShape { n_kv, ..square(2, n_q, 16) };
        shapes.extend([(5, 130), (130, 5), (1, 257), (64, 65), (66, 65)].map(|(n_q, n_kv)| cross(n_q, n_kv)));
    }
    if profile.cross_lengths && profile.grouped_heads {
        shapes.push(AttnShape { n_heads_kv: 2, n_kv: 200, head_dim_v: 12, ..square(4, 3, 16) });
    }
    shapes
}

/// Shapes of every kind: lengths 0, 1, around tile edges and dividing nothing, grouped heads, `n_q` other than `n_kv`,
/// `head_dim_v` other than `head_dim`; small enough that a property runs in seconds.
pub fn shapes() -> impl Strategy<Value = AttnShape> {
    let heads = (select(vec![1usize, 2, 3]), select(vec![1usize, 2, 4]));
    let lengths = prop_oneof![
        3 => select(LENGTHS.to_vec()).prop_map(|n| (n, n)),
        2 => (select(LENGTHS.to_vec()), select(LENGTHS.to_vec())),
        1 => (0..150usize).prop_map(|n| (n, n)),
    ];
    let widths = (select(WIDTHS.to_vec()), select(WIDTHS.to_vec()));
    (1..3usize, heads, lengths, widths).prop_map(
        |(batch, (n_heads_kv, group), (n_q, n_kv), (head_dim, head_dim_v))| AttnShape {
            batch,
            n_heads_q: n_heads_kv * group,
            n_heads_kv,
            n_q,
            n_kv,
            head_dim,
            head_dim_v,
        },
    )
}

/// Standard normal numbers in [`shapes`].
pub fn problems() -> impl Strategy<Value = Problem> {
    (shapes(), any::<u64>()).prop_map(|(shape, seed)| Problem::normal(shape, seed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    #[test]
    fn all_kinds_of_shapes_appear() {
        let mut runner = TestRunner::deterministic();
        let drawn: Vec<AttnShape> =
            (0..500).map(|_| shapes().new_tree(&mut runner).unwrap().current()).collect();
        for length in LENGTHS {
            assert!(drawn.iter().any(|s| s.n_q == length), "no n_q of {length}");
        }
        type Kind = (&'static str, fn(&AttnShape) -> bool);
        let kinds: [Kind; 5] = [
            ("grouped heads", |s| s.n_heads_q > s.n_heads_kv),
            ("longer keys", |s| s.n_kv > s.n_q),
            ("longer queries", |s| s.n_q > s.n_kv),
            ("other value width", |s| s.head_dim_v != s.head_dim),
            ("an empty key axis", |s| s.n_kv == 0 && s.n_q > 0),
        ];
        for (kind, is) in kinds {
            assert!(drawn.iter().any(is), "no shape with {kind}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn problems_are_valid(problem in problems()) {
            prop_assert_eq!(problem.qkv().unwrap().shape(), problem.shape);
        }
    }
}
