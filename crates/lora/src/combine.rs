//! One adapter from several: PEFT's `add_weighted_adapter`, for the matrices of one layer.

mod model;

use std::fmt;
use std::str::FromStr;

use candle_core::{D, DType, Device, Tensor};
use rand::Rng;

use crate::{Error, Result, svd};

/// How [`combine`] makes one adapter of several, under PEFT's names.
///
/// Adapter i stands for the update ΔWᵢ = sᵢ BᵢAᵢ and has the weight wᵢ. Two methods know what they
/// do to Σ wᵢΔWᵢ, the sum one would like: `Cat` is exact, `Svd` the nearest matrix of its rank.
///
/// `Linear`, `Ties`, `DareLinear`, `DareTies` and `MagnitudePrune` need adapters of one rank and
/// combine all A among themselves and all B among themselves, both with the weights √|wᵢsᵢ|, A also
/// with the sign of wᵢsᵢ. They are cheap, but the product of two sums has cross terms: from
/// (A, B) = (1, 2) and (3, −1) with wᵢ = sᵢ = 1, `Linear` makes (1 + 3)(2 − 1) = 4, while the
/// exact sum is 2 − 3 = −1. The methods ending in `Svd` apply the same rule to ΔWᵢ, whole
/// matrices (out, in), with the weights wᵢ, and then cut the result back to a low rank.
///
/// | PEFT's name | on A and B | on ΔW | keeps of each | adds up |
/// |---|---|---|---|---|
/// | `linear`, `svd` | `Linear` | `Svd` | everything | Σ wᵢtᵢ |
/// | `magnitude_prune…` | `MagnitudePrune` | `MagnitudePruneSvd` | the largest | Σ wᵢtᵢ |
/// | `dare_linear…` | `DareLinear` | `DareLinearSvd` | by chance, tᵢ/density | Σ wᵢtᵢ |
/// | `ties…` | `Ties` | `TiesSvd` | the largest | those of the majority's sign |
/// | `dare_ties…` | `DareTies` | `DareTiesSvd` | by chance, tᵢ/density | of the majority's sign |
///
/// The largest are the ⌊density · number of entries⌋ of greatest magnitude in each matrix, the
/// earlier one (row by row) where two are equal. By chance means: each entry on its own with
/// probability density, so that the expectation stays. Where only the majority's sign counts, an
/// entry of the result is Σ wᵢtᵢ over the adapters whose entry has the sign that
/// [`MajoritySign`] elects, divided by their number (not by their weights); 0 where there is none.
///
/// Source: PEFT `tuners/lora/model.py`, `add_weighted_adapter`, and `utils/merge_utils.py`; TIES:
/// Yadav et al. 2023, arXiv:2306.01708; DARE: Yu et al. 2023, arXiv:2311.03099.
///
/// ```
/// use lora::CombinationType;
///
/// let method: CombinationType = "dare_ties_svd".parse()?;
/// assert_eq!(method, CombinationType::DareTiesSvd);
/// assert_eq!(method.to_string(), "dare_ties_svd");
/// assert!("average".parse::<CombinationType>().is_err());
/// # Ok::<(), lora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CombinationType {
    /// All A below each other, each times wᵢsᵢ, and all B side by side: exact, of rank Σ rᵢ.
    Cat,
    /// Sums of A and of B; has cross terms.
    Linear,
    /// Σ wᵢΔWᵢ cut to a low rank; PEFT's default.
    #[default]
    Svd,
    /// The largest entries of the majority's sign, in A and in B.
    Ties,
    /// The largest entries of the majority's sign, in ΔW, cut to a low rank.
    TiesSvd,
    /// Random entries rescaled, in A and in B.
    DareLinear,
    /// Random entries rescaled, in ΔW, cut to a low rank.
    DareLinearSvd,
    /// Random entries rescaled, of the majority's sign, in A and in B.
    DareTies,
    /// Random entries rescaled, of the majority's sign, in ΔW, cut to a low rank.
    DareTiesSvd,
    /// The largest entries, in A and in B.
    MagnitudePrune,
    /// The largest entries, in ΔW, cut to a low rank.
    MagnitudePruneSvd,
}

