use std::time::Instant;

use super::*;

fn random(m: usize, n: usize, seed: u64) -> DMatrix<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    DMatrix::from_fn(m, n, |_, _| rng.sample(StandardNormal))
}

/// An m x n matrix with the singular values `s` and random singular vectors.
fn with_values(m: usize, n: usize, s: &[f64], seed: u64) -> DMatrix<f64> {
    let k = s.len();
    let (u, _) = householder(random(m, k, seed), k);
    let (v, _) = householder(random(n, k, seed + 1), k);
    u * DMatrix::from_diagonal(&DVector::from_column_slice(s)) * v.transpose()
}

fn parts(w: &DMatrix<f64>, r: usize) -> Triplets {
    let (u, s, vt) = truncated(&tensor(w).unwrap(), r).unwrap();
    (
        matrix(&u, "U").unwrap(),
        s,
        matrix(&vt, "Vt").unwrap().transpose(),
    )
}

fn product((u, s, v): &Triplets) -> DMatrix<f64> {
    u * DMatrix::from_diagonal(&DVector::from_column_slice(s)) * v.transpose()
}

fn assert_orthonormal(q: &DMatrix<f64>, name: &str) {
    let gap = (q.transpose() * q - DMatrix::identity(q.ncols(), q.ncols())).amax();
    assert!(gap < 1e-12, "{name}: {gap:e} from orthonormal");
}

/// Checks what must hold whatever the spectrum, against the true singular values `s`.
fn check(name: &str, w: &DMatrix<f64>, s: &[f64], r: usize, found: &Triplets) {
    let largest = s[0].max(f64::MIN_POSITIVE);
    assert_eq!(found.0.shape(), (w.nrows(), r), "{name}");
    assert_eq!(found.2.shape(), (w.ncols(), r), "{name}");
    assert_orthonormal(&found.0, name);
    assert_orthonormal(&found.2, name);
    for (i, (found, true_value)) in found.1.iter().zip(s).enumerate() {
        let gap = (found - true_value).abs() / largest;
        assert!(gap < 1e-12, "{name}: value {i} is {gap:e} off");
    }
    // Eckart and Young: no matrix of rank r is nearer, so this distance shows the best is found
    // even where a tie makes the best one ambiguous.
    let best = s[r.min(s.len())..]
        .iter()
        .map(|s| s * s)
        .sum::<f64>()
        .sqrt();
    let distance = (w - product(found)).norm();
    let gap = (distance - best).abs() / largest;
    assert!(
        gap < 1e-11,
        "{name}: {distance:e} from W, could be {best:e}"
    );
}

fn nalgebra_values(w: &DMatrix<f64>) -> Vec<f64> {
    let mut s = w
        .clone()
        .svd(false, false)
        .singular_values
        .as_slice()
        .to_vec();
    s.sort_by(|a, b| b.total_cmp(a));
    s
}

#[test]
fn agrees_with_nalgebra_on_random_matrices_of_every_form() {
    for (m, n) in [(1, 1), (1, 7), (7, 1), (5, 5), (6, 40), (40, 6), (33, 50)] {
        let w = random(m, n, 1);
        let full = w.clone().svd(true, true);
        let (u, vt) = (full.u.unwrap(), full.v_t.unwrap());
        let mut order: Vec<usize> = (0..m.min(n)).collect();
        let values = &full.singular_values;
        order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
        for r in 1..=m.min(n) {
            let found = parts(&w, r);
            let name = format!("{m} x {n}, r = {r}");
            check(&name, &w, &nalgebra_values(&w), r, &found);
            let mut best = DMatrix::zeros(m, n);
            for &i in &order[..r] {
                best += u.column(i) * values[i] * vt.row(i);
            }
            let gap = (product(&found) - best).norm() / values.max();
            assert!(gap < 1e-10, "{name}: {gap:e} from nalgebra's");
        }
    }
}

