//! What random features promise on average, and what exact ones promise always.

use attn_linear::features::{Based, FeatureVariant, Map, Performer, Place, ReBased, Side};

fn features(map: &Map, x: &[f64]) -> Vec<f64> {
    map.define(Place { side: Side::Key, head: 0, first: 0, len: 1, shift: &[] }, x)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

const Q: [f64; 6] = [0.4, -0.9, 0.3, 0.7, -0.2, 0.5];
const K: [f64; 6] = [0.8, 0.1, -0.6, 0.9, 0.4, -0.3];

#[test]
fn favor_estimates_the_softmax_kernel_without_bias() {
    let want = (dot(&Q, &K) / 6f64.sqrt()).exp();
    let estimates: Vec<f64> = (0..1500)
        .map(|seed| {
            let performer =
                Performer { features: Some(24), feature_eps: Some(0.0), seed, ..Performer::default() };
            let map = performer.spec(1, 6, 0).unwrap().keys;
            dot(&features(&map, &Q), &features(&map, &K))
        })
        .collect();
    let n = estimates.len() as f64;
    let mean = estimates.iter().sum::<f64>() / n;
    let deviation = (estimates.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    let error = (mean - want).abs();
    assert!(error < 5.0 * deviation / n.sqrt(), "{mean} for {want}, deviation {deviation}");
    assert!(deviation < want, "estimates of {want} with a deviation of {deviation} say nothing");
}

#[test]
fn polynomial_features_give_their_polynomial() {
    let s = dot(&Q, &K) / 6f64.sqrt();
    let map = Based::default().spec(1, 6, 0).unwrap().keys;
    let (got, want) = (dot(&features(&map, &Q), &features(&map, &K)), 1.0 + s + s * s / 2.0);
    assert!((got - want).abs() < 1e-12, "{got} {want}");
    assert_eq!(features(&map, &Q).len(), map.width(6));

    let normal = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / 6.0;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 6.0;
        x.iter().map(|x| (x - mean) / (variance + 1e-5).sqrt()).collect()
    };
    let map = ReBased::default().spec(1, 6, 0).unwrap().keys;
    let s = dot(&normal(&Q), &normal(&K)) / 6f64.sqrt();
    let got = dot(&features(&map, &Q), &features(&map, &K));
    assert!((got - s * s).abs() < 1e-9, "{got} {}", s * s);
}
