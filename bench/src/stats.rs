//! Paired ratios with bootstrap intervals.
//!
//! Scenarios are interleaved within rounds so that drift of the machine cancels:
//! ratios are therefore taken within each round, and their median is reported
//! with a percentile bootstrap 95 % interval over the rounds.

use std::fmt;

use thiserror::Error;

/// Fewest rounds whose range covers the true median with 95 % probability
/// (`1 - 2 * 0.5^n`).
pub const MIN_ROUNDS: usize = 6;
/// Interval width, relative to the figure, above which a figure is not printed.
pub const NOISY_WIDTH: f64 = 0.20;
const RESAMPLES: usize = 4_000;

/// Why two series have no paired ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PairError {
    /// The series have different numbers of rounds.
    #[error("{left} rounds against {right}")]
    Unpaired {
        /// Rounds of the first series.
        left: usize,
        /// Rounds of the second series.
        right: usize,
    },
    /// There are no rounds.
    #[error("no rounds")]
    Empty,
    /// A denominator is zero, negative or not finite.
    #[error("round {0} has no positive time to divide by")]
    NotPositive(usize),
}

/// A median over rounds and its uncertainty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Median over the rounds.
    pub median: f64,
    /// Bootstrap 95 % interval of that median.
    pub ci95: [f64; 2],
    /// Rounds that it rests on.
    pub rounds: usize,
}

/// A figure that must not be printed, and what would help.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    /// Interval width relative to the scale.
    pub width: f64,
    /// Rounds that were measured.
    pub rounds: usize,
    /// Rounds that would do: the interval shrinks with the square root of their number.
    pub rounds_needed: usize,
}

impl fmt::Display for Noise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            width,
            rounds,
            rounds_needed,
        } = self;
        write!(
            f,
            "noisy: 95 % interval {:.0} % wide over {rounds} rounds; about {rounds_needed} rounds would do",
            width * 100.0
        )
    }
}

impl Estimate {
    /// The verdict "noisy", where the interval is wider than [`NOISY_WIDTH`] of
    /// `scale` or rests on fewer than [`MIN_ROUNDS`] rounds. For a ratio the scale
    /// is its median; for a share of something it is 1.
    pub fn noise(&self, scale: f64) -> Option<Noise> {
        match self.width_noise(scale) {
            None if self.rounds < MIN_ROUNDS => Some(self.noise_of(scale)),
            noise => noise,
        }
    }

    /// The same however few the rounds, for figures that repeat exactly.
    pub fn width_noise(&self, scale: f64) -> Option<Noise> {
        let noise = self.noise_of(scale);
        (noise.width > NOISY_WIDTH).then_some(noise)
    }

    fn noise_of(&self, scale: f64) -> Noise {
        let width = (self.ci95[1] - self.ci95[0]) / scale.abs();
        let needed = self.rounds as f64 * (width / NOISY_WIDTH).powi(2);
        Noise {
            width,
            rounds: self.rounds,
            rounds_needed: (needed.ceil() as usize).max(MIN_ROUNDS),
        }
    }
}

/// `a[i] / b[i]` for each round `i`.
///
/// # Errors
/// Series of different or no length, or a denominator that is not positive.
pub fn paired_ratios(a: &[f64], b: &[f64]) -> Result<Vec<f64>, PairError> {
    if a.len() != b.len() {
        return Err(PairError::Unpaired {
            left: a.len(),
            right: b.len(),
        });
    }
    if a.is_empty() {
        return Err(PairError::Empty);
    }
    let divide = |(round, (a, b)): (usize, (&f64, &f64))| {
        let ratio = a / b;
        if *b > 0.0 && ratio.is_finite() {
            Ok(ratio)
        } else {
            Err(PairError::NotPositive(round))
        }
    };
    a.iter().zip(b).enumerate().map(divide).collect()
}

/// Median and bootstrap interval of per-round figures; the same for every order
/// of the rounds, repeatable for the same `seed`. `None` without rounds.
pub fn estimate(figures: &[f64], seed: u64) -> Option<Estimate> {
    if figures.is_empty() {
        return None;
    }
    let mut sorted = figures.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let mut random = SplitMix64(seed);
    let mut resample = vec![0.0; sorted.len()];
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            resample.fill_with(|| sorted[random.below(sorted.len())]);
            resample.sort_unstable_by(f64::total_cmp);
            median_of_sorted(&resample)
        })
        .collect();
    medians.sort_unstable_by(f64::total_cmp);
    let at = |quantile: f64| medians[(quantile * (RESAMPLES - 1) as f64).round() as usize];
    Some(Estimate {
        median: median_of_sorted(&sorted),
        ci95: [at(0.025), at(0.975)],
        rounds: sorted.len(),
    })
}

