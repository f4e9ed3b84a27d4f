//! `cargo course kernel`: what the kernelspec starts. It gives evcxr a warm folder of its own,
//! passes the stop button on, and leaves nothing behind.
//!
//! ```text
//! Jupyter ── launcher (this) ── evcxr_jupyter ── runtime (runs the cells)
//!                 │                  └── cargo, rustc
//!                 └── guard: ends the whole session and removes its folder once the launcher
//!                     is gone, however it went
//! ```

use crate::device::Device;
use crate::home::{Checkout, Home};
use crate::progress::Steps;
use crate::setup::template::KernelEnvironment;
use crate::setup::{Installed, template, tool};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getppid, setsid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Runs one kernel to its end.
pub fn kernel(connection_file: &Path) -> Result<()> {
    let parent = getppid();
    // From here on a signal waits for us instead of ending us.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let home = Home::find()?;
    let installed = Installed::read(&home)?;
    let (checkout, cwd) = place(&installed)?;
    template::settle(&home.kernels())?;
    sweep(&home);

    let folder = Folder::new(&home, connection_file)?;
    let mut guard = Guard::start(&folder)?;
    // What is not known, or not prepared, the cell refuses that asks for the device.
    let device = match (Device::chosen(None), &installed.cuda) {
        (Ok(Device::Cuda), Some(_)) => Device::Cuda,
        _ => Device::Cpu,
    };
    let config = warm(&home, &checkout, &installed, device, &folder);
    let mut command = Command::new(&installed.evcxr);
    command
        .arg("--control_file")
        .arg(std::path::absolute(connection_file)?)
        .current_dir(cwd);
    let environment = KernelEnvironment {
        home: &home,
        checkout: &checkout,
        installed: &installed,
        toolkit: installed.cuda.as_ref().filter(|_| device == Device::Cuda),
        config: &config,
    };
    environment.apply(&mut command, &folder.dir)?;
    // A session of its own: Jupyter's SIGINT reaches the launcher alone.
    // SAFETY: setsid is async-signal-safe.
    unsafe { command.pre_exec(|| setsid().map(drop).map_err(Into::into)) };
    let mut evcxr = command
        .spawn()
        .with_context(|| format!("cannot start {}", installed.evcxr.display()))?;
    guard.watch(&evcxr)?;
    loop {
        if let Some(status) = evcxr.try_wait()? {
            if status.success() {
                return Ok(());
            }
            bail!("evcxr_jupyter ended with {status}");
        }
        if getppid() != parent {
            return Ok(()); // Jupyter is gone; the guard ends the rest.
        }
        for signal in signals.pending() {
            match signal {
                SIGINT => interrupt(&evcxr),
                _ => return Ok(()),
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The checkout to use and the folder to run in: the notebook's own checkout, or else the one
/// that was set up last, from whose `notebooks` the path of the first cell's `:dep` holds.
fn place(installed: &Installed) -> Result<(Checkout, PathBuf)> {
    let cwd = std::env::current_dir()?;
    let checkout = Checkout::holding(&cwd).or_else(|| Checkout::holding(&installed.checkout));
    let checkout = checkout.with_context(|| {
        format!(
            "the checkout {} is gone: run `cargo course setup` in a checkout of the course",
            installed.checkout.display()
        )
    })?;
    let cwd = if cwd.join("../crates/course/Cargo.toml").is_file() {
        cwd
    } else {
        checkout.join("notebooks")
    };
    Ok((checkout, cwd))
}

/// Fills the kernel's folder from the template and returns evcxr's configuration folder. A
/// template that cannot be made is no reason to die: evcxr then compiles in its first cell and
/// shows the compiler's message there.
fn warm(
    home: &Home,
    checkout: &Checkout,
    installed: &Installed,
    device: Device,
    folder: &Folder,
) -> PathBuf {
    let made = template::ensure(home, checkout, installed, device, &mut Steps::new(1))
        .and_then(|made| tool::copy(&made.dir, &folder.dir).map(|()| made.config));
    made.unwrap_or_else(|error| {
        eprintln!(
            "The warm kernel could not be prepared, so the first cell compiles everything itself \
             (minutes) and shows what is wrong.\n{error:#}"
        );
        fs::remove_dir_all(&folder.dir).ok();
        // What an older template holds of candle need not be compiled again.
        let older = template::newest(home, device).map(|older| tool::copy(&older, &folder.dir));
        if !matches!(older, Some(Ok(()))) {
            fs::create_dir_all(&folder.dir).ok();
        }
        fs::copy(checkout.join("Cargo.lock"), folder.dir.join("Cargo.lock")).ok();
        folder.dir.join("no-config")
    })
}

/// Passes SIGINT to the process that runs the cells, and to it alone.
fn interrupt(evcxr: &Child) {
    for pid in runtimes(evcxr.id()) {
        kill(Pid::from_raw(pid), Signal::SIGINT).ok();
    }
}

/// evcxr's runtime: its child that runs the same program (the others are cargo and rustc).
fn runtimes(evcxr: u32) -> Vec<i32> {
    // `ps` prints a cut name on Linux (15 characters) and a path on macOS.
    let is_evcxr = |name: &str| {
        let name = name.rsplit('/').next().unwrap_or(name);
        !name.is_empty() && "evcxr_jupyter".starts_with(name) && name.len() > 5
    };
    let line = |line: &str| -> Option<i32> {
        let mut words = line.split_whitespace();
        let (pid, parent, name) = (words.next()?, words.next()?, words.next()?);
        (parent.parse() == Ok(evcxr) && is_evcxr(name)).then(|| pid.parse().ok())?
    };
    if cfg!(target_os = "linux") {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes
            .filter_map(|entry| {
                // pid (name) state parent …
                let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
                let (pid, rest) = stat.split_once(" (")?;
                let (name, rest) = rest.rsplit_once(") ")?;
                let parent = rest.split_whitespace().nth(1)?;
                line(&format!("{pid} {parent} {name}"))
            })
            .collect()
    } else {
        let output = Command::new("ps")
            .args(["-A", "-o", "pid=,ppid=,comm="])
            .output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        text.unwrap_or_default().lines().filter_map(line).collect()
    }
}

/// A kernel's folder `kernels/run-…` with its lock, held as long as this process lives.
struct Folder {
    /// evcxr's working folder, a copy of the template.
    dir: PathBuf,
    _lock: File,
}

/// A kernel's folder and its lock are siblings: `run-PID` and `run-PID.lock`.
const PREFIX: &str = "run-";

impl Folder {
    fn new(home: &Home, connection_file: &Path) -> Result<Self> {
        let dir = home
            .kernels()
            .join(format!("{PREFIX}{}", std::process::id()));
        let lock = File::create(dir.with_extension("lock"))?;
        lock.lock()?;
        fs::remove_dir_all(&dir).ok();
        // `course_jupyter` finds the folder of a kernel by its connection file.
        (&lock).write_all(
            std::path::absolute(connection_file)?
                .as_os_str()
                .as_encoded_bytes(),
        )?;
        Ok(Self { dir, _lock: lock })
    }
}

/// Removes the folders of kernels that are gone.
pub fn sweep(home: &Home) {
    for entry in fs::read_dir(home.kernels()).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(PREFIX) || !name.ends_with(".lock") {
            continue;
        }
        let Ok(lock) = File::open(&path) else {
            continue;
        };
        if lock.try_lock().is_ok() {
            fs::remove_dir_all(path.with_extension("")).ok();
            fs::remove_file(&path).ok();
        }
    }
}

/// The process that outlives the launcher: it reads the session's number from a pipe and, when
/// the pipe closes, ends the session and removes the folder.
struct Guard(std::process::ChildStdin);

impl Guard {
    fn start(folder: &Folder) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("kernel-guard")
            .arg(&folder.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: setsid is async-signal-safe.
        unsafe { command.pre_exec(|| setsid().map(drop).map_err(Into::into)) };
        let mut child = command.spawn().context("cannot start the kernel's guard")?;
        Ok(Self(child.stdin.take().context("no pipe to the guard")?))
    }

    fn watch(&mut self, evcxr: &Child) -> Result<()> {
        writeln!(self.0, "{}", evcxr.id())?;
        self.0.flush().context("the kernel's guard is gone")
    }
}

/// `kernel-guard FOLDER`: see [`Guard`].
pub fn guard(dir: &Path) -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    if let Ok(session) = text.trim().parse() {
        end(Pid::from_raw(session));
    }
    // A process in its last breath may still write.
    for _ in 0..50 {
        if fs::remove_dir_all(dir).is_ok() || !dir.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    fs::remove_file(dir.with_extension("lock")).ok();
    Ok(())
}

/// Ends every process of a session: politely first, then for good.
fn end(session: Pid) {
    for (signal, patience) in [(Signal::SIGTERM, 10), (Signal::SIGKILL, 50)] {
        if killpg(session, signal).is_err() {
            return; // No such process any more.
        }
        for _ in 0..patience {
            std::thread::sleep(Duration::from_millis(20));
            if killpg(session, None).is_err() {
                return;
            }
        }
    }
}
