//! What a step of QLoRA holds in memory at most.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Linear;
use lora::ops::linear_4bit;
use lora::quant::{Linear4bit, QuantConfig};
use lora::{LoraConfig, LoraLinear, LoraLinear4bit};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// The system's allocator, with a count of what is held.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(held, Relaxed);
        // SAFETY: the caller's word.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's word.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SIZE: usize = 2048;
/// Bytes of the weight in f32.
const WHOLE: usize = 4 * SIZE * SIZE;

/// The most that a forward and a backward pass hold beyond what was held before.
fn step(layer: impl Fn(&Tensor) -> Tensor) -> usize {
    let x = Var::ones((4, SIZE), DType::F32, &Device::Cpu).unwrap();
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    let gradients = layer(&x).sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&x).is_some());
    MOST.load(Relaxed) - before
}

/// One test, for nothing else may allocate beside it.
#[test]
fn the_weight_never_stands_in_full() {
    let (config, mut rng) = (LoraConfig::new(8, 16.0), ChaCha8Rng::seed_from_u64(1));
    let base = Linear::new(
        Tensor::ones((SIZE, SIZE), DType::F32, &Device::Cpu).unwrap(),
        None,
    );
    let before = HELD.load(Relaxed);
    let four = Linear4bit::quantize(&base, &QuantConfig::default()).unwrap();
    let held = HELD.load(Relaxed) - before;
    // 4.127 bits of 32, and a little for the tensors themselves.
    assert!(
        (4.127..4.2).contains(&(32.0 * held as f64 / WHOLE as f64)),
        "{held} bytes"
    );
    assert_eq!(
        four.weight().bytes(),
        SIZE * SIZE / 2 + SIZE * SIZE / 64 + SIZE * SIZE / 4096 + 4
    );

    let whole = LoraLinear::new("proj", base, &config, &mut rng).unwrap();
    let four = LoraLinear4bit::new("proj", four, &config, &mut rng).unwrap();
    // As many threads on every machine: each has 128 rows of the weight at a time.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(2)
        .build()
        .unwrap();
    pool.install(|| {
        let in_full = step(|x| whole.forward_t(x, true).unwrap());
        let in_4_bits = step(|x| four.forward_t(x, true).unwrap());
        let alone = step(|x| linear_4bit(x, four.base().weight(), None).unwrap());
        println!("{in_full} bytes in full, {in_4_bits} and {alone} in 4 bits, all {WHOLE}");
        assert!(
            in_4_bits.max(alone) < in_full + WHOLE / 8,
            "{in_4_bits} and {alone} bytes"
        );
    });
}