impl CombinationType {
    /// Every method, in PEFT's order.
    ///
    /// ```
    /// use lora::CombinationType;
    ///
    /// for method in CombinationType::ALL {
    ///     assert_eq!(method.name().parse::<CombinationType>()?, method);
    /// }
    /// # Ok::<(), lora::Error>(())
    /// ```
    pub const ALL: [Self; 11] = [
        Self::Svd,
        Self::Linear,
        Self::Cat,
        Self::Ties,
        Self::TiesSvd,
        Self::DareTies,
        Self::DareLinear,
        Self::DareTiesSvd,
        Self::DareLinearSvd,
        Self::MagnitudePrune,
        Self::MagnitudePruneSvd,
    ];

    /// PEFT's name, the value of its `combination_type`.
    ///
    /// ```
    /// use lora::CombinationType;
    ///
    /// assert_eq!(CombinationType::MagnitudePruneSvd.name(), "magnitude_prune_svd");
    /// ```
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cat => "cat",
            Self::Linear => "linear",
            Self::Svd => "svd",
            Self::Ties => "ties",
            Self::TiesSvd => "ties_svd",
            Self::DareLinear => "dare_linear",
            Self::DareLinearSvd => "dare_linear_svd",
            Self::DareTies => "dare_ties",
            Self::DareTiesSvd => "dare_ties_svd",
            Self::MagnitudePrune => "magnitude_prune",
            Self::MagnitudePruneSvd => "magnitude_prune_svd",
        }
    }

    /// Whether the method keeps entries by chance and so draws from the generator.
    pub(crate) fn draws(self) -> bool {
        self.pruning() == Pruning::Random
    }

    fn pruning(self) -> Pruning {
        match self {
            Self::Cat | Self::Linear | Self::Svd => Pruning::None,
            Self::Ties | Self::TiesSvd | Self::MagnitudePrune | Self::MagnitudePruneSvd => {
                Pruning::Magnitude
            }
            Self::DareLinear | Self::DareLinearSvd | Self::DareTies | Self::DareTiesSvd => {
                Pruning::Random
            }
        }
    }

    fn elects_sign(self) -> bool {
        matches!(
            self,
            Self::Ties | Self::TiesSvd | Self::DareTies | Self::DareTiesSvd
        )
    }
}

impl fmt::Display for CombinationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for CombinationType {
    type Err = Error;

    /// From PEFT's name.
    ///
    /// # Errors
    ///
    /// [`Error::CombineName`] for any other.
    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|method| method.name() == name);
        found.ok_or_else(|| Error::CombineName {
            what: "combination_type",
            name: name.to_string(),
            known: Self::ALL.map(Self::name).to_vec(),
        })
    }
}

/// What a matrix keeps before it is added.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pruning {
    None,
    Magnitude,
    Random,
}

/// How TIES elects the sign of an entry from the pruned, unweighted entries t₁, t₂, ….
///
/// Source: PEFT `utils/merge_utils.py`, `calculate_majority_sign_mask`.
///
/// ```
/// use lora::MajoritySign;
///
/// assert_eq!(MajoritySign::default(), MajoritySign::Total);
/// assert_eq!("frequency".parse::<MajoritySign>()?, MajoritySign::Frequency);
/// # Ok::<(), lora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MajoritySign {
    /// The sign of Σ tᵢ, plus when that is 0; PEFT's default.
    #[default]
    Total,
    /// The sign of Σ sign(tᵢ), plus when that is 0: every adapter has one vote.
    Frequency,
}

impl FromStr for MajoritySign {
    type Err = Error;

    /// From PEFT's name.
    ///
    /// # Errors
    ///
    /// [`Error::CombineName`] for any other.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "total" => Ok(Self::Total),
            "frequency" => Ok(Self::Frequency),
            _ => Err(Error::CombineName {
                what: "majority_sign_method",
                name: name.to_string(),
                known: vec!["total", "frequency"],
            }),
        }
    }
}

/// The settings of [`combine`], under the names of PEFT's `add_weighted_adapter`.
///
/// ```
/// use lora::{Combination, CombinationType, MajoritySign};
///
/// let how = Combination::new(CombinationType::TiesSvd)
///     .with_density(0.5)
///     .with_majority_sign(MajoritySign::Frequency)
///     .with_svd_rank(4);
/// assert!(how.validate().is_ok());
/// assert!(Combination::new(CombinationType::Ties).validate().is_err()); // no density
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Combination {
    /// The method.
    pub combination_type: CombinationType,
    /// The share of entries that the pruning methods keep; the others do not read it.
    pub density: Option<f64>,
    /// How the TIES methods elect a sign; the others do not read it.
    pub majority_sign_method: MajoritySign,
    /// The rank that the methods ending in `Svd` cut to; the others do not read it. By default
    /// the largest rank of the adapters, or min(out, in) where that is smaller.
    pub svd_rank: Option<usize>,
}

