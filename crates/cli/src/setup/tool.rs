//! Runs the tools that a set-up needs and turns their failures into one clear sentence.

use crate::progress::Step;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs a command to its end; every line of its output goes to `each_line`. Fails with a
/// sentence that says what `what` could not do and why.
pub fn run(what: &str, command: &mut Command, mut each_line: impl FnMut(&str)) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{what}: cannot start {program}"))?;
    let stdout = child.stdout.take().context("no stdout")?;
    let stderr = child.stderr.take().context("no stderr")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = BufReader::new(stdout).read_to_string(&mut text);
        text
    });
    let mut log = Vec::new();
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        each_line(&line);
        log.push(line);
    }
    let output = reader.join().unwrap_or_default();
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    log.extend(output.lines().map(str::to_owned));
    bail!(
        "{what}: {}",
        explain(&log).unwrap_or_else(|| tail(&log, &status.to_string()))
    )
}

/// Copies a folder with its time stamps, which cargo compares. Clones where the file system can.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("cp");
    if cfg!(target_os = "macos") {
        command.args(["-c", "-pR"]);
    } else {
        command.args(["-a", "--reflink=auto"]);
    }
    command.arg(from).arg(to);
    run(&format!("copying {}", from.display()), &mut command, |_| ())
}

/// Counts cargo's `Compiling` lines into a step's progress.
pub fn compile_progress(step: &mut Step, total: usize) -> impl FnMut(&str) {
    let mut done = 0;
    move |line| {
        let line = line.trim_start();
        if line.starts_with("Compiling ") {
            done += 1;
        }
        if line.starts_with("Compiling ") || line.starts_with("Download") {
            step.update(&format!(
                "{done} of about {} crates: {line}",
                total.max(done)
            ));
        }
    }
}

/// Recognises the failures that a newcomer can mend.
pub fn explain(log: &[String]) -> Option<String> {
    let text = log.join("\n").to_lowercase();
    let has = |needles: &[&str]| needles.iter().any(|needle| text.contains(needle));
    if has(&[
        "no space left on device",
        "disk quota exceeded",
        "os error 28",
    ]) {
        return Some(
            "the disk is full. Make room (the set-up needs 4 GB), or set COURSE_HOME to a \
             folder on another disk, and start the command again: it goes on where it stopped."
                .into(),
        );
    }
    if has(&[
        "could not resolve host",
        "couldn't resolve host",
        "failed to resolve",
        "name resolution",
        "network is unreachable",
        "connection refused",
        "connection timed out",
        "newconnectionerror",
        // What pip says of an index that it cannot reach.
        "(from versions: none)",
        "could not connect to server",
        "couldn't connect to server",
        "failed to connect to",
        "[7]",
        "proxy error",
    ]) {
        return Some(
            "the network cannot be reached. Connect this machine (behind a proxy set HTTPS_PROXY) \
             and start the command again: it goes on where it stopped."
                .into(),
        );
    }
    if has(&[
        "ensurepip is not",
        "no module named venv",
        "no module named ensurepip",
    ]) {
        return Some(
            "this Python comes without its venv module. Install it (on Debian and Ubuntu: \
             sudo apt install python3-venv) and start the command again."
                .into(),
        );
    }
    if has(&[
        "linker `cc` not found",
        "linker `gcc` not found",
        "linker `clang` not found",
    ]) {
        return Some(NO_COMPILER.into());
    }
    if has(&["hashes do not match", "do not match the hashes"]) {
        return Some(
            "a downloaded package does not have the pinned SHA-256. Something between this \
             machine and the package index changes files: try another network."
                .into(),
        );
    }
    None
}

/// What to say when no C compiler is there.
pub const NO_COMPILER: &str = "Rust needs a C compiler to link, and there is none. Install one \
    (Debian and Ubuntu: sudo apt install build-essential; Fedora: sudo dnf install gcc; macOS: \
    xcode-select --install) and start the command again.";

fn tail(log: &[String], status: &str) -> String {
    let lines: Vec<_> = log.iter().filter(|line| !line.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(15);
    let tail: Vec<_> = lines[from..]
        .iter()
        .map(|line| format!("    {line}"))
        .collect();
    format!(
        "it ended with {status}. The end of its output:\n{}",
        tail.join("\n")
    )
}

/// Free bytes on the disk that holds `path`, where the system tells.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the field's width differs between systems"
    )]
    Some(stat.blocks_available() as u64 * stat.fragment_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(line: &str) -> String {
        explain(&[line.to_owned()]).unwrap_or_default()
    }

    #[test]
    fn a_newcomers_failures_get_one_sentence_that_says_what_to_do() {
        for (line, want) in [
            (
                "OSError: [Errno 28] No space left on device",
                "disk is full",
            ),
            (
                "spurious network error: [6] Could not resolve hostname (Could not resolve host: x)",
                "network",
            ),
            (
                "The virtual environment was not created successfully because ensurepip is not\navailable",
                "venv",
            ),
            (
                "ERROR: Could not find a version that satisfies the requirement anyio==4.16.0 \
                 (from versions: none)",
                "network",
            ),
            ("error: linker `cc` not found", "C compiler"),
            (
                "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
                "SHA-256",
            ),
        ] {
            assert!(
                explained(line).contains(want),
                "{line}: {}",
                explained(line)
            );
        }
        assert_eq!(explained("error[E0308]: mismatched types"), "");
    }

    #[test]
    fn a_failing_command_shows_the_end_of_its_output() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; exit 3"]);
        let error = run("testing", &mut command, |_| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("testing: it ended with exit status: 3"),
            "{error}"
        );
        assert!(error.contains("one") && error.contains("two"), "{error}");
    }

    #[test]
    fn a_missing_command_is_named() {
        let error = run("testing", &mut Command::new("no-such-program-here"), |_| ()).unwrap_err();
        assert!(error.to_string().contains("no-such-program-here"));
    }
}
