//! The stop button: a training loop that asks [`requested`] ends at its next step, and every
//! variable stays.
//!
//! Stock evcxr kills the process that runs the cells, and all variables with it. The course's
//! kernel sends SIGINT to that process instead, and this room decides what it means:
//!
//! - no cell runs: nothing happens;
//! - the running cell asks [`requested`] (directly or through [`steps`]): it hears `true` from
//!   then on, until the cell has ended;
//! - the cell does not ask, or the button is pressed again: the process ends as in stock evcxr.
//!
//! ```
//! use course::interrupt;
//! let mut done = 0;
//! for _step in interrupt::steps(0..1000) {
//!     done += 1; // one step of training
//! }
//! assert_eq!(done, 1000); // nobody pressed stop
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Whether a stop is asked for and the cell has not ended yet.
static STOP: AtomicBool = AtomicBool::new(false);
/// Whether the running cell has heard of it.
static HEARD: AtomicBool = AtomicBool::new(false);
/// How often [`requested`] was asked: a loop that asks is given time to come round.
static ASKED: AtomicU64 = AtomicU64::new(0);

/// How long a cell that never asked gets to ask, and one that did.
const PATIENCE: Duration = Duration::from_millis(1500);
const PATIENCE_ASKING: Duration = Duration::from_secs(30);

/// Whether the learner pressed stop while this cell runs. One atomic load and one addition: ask in every step.
///
/// Stays `true` until the cell has ended, so that an outer loop hears it after an inner one.
///
/// ```
/// let mut step = 0;
/// while !course::interrupt::requested() && step < 3 {
///     step += 1;
/// }
/// assert_eq!(step, 3);
/// ```
pub fn requested() -> bool {
    ASKED.fetch_add(1, Ordering::Relaxed);
    let stop = STOP.load(Ordering::Acquire);
    if stop {
        HEARD.store(true, Ordering::Release);
    }
    stop
}

/// The items of `items` until the learner presses stop.
///
/// ```
/// let total: u32 = course::interrupt::steps([1, 2, 3]).sum();
/// assert_eq!(total, 6);
/// ```
pub fn steps<I: IntoIterator>(items: I) -> impl Iterator<Item = I::Item> {
    let mut items = items.into_iter();
    std::iter::from_fn(move || if requested() { None } else { items.next() })
}

/// Listens for SIGINT where the course's kernel loads this library into evcxr's runtime, also
/// after that process was started anew.
#[cfg(unix)]
#[ctor::ctor(unsafe)]
fn listen() {
    let of_kernel = std::env::var_os("COURSE_KERNEL").is_some();
    let in_runtime = std::env::var_os("EVCXR_IS_RUNTIME").is_some();
    if !(of_kernel && in_runtime) {
        return;
    }
    // Without a listener SIGINT ends the process, as it does in stock evcxr.
    if let Ok(mut signals) = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT]) {
        std::thread::spawn(move || {
            while signals.wait().next().is_some() {
                if !idle() {
                    stop_cell(|| signals.pending().next().is_some());
                }
            }
        });
    }
}

/// Asks the running cell to stop and waits until it has; ends the process when it does not
/// listen or `again` tells of another press.
#[cfg(unix)]
fn stop_cell(mut again: impl FnMut() -> bool) {
    let asked_before = ASKED.load(Ordering::Relaxed);
    HEARD.store(false, Ordering::Release);
    STOP.store(true, Ordering::Release);
    let patience = if asked_before > 0 {
        PATIENCE_ASKING
    } else {
        PATIENCE
    };
    let start = Instant::now();
    while !idle() {
        let heard = HEARD.load(Ordering::Acquire);
        if again() || (!heard && start.elapsed() > patience) {
            give_up();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    STOP.store(false, Ordering::Release);
    HEARD.store(false, Ordering::Release);
    ASKED.store(0, Ordering::Relaxed);
}

/// Ends the process the way an unhandled SIGINT does.
#[cfg(unix)]
fn give_up() {
    eprintln!(
        "Stopped by force, and the variables are lost: this cell does not ask \
         `interrupt::requested()`. A loop over `steps(..)` stops and keeps them."
    );
    let _ = signal_hook::low_level::emulate_default_handler(signal_hook::consts::SIGINT);
}

/// Whether the main thread waits for evcxr's next command: it is in `read` on stdin.
#[cfg(target_os = "linux")]
fn idle() -> bool {
    let call = format!("/proc/self/task/{}/syscall", std::process::id());
    let call = std::fs::read_to_string(call).unwrap_or_default();
    let mut words = call.split_whitespace();
    let read = if cfg!(target_arch = "x86_64") {
        "0"
    } else {
        "63"
    };
    words.next() == Some(read) && words.next() == Some("0x0")
}

/// Elsewhere the system does not tell: a cell is taken to run until a second after it has heard
/// of the stop.
#[cfg(all(unix, not(target_os = "linux")))]
fn idle() -> bool {
    let heard = HEARD.load(Ordering::Acquire);
    if heard {
        std::thread::sleep(Duration::from_secs(1));
    }
    heard
}