impl Combination {
    /// The method with PEFT's defaults: no density, [`MajoritySign::Total`], no rank.
    ///
    /// ```
    /// use lora::{Combination, CombinationType};
    ///
    /// assert_eq!(Combination::new(CombinationType::Svd), Combination::default());
    /// ```
    #[must_use]
    pub fn new(combination_type: CombinationType) -> Self {
        Self {
            combination_type,
            ..Self::default()
        }
    }

    /// Sets the share of entries to keep, from 0 to 1; 1 keeps all.
    ///
    /// ```
    /// use lora::{Combination, CombinationType};
    ///
    /// let how = Combination::new(CombinationType::MagnitudePrune).with_density(0.2);
    /// assert_eq!(how.density, Some(0.2));
    /// ```
    #[must_use]
    pub fn with_density(mut self, density: f64) -> Self {
        self.density = Some(density);
        self
    }

    /// Sets how the TIES methods elect a sign.
    ///
    /// ```
    /// use lora::{Combination, CombinationType, MajoritySign};
    ///
    /// let how = Combination::new(CombinationType::Ties)
    ///     .with_majority_sign(MajoritySign::Frequency);
    /// assert_eq!(how.majority_sign_method, MajoritySign::Frequency);
    /// ```
    #[must_use]
    pub fn with_majority_sign(mut self, majority_sign: MajoritySign) -> Self {
        self.majority_sign_method = majority_sign;
        self
    }

    /// Sets the rank that the methods ending in `Svd` cut to.
    ///
    /// ```
    /// use lora::{Combination, CombinationType};
    ///
    /// let how = Combination::new(CombinationType::Svd).with_svd_rank(4);
    /// assert_eq!(how.svd_rank, Some(4));
    /// ```
    #[must_use]
    pub fn with_svd_rank(mut self, svd_rank: usize) -> Self {
        self.svd_rank = Some(svd_rank);
        self
    }

    /// Says whether these settings can work, as far as that shows without the adapters.
    ///
    /// # Errors
    ///
    /// [`Error::Density`] when a pruning method has no density, or one outside [0, 1]; the methods
    /// that divide by it (`Dare…`) refuse 0 too.
    ///
    /// ```
    /// use lora::{Combination, CombinationType};
    ///
    /// let how = Combination::new(CombinationType::DareTies);
    /// let message = how.validate().unwrap_err().to_string();
    /// assert!(message.contains("dare_ties") && message.contains("with_density"));
    /// assert!(how.with_density(0.5).validate().is_ok());
    /// ```
    pub fn validate(&self) -> Result<()> {
        let possible = match (self.combination_type.pruning(), self.density) {
            (Pruning::None, _) => true,
            (Pruning::Magnitude, Some(density)) => (0.0..=1.0).contains(&density),
            (Pruning::Random, Some(density)) => density > 0.0 && density <= 1.0,
            (_, None) => false,
        };
        if !possible {
            return Err(Error::Density {
                combination_type: self.combination_type,
                density: self.density,
            });
        }
        Ok(())
    }

    /// One matrix of several of one size, by this method's rule; `weights` in the same order.
    fn merged(
        &self,
        mut matrices: Vec<Vec<f64>>,
        weights: &[f64],
        rng: &mut (impl Rng + ?Sized),
    ) -> Vec<f64> {
        // `validate` has made sure of a density where one is read.
        let density = self.density.unwrap_or(1.0);
        for matrix in &mut matrices {
            match self.combination_type.pruning() {
                Pruning::None => {}
                Pruning::Magnitude => keep_largest(matrix, density),
                Pruning::Random => keep_random(matrix, density, rng),
            }
        }
        let size = matrices.first().map_or(0, Vec::len);
        (0..size)
            .map(|entry| {
                let entries = matrices.iter().map(|matrix| matrix[entry]);
                let terms = entries.clone().zip(weights);
                if self.combination_type.elects_sign() {
                    let sign = self.majority_sign_method.of(entries);
                    let agreeing = terms.filter(|(t, _)| t * sign > 0.0);
                    let (sum, count) = agreeing.fold((0.0, 0.0), |(sum, count), (t, w)| {
                        (sum + w * t, count + 1.0)
                    });
                    sum / f64::max(count, 1.0)
                } else {
                    terms.map(|(t, w)| w * t).sum()
                }
            })
            .collect()
    }
}