#[test]
fn holds_for_every_kind_of_spectrum() {
    let (m, n, r) = (60, 45, 6);
    let decay = |base: f64| (0..45).map(|i| base.powi(i)).collect::<Vec<f64>>();
    let close: Vec<f64> = (0..45).map(|i| 1.0 - 1e-9 * f64::from(i)).collect();
    // Squares of the small ones are below a rounding of the largest's.
    let tiny = [
        &[1.0][..],
        &[3e-9, 2.9e-9, 2e-9, 1e-10, 1e-11, 1e-12, 1e-13],
    ]
    .concat();
    for (name, s) in [
        ("equal", vec![1.0; 45]),
        ("close", close),
        ("pairs", (0..45).map(|i| 0.5_f64.powi(i / 2)).collect()),
        (
            "seven equal, six wanted",
            [vec![2.0; 7], vec![1.0; 38]].concat(),
        ),
        ("slow", decay(0.9)),
        ("steep", decay(0.05)),
        ("tiny", tiny.clone()),
        ("rank 3", vec![3.0, 2.0, 1.0]),
        ("rank 1", vec![1e-7]),
    ] {
        for w in [with_values(m, n, &s, 3), with_values(n, m, &s, 5)] {
            check(name, &w, &s, r, &parts(&w, r));
        }
    }
    // Far below the largest, each value still has digits of its own.
    let found = parts(&with_values(m, n, &tiny, 3), r).1;
    for (found, true_value) in found.iter().zip(&tiny) {
        assert!(
            (found - true_value).abs() < 1e-15,
            "{found:e}, not {true_value:e}"
        );
    }
}

#[test]
fn zero_matrices_have_orthonormal_vectors() {
    for (m, n) in [(1, 1), (1, 4), (5, 3), (3, 5), (400, 300)] {
        let w = DMatrix::zeros(m, n);
        let r = 3.min(m).min(n);
        let found = parts(&w, r);
        assert_eq!(found.1, vec![0.0; r]);
        check("zero", &w, &[0.0], r, &found);
    }
}

#[test]
fn entries_of_any_size() {
    for scale in [1e-300, 1e-160, 1e-30, 1e30, 1e160, 1e300] {
        let s = [4.0, 2.0, 1.0];
        let w = with_values(8, 5, &s, 7) * scale;
        let found = parts(&w, 3);
        for (found, true_value) in found.1.iter().zip(s) {
            let gap = (found / scale - true_value).abs();
            assert!(gap < 1e-13, "{scale:e}: {gap:e}");
        }
        assert_orthonormal(&found.0, "U");
    }
}

/// Large enough for [`lanczos`] to run.
#[test]
fn lanczos_finds_the_largest() {
    let (m, n, r) = (420, 300, 3);
    let trained: Vec<f64> = (1..=300).map(|i| f64::from(i).powf(-0.7)).collect();
    let cluster: Vec<f64> = (0..300)
        .map(|i| {
            if i < 40 {
                1.0 - 1e-7 * f64::from(i)
            } else {
                0.3
            }
        })
        .collect();
    let tiny = [1.0, 1e-8, 5e-9, 4e-9, 3e-10];
    let many = [vec![1.0; 200], vec![0.9; 100]].concat();
    for (name, s, converges) in [
        ("trained", &trained[..], true),
        ("rank 2", &[1.0, 0.5], true),
        ("all equal", &[1.0; 300], true),
        ("200 equal", &many, true),
        ("tiny", &tiny, true),
        ("cluster", &cluster, false),
    ] {
        for (w, form) in [
            (with_values(m, n, s, 1), "tall"),
            (with_values(n, m, s, 1), "wide"),
        ] {
            let name = format!("{name}, {form}");
            let found = lanczos(&w, r);
            assert!(found.is_some() || !converges, "{name} has not converged");
            if let Some((u, values, v)) = found {
                let first = |x: &DMatrix<f64>| x.columns(0, r).into_owned();
                check(
                    &name,
                    &w,
                    s,
                    r,
                    &(first(&u), values[..r].to_vec(), first(&v)),
                );
            }
            // With the other way behind it, the answer is right either way.
            check(&name, &w, s, r, &parts(&w, r));
        }
    }
}

/// Where s has a gap after r, the best part is one matrix, and both ways find it.
#[test]
fn lanczos_agrees_with_jacobi() {
    let (m, n, r) = (420, 300, 3);
    let slow: Vec<f64> = (1..=300).map(|i| f64::from(i).powf(-0.3)).collect();
    let tiny = vec![1.0, 1e-8, 5e-9, 4e-9, 3e-10];
    for (name, s) in [("slow", slow), ("tiny", tiny)] {
        let w = with_values(m, n, &s, 1);
        let part = |(u, s, v): Triplets| {
            let first = |x: DMatrix<f64>| x.columns(0, r).into_owned();
            product(&(first(u), s[..r].to_vec(), first(v)))
        };
        let gap = (part(lanczos(&w, r).unwrap()) - part(dense(&w).unwrap())).norm();
        assert!(gap < 1e-11, "{name}: {gap:e}");
    }
}

