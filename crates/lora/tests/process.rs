//! Without a harness: `tune_process` must find a process with one thread.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

fn main() {
    if !cfg!(all(target_os = "linux", target_env = "gnu")) {
        assert!(!lora::tune_process());
        return;
    }
    let before = faults();
    touch();
    let fresh = faults() - before;
    assert!(lora::tune_process(), "not tuned");
    assert!(std::env::var_os("CANDLE_BARRIER_POOL_SPIN_LIMIT").is_none());

    memory_is_kept(fresh);
    threads_sleep();
    println!("test process ... ok");
}

const BYTES: usize = 64 << 20;

/// Allocates, writes to every page, frees.
fn touch() {
    let mut bytes = vec![0u8; BYTES];
    bytes.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&bytes);
}

fn memory_is_kept(fresh: u64) {
    touch();
    let before = faults();
    for _ in 0..10 {
        touch();
    }
    let again = faults() - before;
    assert!(
        again < fresh / 10,
        "{again} page faults in ten turns, {fresh} in one before"
    );
}

/// candle's threads must use no time a moment after their work.
fn threads_sleep() {
    use candle_core::{DType, Device, Tensor};
    let x = Tensor::ones(1 << 18, DType::F32, &Device::Cpu).unwrap();
    (&x + &x).unwrap();
    let before = ticks();
    for _ in 0..200 {
        (&x + &x).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    let used = ticks() - before;
    // A thread that spins all through takes 40 ticks; the work itself takes one or two.
    assert!(used <= 8, "candle's threads used {used} ticks");
}

/// Minor page faults of the process.
fn faults() -> u64 {
    field(&std::fs::read_to_string("/proc/self/stat").unwrap(), 9)
}

/// Hundredths of a second that candle's own threads have run.
fn ticks() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let stats = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")));
    let candle = stats
        .map(Result::unwrap)
        .filter(|stat| stat.contains("candle-bp"));
    candle.map(|stat| field(&stat, 13) + field(&stat, 14)).sum()
}

/// A field of a `stat` file, counted from 0 as in proc(5), where the second is in parentheses.
fn field(stat: &str, number: usize) -> u64 {
    let after = stat.rsplit_once(')').unwrap().1;
    after
        .split_whitespace()
        .nth(number - 2)
        .unwrap()
        .parse()
        .unwrap()
}