impl MajoritySign {
    /// 1 or −1.
    fn of(self, entries: impl Iterator<Item = f64>) -> f64 {
        let sum: f64 = match self {
            Self::Total => entries.sum(),
            Self::Frequency => entries.filter(|t| *t != 0.0).map(f64::signum).sum(),
        };
        if sum >= 0.0 { 1.0 } else { -1.0 }
    }
}

/// One adapter's matrices in a layer, and how much of it [`combine`] takes: w · s · B A.
///
/// # Shapes
///
/// `a` (r, in), `b` (out, r). A convolution's are reshaped to that: (r, in · k · k) and (out, r).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora::Weighted;
///
/// let half = Weighted {
///     a: Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?,
///     b: Tensor::new(&[[1f32], [0.]], &Device::Cpu)?,
///     scaling: 2.0,
///     weight: 0.5,
/// };
/// assert_eq!(half.weight * half.scaling, 1.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Weighted {
    /// A (r, in).
    pub a: Tensor,
    /// B (out, r).
    pub b: Tensor,
    /// The adapter's own factor s, from [`LoraConfig::scaling`](crate::LoraConfig::scaling).
    pub scaling: f64,
    /// The weight w in the combination; a negative one subtracts the adapter.
    pub weight: f64,
}

/// What [`combine`] makes: an adapter with the scaling 1, so α = r and no rsLoRA.
///
/// # Shapes
///
/// `a` (r, in), `b` (out, r).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora::{Combination, CombinationType, Weighted, combine};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let one = Weighted {
///     a: Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?,
///     b: Tensor::new(&[[1f32], [4.]], &Device::Cpu)?,
///     scaling: 2.0,
///     weight: 0.5,
/// };
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let how = Combination::new(CombinationType::Cat);
/// let sum = combine(&[one.clone(), one], &how, &mut rng)?;
/// assert_eq!((sum.a.dims(), sum.b.dims()), (&[2, 3][..], &[2, 2][..]));
/// assert_eq!(sum.b.matmul(&sum.a)?.to_vec2::<f32>()?, [[2., 4., 6.], [8., 16., 24.]]);
/// # Ok::<(), lora::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Combined {
    /// A (r, in).
    pub a: Tensor,
    /// B (out, r).
    pub b: Tensor,
}

