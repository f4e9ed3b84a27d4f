//! What a report says of the machine, the programs and the day.

use crate::home::Checkout;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// The threads that every side computes with.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Time, processor, threads and the versions of our own libraries.
pub fn described(checkout: &Checkout) -> Result<Value> {
    Ok(json!({
        "unix_time": now(),
        "cpu": cpu(),
        "threads": threads(),
        "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        "versions": {
            "candle": locked(checkout, "candle-core")?,
            "lora": locked(checkout, "lora")?,
        },
    }))
}

/// Says so where other programs compute: then figures are worth little.
pub fn warn_when_busy() {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = text
        .split(' ')
        .next()
        .and_then(|word| word.parse::<f64>().ok());
    if let Some(load) = load.filter(|load| *load > 0.5) {
        eprintln!(
            "Other programs keep {load:.1} cores of this machine busy: the figures will be off. \
             Measure on a machine at rest."
        );
    }
}

fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    if let Some((_, name)) = line.and_then(|line| line.split_once(": ")) {
        return name.to_owned();
    }
    let output = Command::new("sysctl")
        .args(["-n", "machdep.cpu.brand_string"])
        .output();
    let name = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    name.ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unknown".to_owned())
}

/// The version that Cargo.lock holds of a package.
fn locked(checkout: &Checkout, package: &str) -> Result<String> {
    let path = checkout.join("Cargo.lock");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let lock: toml::Table = text.parse()?;
    let packages = lock.get("package").and_then(toml::Value::as_array);
    packages
        .into_iter()
        .flatten()
        .find(|entry| entry.get("name").and_then(toml::Value::as_str) == Some(package))
        .and_then(|entry| entry.get("version")?.as_str().map(str::to_owned))
        .with_context(|| format!("{} does not name {package}", path.display()))
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn our_versions_come_from_the_lock_file() {
        let checkout = Checkout::holding(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert_eq!(locked(&checkout, "candle-core").unwrap(), "0.11.1");
        assert!(locked(&checkout, "no-such-package").is_err());
    }
}