#[test]
fn low_rank_is_the_svd_of_the_product() {
    for (m, n, inner) in [
        (7, 9, 3),
        (9, 7, 8),
        (6, 4, 10),
        (5, 1, 2),
        (1, 1, 1),
        (3, 8, 5),
    ] {
        let (b, a) = (random(m, inner, 11), random(inner, n, 12));
        let w = &b * &a;
        let s = nalgebra_values(&w);
        for r in 1..=m.min(n) {
            let (u, values, vt) =
                low_rank_svd(&tensor(&b).unwrap(), &tensor(&a).unwrap(), r).unwrap();
            let vt = matrix(&vt, "Vt").unwrap();
            let found = (matrix(&u, "U").unwrap(), values, vt.transpose());
            check(
                &format!("({m}, {inner}) · ({inner}, {n})"),
                &w,
                &s,
                r,
                &found,
            );
        }
    }
}

#[test]
fn low_rank_of_a_sum_that_cancels() {
    let (b, a) = (random(6, 2, 1), random(2, 5, 2));
    let (b, a) = (
        joined(&b, &b),
        joined(&a.transpose(), &-a.transpose()).transpose(),
    );
    let (u, s, vt) = low_rank_svd(&tensor(&b).unwrap(), &tensor(&a).unwrap(), 5).unwrap();
    assert!(s[0] < 1e-14, "{s:?}");
    assert_orthonormal(&matrix(&u, "U").unwrap(), "U");
    assert_orthonormal(&matrix(&vt, "Vt").unwrap().transpose(), "V");
}

