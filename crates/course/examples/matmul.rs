//! Seconds of the fastest of 20 products of two 1024 × 1024 matrices: `cargo course bench
//! kernel` compares it with the same loop in a notebook's cell.

use course::candle_core::{DType, Device, Result, Tensor};

fn main() -> Result<()> {
    let square = Tensor::ones((1024, 1024), DType::F32, &Device::Cpu)?;
    let mut fastest = f64::INFINITY;
    for _ in 0..20 {
        let start = std::time::Instant::now();
        let _ = square.matmul(&square)?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    println!("{fastest}");
    Ok(())
}