/// Median of figures in any order; `None` without any.
pub fn median(figures: &[f64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    (!sorted.is_empty()).then(|| median_of_sorted(&sorted))
}

fn median_of_sorted(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        // Exact where both are equal, which (a + b) / 2 is too, but without overflow.
        sorted[middle - 1] + (sorted[middle] - sorted[middle - 1]) / 2.0
    }
}

/// Vigna's SplitMix64: its sequence is fixed by its definition, so an interval
/// can be recomputed from a results file by any later version.
#[derive(Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
    }

    fn rounds() -> impl Strategy<Value = Vec<(f64, f64)>> {
        prop::collection::vec((1.0..1e6f64, 1.0..1e6f64), 1..40)
    }

    fn ratio(pairs: &[(f64, f64)], scale: f64) -> Estimate {
        let (a, b): (Vec<f64>, Vec<f64>) = pairs.iter().map(|(a, b)| (a * scale, *b)).unzip();
        estimate(&paired_ratios(&a, &b).unwrap(), 7).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn interval_contains_the_median(pairs in rounds()) {
            let e = ratio(&pairs, 1.0);
            prop_assert!(e.ci95[0] <= e.median && e.median <= e.ci95[1], "{:?}", e);
        }

        #[test]
        fn estimate_scales_with_the_figures(pairs in rounds(), scale in 0.01..100.0f64) {
            let (one, scaled) = (ratio(&pairs, 1.0), ratio(&pairs, scale));
            prop_assert!(close(one.median * scale, scaled.median));
            prop_assert!(close(one.ci95[0] * scale, scaled.ci95[0]));
            prop_assert!(close(one.ci95[1] * scale, scaled.ci95[1]));
        }

        #[test]
        fn drift_common_to_both_sides_cancels(
            drift in prop::collection::vec(1.0..1e6f64, 1..40), constant in 0.01..100.0f64,
        ) {
            let pairs: Vec<_> = drift.iter().map(|d| (d * constant, *d)).collect();
            let e = ratio(&pairs, 1.0);
            prop_assert!(close(e.median, constant));
            prop_assert!(close(e.ci95[0], e.ci95[1]));
        }

        #[test]
        fn shuffling_rounds_of_both_sides_together_keeps_the_result(
            (pairs, shuffled) in rounds().prop_flat_map(|p| (Just(p.clone()), Just(p).prop_shuffle())),
        ) {
            prop_assert_eq!(ratio(&pairs, 1.0), ratio(&shuffled, 1.0));
        }
    }

    #[test]
    fn equal_series_give_a_zero_width_interval() {
        let series = [3.0, 9.0, 4.0, 8.0, 2.0, 1.0];
        let e = estimate(&paired_ratios(&series, &series).unwrap(), 1).unwrap();
        assert_eq!((e.median, e.ci95), (1.0, [1.0, 1.0]));
        assert_eq!(e.noise(e.median), None);
    }

    #[test]
    fn interval_covers_the_true_median_about_as_often_as_it_says() {
        let mut random = SplitMix64(42);
        let mut uniform = || (random.next() >> 11) as f64 / (1u64 << 53) as f64;
        let covered = (0..200)
            .filter(|&seed| {
                let figures: Vec<f64> = (0..25).map(|_| uniform()).collect();
                let [low, high] = estimate(&figures, seed).unwrap().ci95;
                low <= 0.5 && 0.5 <= high
            })
            .count();
        assert!((180..=200).contains(&covered), "{covered} of 200");
    }

    #[test]
    fn noisy_figure_says_how_many_rounds_would_do() {
        let wide = Estimate {
            median: 1.0,
            ci95: [0.8, 1.2],
            rounds: 10,
        };
        let noise = wide.noise(1.0).unwrap();
        assert_eq!(noise.rounds_needed, 40);
        assert!(
            noise
                .to_string()
                .starts_with("noisy: 95 % interval 40 % wide over 10 rounds")
        );
        let at_the_limit = Estimate {
            median: 1.0,
            ci95: [0.90625, 1.09375],
            rounds: 10,
        };
        assert_eq!(at_the_limit.noise(1.0), None);
    }

    #[test]
    fn too_few_rounds_are_noisy_however_narrow() {
        let e = estimate(&[1.0], 1).unwrap();
        assert_eq!(e.noise(1.0).unwrap().rounds_needed, MIN_ROUNDS);
    }

    #[test]
    fn series_that_do_not_pair_are_errors() {
        assert_eq!(
            paired_ratios(&[1.0], &[]),
            Err(PairError::Unpaired { left: 1, right: 0 })
        );
        assert_eq!(paired_ratios(&[], &[]), Err(PairError::Empty));
        assert_eq!(
            paired_ratios(&[1.0, 1.0], &[1.0, 0.0]),
            Err(PairError::NotPositive(1))
        );
        assert_eq!(estimate(&[], 1), None);
    }
}
