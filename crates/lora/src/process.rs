//! What a process that trains on the CPU should ask for when it starts.

/// Makes the process keep the memory it frees, and candle's threads sleep when they have nothing
/// to do. Call it first in `main`; `false` where one of the two could not be had.
///
/// A training step allocates and frees the same buffers as the one before. By default glibc hands
/// every large one back to the system, which then clears each of its pages anew when it is touched.
/// After this call the process holds on to the most it has ever used.
///
/// candle's element-wise operations have threads of their own, which spin for a while after each
/// one and so take the cores from the products that follow. `CANDLE_BARRIER_POOL_SPIN_LIMIT` says
/// for how long; this starts them with 100 turns, unless the variable is set. It is left alone when
/// the process has other threads already, which may be reading the environment.
///
/// Both work on Linux, the first with glibc. For a program that cannot be changed, set
/// `MALLOC_MMAP_THRESHOLD_=1073741824`, `MALLOC_TRIM_THRESHOLD_=2147483648` and
/// `CANDLE_BARRIER_POOL_SPIN_LIMIT=100` before it starts.
///
/// Source: `mallopt(3)`; `candle_core::utils::BarrierPool`.
///
/// ```
/// lora::tune_process();
/// ```
pub fn tune_process() -> bool {
    // Both, whatever the first says.
    keep_memory() & let_threads_sleep()
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_memory() -> bool {
    // SAFETY: mallopt takes two numbers, locks what it changes and touches no memory of ours.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30) == 1
            && libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) == 1
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_memory() -> bool {
    false
}

const SPIN_LIMIT: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";

fn let_threads_sleep() -> bool {
    if std::env::var_os(SPIN_LIMIT).is_some() {
        return true;
    }
    let threads = std::fs::read_dir("/proc/self/task").map_or(usize::MAX, Iterator::count);
    if threads != 1 {
        return false;
    }
    // SAFETY: no other thread exists that could read or write the environment. The pool reads the
    // variable when it is first asked for, so programs started from here need not see it.
    unsafe {
        std::env::set_var(SPIN_LIMIT, "100");
        candle_core::utils::barrier_pool();
        std::env::remove_var(SPIN_LIMIT);
    }
    true
}