/// From torch 2 on the CPU: q, r = torch.linalg.qr(torch.tensor(w, dtype=torch.float64)).
#[test]
fn qr_has_the_signs_of_lapack() {
    type Case = (usize, usize, &'static [f64], &'static [f64], &'static [f64]);
    let cases: [Case; 6] = [
        (
            3,
            3,
            &[3.0, -1.0, 2.0, 4.0, 2.0, 0.0, 0.0, 1.0, -5.0],
            &[
                -0.6,
                0.7155417527999326,
                0.35777087639996635,
                -0.8,
                -0.5366563145999494,
                -0.2683281572999747,
                0.0,
                -0.4472135954999579,
                0.8944271909999159,
            ],
            &[
                -5.0,
                -1.0,
                -1.2,
                0.0,
                -2.23606797749979,
                3.6671514830996554,
                0.0,
                0.0,
                -3.7565942021996466,
            ],
        ),
        (
            4,
            2,
            &[1.0, 2.0, -2.0, 0.5, 2.0, -1.0, 0.0, 3.0],
            &[
                -0.33333333333333326,
                -0.5614401290920525,
                0.6666666666666666,
                -0.07387370119632275,
                -0.6666666666666666,
                0.20684636334970363,
                0.0,
                -0.7978359729202853,
            ],
            &[-3.0, 0.3333333333333335, 0.0, -3.760171390892826],
        ),
        (
            2,
            3,
            &[-2.0, 1.0, 4.0, 1.0, 3.0, -1.0],
            &[
                -0.8944271909999157,
                0.4472135954999579,
                0.4472135954999579,
                0.8944271909999159,
            ],
            &[
                2.23606797749979,
                0.447213595499958,
                -4.024922359499621,
                0.0,
                3.1304951684997055,
                0.8944271909999157,
            ],
        ),
        // Nothing below the diagonal: the column stays as it is, minus sign and zero included.
        (
            2,
            2,
            &[0.0, 1.0, 0.0, 2.0],
            &[1.0, 0.0, 0.0, 1.0],
            &[0.0, 1.0, 0.0, 2.0],
        ),
        (
            3,
            2,
            &[2.0, 1.0, 0.0, -3.0, 0.0, 0.0],
            &[1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
            &[2.0, 1.0, 0.0, -3.0],
        ),
        (1, 1, &[-5.0], &[1.0], &[-5.0]),
    ];
    for (m, n, w, q, r) in cases {
        let w = Tensor::new(w, &Device::Cpu)
            .unwrap()
            .reshape((m, n))
            .unwrap();
        let k = m.min(n);
        let (found_q, found_r) = qr(&w, k).unwrap();
        let gap = |found: &Tensor, expected: &[f64]| {
            let found = found.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(found.len(), expected.len());
            let gaps = found.iter().zip(expected).map(|(x, y)| (x - y).abs());
            gaps.fold(0.0, f64::max)
        };
        assert!(gap(&found_q, q) < 1e-14, "Q of {w}: {found_q}");
        assert!(gap(&found_r, r) < 1e-14, "R of {w}: {found_r}");
    }
}

#[test]
fn qr_multiplies_back_and_its_parts_agree() {
    for (m, n) in [(9, 4), (4, 9), (6, 6), (1, 3), (3, 1)] {
        let w = random(m, n, 21);
        let (q, r) = householder(w.clone(), m.min(n));
        assert_orthonormal(&q, "Q");
        assert!((&q * &r - &w).amax() < 1e-13);
        assert_eq!(
            r.lower_triangle(),
            r.lower_triangle()
                .map_with_location(|i, j, x| { if i == j { x } else { 0.0 } })
        );
        for k in 1..=m.min(n) {
            let (q_k, r_k) = householder(w.clone(), k);
            assert!((q_k - q.columns(0, k)).amax() < 1e-14);
            assert!((r_k - r.rows(0, k)).amax() < 1e-14);
        }
    }
}

#[test]
fn refuses_what_cannot_be_decomposed() {
    let w = Tensor::ones((3, 4), DType::F32, &Device::Cpu).unwrap();
    for rank in [0, 4, usize::MAX] {
        let message = truncated(&w, rank).unwrap_err().to_string();
        assert!(message.contains(&format!("rank {rank}")), "{message}");
        assert!(
            message.contains("3 x 4") && message.contains("1 to 3"),
            "{message}"
        );
        assert!(qr(&w, rank).is_err());
        let b = Tensor::ones((3, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(low_rank_svd(&b, &w, rank).is_err());
    }
    assert!(low_rank_svd(&w, &w, 1).is_err());
    let none = |m, n| Tensor::zeros((m, n), DType::F32, &Device::Cpu).unwrap();
    assert!(low_rank_svd(&none(3, 0), &none(0, 4), 1).is_err());
    assert!(truncated(&none(3, 0), 1).is_err());
    // Finite factors of a product that is not.
    let huge = Tensor::new(&[[1e200_f64]], &Device::Cpu).unwrap();
    assert!(matches!(
        low_rank_svd(&huge, &huge, 1),
        Err(Error::NotFinite { .. })
    ));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let w = Tensor::new(&[[1.0, bad]], &Device::Cpu).unwrap();
        assert!(matches!(truncated(&w, 1), Err(Error::NotFinite { .. })));
        assert!(matches!(qr(&w, 1), Err(Error::NotFinite { .. })));
    }
}

#[test]
fn reads_any_layout_and_type() {
    let w = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.5]], &Device::Cpu).unwrap();
    let (u, s, vt) = truncated(&w, 2).unwrap();
    let (v, s_t, ut) = truncated(&w.t().unwrap(), 2).unwrap();
    assert!((s[0] - s_t[0]).abs() < 1e-14);
    for (x, y) in [(u, ut.t().unwrap()), (vt, v.t().unwrap())] {
        let gap = (x.abs().unwrap() - y.abs().unwrap()).unwrap();
        let gap = gap
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert!(gap < 1e-13);
    }
    assert!(truncated(&w.to_dtype(DType::BF16).unwrap(), 1).is_ok());
}

/// `cargo test --release -p lora --lib -- --ignored --nocapture svd::tests::speed`
#[test]
#[ignore = "measures, asserts nothing"]
fn speed() {
    let trained: Vec<f64> = (1..=768).map(|i| f64::from(i).powf(-0.5)).collect();
    let time = |name: &str, f: &dyn Fn()| {
        let start = Instant::now();
        f();
        println!("{name}: {:.2?}", start.elapsed());
    };
    let clustered: Vec<f64> = (0..768).map(|i| if i < 100 { 1.0 } else { 0.9 }).collect();
    for (m, n) in [(768, 768), (768, 3072), (3072, 768)] {
        for (name, w) in [
            ("random", random(m, n, 1)),
            ("trained", with_values(m, n, &trained, 1)),
            ("clustered", with_values(m, n, &clustered, 1)),
            ("rank 32", random(m, 32, 1) * random(32, n, 2)),
        ] {
            for r in [8, 16, 64] {
                time(&format!("{m} x {n}, {name}, r = {r}"), &|| {
                    leading(w.clone(), r).unwrap();
                });
            }
            time(&format!("{m} x {n}, {name}, all"), &|| {
                dense(&w).unwrap();
            });
        }
        for k in [8, 768] {
            let w = random(m, n, 1);
            time(&format!("{m} x {n}, QR, k = {k}"), &|| {
                householder(w.clone(), k);
            });
        }
    }
}