/// Combines the adapters of one layer into one whose update is B·A.
///
/// What each method does is described at [`CombinationType`]. Where a method cuts to a low rank,
/// B = U·diag(S) and A = Vᵀ from the SVD; `Svd` itself never forms a matrix (out, in). Unlike in
/// PEFT, a single adapter is treated like several: its pruning and its `svd_rank` count.
///
/// The result is computed in f64 and rounded once to the type of the first adapter's A, on its
/// device; it has no graph. Only the `Dare…` methods draw from `rng`, one number for each entry,
/// and none when the density is 1: the same state of the generator gives the same result.
///
/// # Shapes
///
/// A (rᵢ, in), B (out, rᵢ) → A (r, in), B (out, r). `Cat`: r = Σ rᵢ; the methods ending in `Svd`:
/// [`Combination::svd_rank`]; the others: the one rank of all adapters.
///
/// # Errors
///
/// [`Error::CombineNone`] without adapters, [`Error::CombineShape`] and [`Error::CombineRanks`]
/// when they do not fit together, [`Error::CombineWeight`] and [`Error::NotFinite`] for NaN and
/// infinity, [`Error::Density`] as in [`Combination::validate`], [`Error::SvdRank`] for an
/// `svd_rank` of 0 or above min(out, in), and what candle reports.
///
/// Source: PEFT `tuners/lora/model.py`, `add_weighted_adapter`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora::{Combination, CombinationType, Weighted, combine};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let adapter = |a: f32, b: f32| -> candle_core::Result<Weighted> {
///     let scalar = |x: f32| Tensor::new(&[[x]], &Device::Cpu);
///     Ok(Weighted { a: scalar(a)?, b: scalar(b)?, scaling: 1.0, weight: 1.0 })
/// };
/// let adapters = [adapter(1.0, 2.0)?, adapter(3.0, -1.0)?];
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let mut update = |method| -> lora::Result<f32> {
///     let sum = combine(&adapters, &Combination::new(method), &mut rng)?;
///     Ok(sum.b.matmul(&sum.a)?.sum_all()?.to_scalar()?)
/// };
/// assert_eq!(update(CombinationType::Cat)?, -1.0); // 2 · 1 − 1 · 3
/// assert_eq!(update(CombinationType::Svd)?, -1.0);
/// assert_eq!(update(CombinationType::Linear)?, 4.0); // (2 − 1) (1 + 3)
/// # Ok::<(), lora::Error>(())
/// ```
pub fn combine(
    adapters: &[Weighted],
    how: &Combination,
    rng: &mut (impl Rng + ?Sized),
) -> Result<Combined> {
    how.validate()?;
    let Some(first) = adapters.first() else {
        return Err(Error::CombineNone);
    };
    let parts = checked(adapters, first)?;
    let combined = match how.combination_type {
        CombinationType::Cat => stacked(&parts)?,
        CombinationType::Linear
        | CombinationType::Ties
        | CombinationType::DareLinear
        | CombinationType::DareTies
        | CombinationType::MagnitudePrune => {
            one_rank(&parts, how.combination_type)?;
            by_factor(&parts, how, rng)?
        }
        CombinationType::Svd
        | CombinationType::TiesSvd
        | CombinationType::DareLinearSvd
        | CombinationType::DareTiesSvd
        | CombinationType::MagnitudePruneSvd => {
            let largest = parts.iter().map(Part::rank).max().unwrap_or(1);
            let (out_features, in_features) = (first.b.dim(0)?, first.a.dim(1)?);
            let default = largest.min(out_features).min(in_features);
            let rank = how.svd_rank.unwrap_or(default);
            let (u, s, vt) = if how.combination_type == CombinationType::Svd {
                let sum = stacked(&parts)?;
                svd::low_rank_svd(&sum.b, &sum.a, rank)?
            } else {
                svd::truncated(&by_update(&parts, how, rng)?, rank)?
            };
            let s = Tensor::from_vec(s, rank, &Device::Cpu)?;
            Combined {
                a: vt,
                b: u.broadcast_mul(&s)?,
            }
        }
    };
    let rounded = |x: Tensor| x.to_dtype(first.a.dtype())?.to_device(first.a.device());
    Ok(Combined {
        a: rounded(combined.a)?,
        b: rounded(combined.b)?,
    })
}

/// A [`Weighted`] that has been checked, in f64 on the CPU.
struct Part {
    a: Tensor,
    b: Tensor,
    scaling: f64,
    weight: f64,
}

impl Part {
    fn rank(&self) -> usize {
        self.a.dims()[0]
    }
}

fn checked(adapters: &[Weighted], first: &Weighted) -> Result<Vec<Part>> {
    let part = |(index, adapter): (usize, &Weighted)| {
        let &Weighted {
            ref a,
            ref b,
            scaling,
            weight,
        } = adapter;
        let fits = match (a.dims(), b.dims(), first.a.dims(), first.b.dims()) {
            (&[r, ins], &[outs, b_r], &[_, first_ins], &[first_outs, _]) => {
                (r, ins, outs) == (b_r, first_ins, first_outs) && r * ins * outs > 0
            }
            _ => false,
        };
        if !fits {
            return Err(Error::CombineShape {
                index,
                a: a.dims().to_vec(),
                b: b.dims().to_vec(),
                first_a: first.a.dims().to_vec(),
                first_b: first.b.dims().to_vec(),
            });
        }
        if !(scaling.is_finite() && weight.is_finite()) {
            return Err(Error::CombineWeight {
                index,
                weight,
                scaling,
            });
        }
        let plain = |name: &str, x: &Tensor| {
            let x = x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            if x.flatten_all()?
                .to_vec1::<f64>()?
                .iter()
                .all(|x| x.is_finite())
            {
                return Ok(x);
            }
            Err(Error::NotFinite {
                what: format!("combine: {name} of adapter {index} (counted from 0)"),
            })
        };
        Ok(Part {
            a: plain("A", a)?,
            b: plain("B", b)?,
            scaling,
            weight,
        })
    };
    adapters.iter().enumerate().map(part).collect()
}

fn one_rank(parts: &[Part], combination_type: CombinationType) -> Result<()> {
    let mut ranks = parts.iter().map(Part::rank).enumerate();
    let first = ranks.next().map_or(0, |(_, rank)| rank);
    match ranks.find(|&(_, rank)| rank != first) {
        None => Ok(()),
        Some((index, rank)) => Err(Error::CombineRanks {
            combination_type,
            first,
            index,
            rank,
        }),
    }
}

/// [A₁·w₁s₁; A₂·w₂s₂; …] and [B₁ B₂ …], whose product is Σ wᵢsᵢ BᵢAᵢ.
fn stacked(parts: &[Part]) -> Result<Combined> {
    let scaled = |part: &Part| &part.a * (part.weight * part.scaling);
    let a: Vec<Tensor> = parts
        .iter()
        .map(scaled)
        .collect::<candle_core::Result<_>>()?;
    let b: Vec<&Tensor> = parts.iter().map(|part| &part.b).collect();
    Ok(Combined {
        a: Tensor::cat(&a, 0)?,
        b: Tensor::cat(&b, D::Minus1)?,
    })
}

/// The rule on all A, and on all B.
fn by_factor(parts: &[Part], how: &Combination, rng: &mut (impl Rng + ?Sized)) -> Result<Combined> {
    let factors: Vec<f64> = parts
        .iter()
        .map(|part| part.weight * part.scaling)
        .collect();
    let b_weights: Vec<f64> = factors.iter().map(|factor| factor.abs().sqrt()).collect();
    // One side takes the sign; on both it would vanish.
    let a_weights: Vec<f64> = factors
        .iter()
        .zip(&b_weights)
        .map(|(factor, root)| root.copysign(*factor))
        .collect();
    let a: Vec<&Tensor> = parts.iter().map(|part| &part.a).collect();
    let b: Vec<&Tensor> = parts.iter().map(|part| &part.b).collect();
    Ok(Combined {
        a: merged_tensor(&a, &a_weights, how, rng)?,
        b: merged_tensor(&b, &b_weights, how, rng)?,
    })
}

/// The rule on all ΔW = s B A (out, in).
fn by_update(parts: &[Part], how: &Combination, rng: &mut (impl Rng + ?Sized)) -> Result<Tensor> {
    let update = |part: &Part| part.b.matmul(&part.a)? * part.scaling;
    let updates: Vec<Tensor> = parts
        .iter()
        .map(update)
        .collect::<candle_core::Result<_>>()?;
    let weights: Vec<f64> = parts.iter().map(|part| part.weight).collect();
    merged_tensor(&updates.iter().collect::<Vec<_>>(), &weights, how, rng)
}

fn merged_tensor(
    tensors: &[&Tensor],
    weights: &[f64],
    how: &Combination,
    rng: &mut (impl Rng + ?Sized),
) -> Result<Tensor> {
    let entries = |x: &&Tensor| x.flatten_all()?.to_vec1::<f64>();
    let matrices = tensors
        .iter()
        .map(entries)
        .collect::<candle_core::Result<_>>()?;
    let merged = how.merged(matrices, weights, rng);
    Ok(Tensor::from_vec(merged, tensors[0].shape(), &Device::Cpu)?)
}

/// Zeroes all but the ⌊density · n⌋ entries of greatest magnitude.
fn keep_largest(entries: &mut [f64], density: f64) {
    let keep = (density * entries.len() as f64) as usize;
    if keep >= entries.len() {
        return;
    }
    // The place decides between equals, so the order is total and the result the only one.
    let mut order: Vec<usize> = (0..entries.len()).collect();
    let (_, _, _) = order.select_nth_unstable_by(keep, |&i, &j| {
        let (first, second) = (entries[i].abs(), entries[j].abs());
        second.total_cmp(&first).then(i.cmp(&j))
    });
    for &place in &order[keep..] {
        entries[place] = 0.0;
    }
}

/// Keeps each entry with probability `density` and divides it by that.
fn keep_random(entries: &mut [f64], density: f64, rng: &mut (impl Rng + ?Sized)) {
    if density >= 1.0 {
        return;
    }
    for entry in entries {
        let kept = rng.random::<f64>() < density;
        *entry = if kept { *entry / density } else { 0.0 };
    }
}

#[cfg(test)]
mod tests;
