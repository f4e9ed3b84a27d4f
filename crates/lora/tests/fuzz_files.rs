//! Damaged and hostile adapter files: no panic, little memory, nothing touched outside.
//!
//! Real files are mutated at random, from a fixed seed. Memory is counted by the allocator of
//! this test program, for the thread that reads.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lora::peft::{AdapterConfig, AdapterFiles, AdapterKind, ReadOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const CONFIGS: usize = 100_000;
const WEIGHTS: usize = 60_000;
const FOLDERS: usize = 600;

/// A call may hold this many bytes for each byte of its input: the parsed form of JSON is larger
/// than its text.
const PER_BYTE: usize = 100;
/// And this many besides: error messages, and the patterns of the fixtures, compiled.
const BESIDES: usize = 1 << 20;

struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn count(change: isize, one: usize) {
    // Fails only while the thread ends, when nothing is counted any more.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(one)));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize, layout.size());
        // SAFETY: the caller's promise about the layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize, layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize), 0);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both blocks may be there for a moment.
        count(size as isize, size);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        count(-(layout.size() as isize), 0);
        moved
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What one call held at most, beyond what was there before it.
#[derive(Clone, Copy, Default)]
struct Memory {
    peak: usize,
    largest: usize,
}

fn measured<T>(call: impl FnOnce() -> T) -> (T, Memory) {
    let before = LIVE.get();
    PEAK.set(before);
    LARGEST.set(0);
    let value = call();
    let memory = Memory {
        peak: usize::try_from(PEAK.get() - before).unwrap_or(0),
        largest: LARGEST.get(),
    };
    (value, memory)
}

#[derive(Default)]
struct Tally {
    accepted: usize,
    refused: usize,
    peak: usize,
    per_byte: f64,
}

impl Tally {
    /// Runs one reading; a panic, too much memory or an empty message fail the test.
    fn run<T>(
        &mut self,
        what: &str,
        number: usize,
        input: &[&[u8]],
        read: impl FnOnce() -> lora::Result<T>,
    ) -> Option<T> {
        let shown = || {
            let text = input.iter().map(|part| part.escape_ascii().to_string());
            let text: Vec<String> = text.collect();
            format!("{what} {number}: {}", text.join("  ///  "))
        };
        let (result, memory) = measured(|| catch_unwind(AssertUnwindSafe(read)));
        let result = result.unwrap_or_else(|_| panic!("panicked: {}", shown()));
        let bytes: usize = input.iter().map(|part| part.len()).sum();
        let limit = PER_BYTE * bytes + BESIDES;
        assert!(
            memory.peak <= limit,
            "{} bytes for {bytes}: {}",
            memory.peak,
            shown()
        );
        assert!(
            memory.largest <= limit,
            "{} bytes at once: {}",
            memory.largest,
            shown()
        );
        self.peak = self.peak.max(memory.peak);
        if bytes > 1000 {
            self.per_byte = self.per_byte.max(memory.peak as f64 / bytes as f64);
        }
        match result {
            Ok(value) => {
                self.accepted += 1;
                Some(value)
            }
            Err(error) => {
                self.refused += 1;
                let message = error.to_string();
                assert!(
                    message.len() > 10 && message.len() < 4000,
                    "{message:?}: {}",
                    shown()
                );
                None
            }
        }
    }

    fn report(&self, what: &str) {
        println!(
            "{what}: {} accepted, {} refused; at most {} bytes held, {:.1} for each byte read",
            self.accepted, self.refused, self.peak, self.per_byte
        );
        let all = self.accepted + self.refused;
        assert!(
            self.accepted * 20 > all && self.refused * 20 > all,
            "{what}: not worth much"
        );
    }
}

struct Adapter {
    config: Vec<u8>,
    weights: Vec<u8>,
}

fn fixtures() -> Vec<Adapter> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft");
    let (mut found, mut open) = (Vec::new(), vec![root]);
    while let Some(folder) = open.pop() {
        let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        open.extend(paths.iter().filter(|path| path.is_dir()).cloned());
        let read = |name| fs::read(folder.join(name));
        let files = (
            read("adapter_config.json"),
            read("adapter_model.safetensors"),
        );
        if let (Ok(config), Ok(weights)) = files {
            found.push(Adapter { config, weights });
        }
    }
    assert!(found.len() > 50, "{} fixtures", found.len());
    found
}

fn pick<'a, T>(rng: &mut ChaCha8Rng, items: &'a [T]) -> &'a T {
    &items[rng.random_range(0..items.len())]
}

const TOKENS: &[&str] = &[
    "null",
    "true",
    "false",
    "[",
    "]",
    "{",
    "}",
    "\"",
    ",",
    ":",
    "\\",
    "\\u0000",
    "\\ud800",
    "0",
    "-1",
    "1e999",
    "-1e999",
    "NaN",
    "18446744073709551615",
    "18446744073709551616",
    "0.1",
    "1e-400",
    "\"all-linear\"",
    "\"(\"",
    "\"(a|a)*b\"",
    "\"(a{99}){99}\"",
    "\"\\\\p{L}{50}\"",
    "[1,2]",
    "{\"a\":1}",
    "{\"(\":1}",
    "\"../../x\"",
    "\u{feff}",
    "\0",
    "é",
    "/**/",
    "__metadata__",
    ".default",
    "lora_A",
    "base_model.model.",
    "lora_diag",
    "..",
    " ",
];

/// Changes bytes without knowing what they mean.
fn mutate(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, other: &[u8]) {
    let len = bytes.len();
    let at = rng.random_range(0..=len);
    let span = rng.random_range(0..=(len - at).min(40));
    match rng.random_range(0..10) {
        0 if at < len => bytes[at] ^= 1 << rng.random_range(0..8),
        1 if at < len => bytes[at] = rng.random(),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..at + span)),
        4 => {
            let from = rng.random_range(0..=other.len());
            let to = rng.random_range(from..=other.len().min(from + 200));
            drop(bytes.splice(at..at + span, other[from..to].iter().copied()));
        }
        5 => {
            let again = bytes[at..at + span].repeat(rng.random_range(1..4));
            drop(bytes.splice(at..at, again));
        }
        6 => {
            // A number grows.
            if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                let grown = vec![bytes[at + digit]; rng.random_range(1..25)];
                drop(bytes.splice(at + digit..at + digit, grown));
            }
        }
        7 => {
            let depth = rng.random_range(1..400);
            let open = *pick(rng, &[&b"["[..], b"{\"a\":", b"(", b"[["]);
            drop(bytes.splice(at..at, open.repeat(depth)));
        }
        _ => drop(bytes.splice(at..at + span.min(8), pick(rng, TOKENS).bytes())),
    }
}

fn value(rng: &mut ChaCha8Rng, depth: usize) -> Value {
    match rng.random_range(0..if depth == 0 { 7 } else { 9 }) {
        0 => Value::Null,
        1 => Value::Bool(rng.random()),
        2 => json!(rng.random_range(-2..20)),
        3 => json!(pick(
            rng,
            &[
                0.5,
                -0.0,
                1e300,
                1.5e-300,
                2.0,
                1e19,
                11.313_708_498_984_761
            ]
        )),
        4 => json!(rng.random::<u64>() >> rng.random_range(0..64)),
        5 => json!(pick(rng, TOKENS)),
        6 => json!(pick(
            rng,
            &[
                "q_proj",
                ".*",
                "gaussian",
                "eva",
                "lora_only",
                "none",
                "",
                "h"
            ]
        )),
        7 => (0..rng.random_range(0..4))
            .map(|_| value(rng, depth - 1))
            .collect(),
        _ => {
            let item = |_| {
                (
                    pick(rng, &["q_proj", "proj", "(", "a|b"]).to_string(),
                    value(rng, 0),
                )
            };
            Value::Object((0..2).map(item).collect())
        }
    }
}

/// Changes the value of a key, or adds one.
fn mutate_json(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, donors: &[Adapter]) {
    let Ok(Value::Object(mut map)) = serde_json::from_slice(bytes) else {
        return;
    };
    let donor = serde_json::from_slice::<Value>(&pick(rng, donors).config).unwrap();
    let donor: Vec<(&String, &Value)> = donor.as_object().unwrap().iter().collect();
    let (key, theirs) = *pick(rng, &donor);
    match rng.random_range(0..5) {
        0 => drop(map.insert(key.clone(), theirs.clone())),
        1 => drop(map.remove(key)),
        2 => drop(map.insert(format!("{key}_"), value(rng, 2))),
        _ => drop(map.insert(key.clone(), value(rng, 2))),
    }
    *bytes = serde_json::to_vec(&map).unwrap();
}

/// Changes what the header says and keeps the file well-formed otherwise.
fn mutate_header(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>) {
    let Some(len) = bytes
        .first_chunk::<8>()
        .map(|n| u64::from_le_bytes(*n) as usize)
    else {
        return;
    };
    let Some(Ok(Value::Object(map))) = bytes.get(8..8 + len).map(serde_json::from_slice) else {
        return;
    };
    let data = bytes[8 + len..].to_vec();
    let mut entries: Vec<(String, Value)> = map.into_iter().collect();
    let at = rng.random_range(0..entries.len());
    let (name, info) = &mut entries[at];
    match rng.random_range(0..9) {
        0 => {
            let dtypes = [
                "F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F4", "F8_E4M3", "Q",
            ];
            info["dtype"] = json!(pick(rng, &dtypes));
        }
        1 => info["shape"] = value(rng, 2),
        2 => {
            // Another shape for as many numbers.
            if let Some(shape) = info.get("shape").and_then(Value::as_array) {
                let count: u64 = shape.iter().filter_map(Value::as_u64).product();
                let shapes = [
                    json!([count]),
                    json!([1, count]),
                    json!([count, 1]),
                    json!([count, 1, 1]),
                ];
                info["shape"] = pick(rng, &shapes).clone();
            }
        }
        3 => info["shape"] = json!([rng.random::<u64>(), rng.random::<u64>(), 0]),
        4 => info["shape"] = json!(vec![1; rng.random_range(0..300)]),
        5 => {
            let cut = rng.random_range(0..=name.len());
            if name.is_char_boundary(cut) {
                name.insert_str(cut, pick::<&str>(rng, TOKENS));
            }
        }
        6 => *name = name.replace(".weight", ".default.weight"),
        7 => *name = name.replace("base_model.model.", ""),
        _ => info["data_offsets"] = json!([rng.random_range(0..400), rng.random_range(0..400)]),
    }
    if rng.random_range(0..20) == 0 {
        let copy = entries[at].clone();
        entries.push(copy);
    }
    // By hand, so that a name may come twice.
    let entries: Vec<String> = entries
        .iter()
        .map(|(name, info)| format!("{}:{info}", json!(name)))
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let claimed = match rng.random_range(0..40) {
        0 => rng.random(),
        1 => rng.random_range(0..1000),
        2 => data.len() as u64,
        _ => header.len() as u64,
    };
    *bytes = [&claimed.to_le_bytes()[..], header.as_bytes(), &data].concat();
}

/// The two configurations, but for the last bit of a number that is not whole.
fn assert_same_kind(a: &AdapterKind, b: &AdapterKind) {
    let mut a = a.clone();
    let close = |x: f64, y: f64| {
        if (x - y).abs() <= 1e-15 * x.abs() {
            y
        } else {
            x
        }
    };
    match (&mut a, b) {
        (AdapterKind::Lora(a), AdapterKind::Lora(b)) => {
            a.lora_alpha = close(a.lora_alpha, b.lora_alpha);
            a.lora_dropout = close(a.lora_dropout, b.lora_dropout);
            for ((_, x), (_, y)) in a.alpha_pattern.iter_mut().zip(&b.alpha_pattern) {
                *x = close(*x, *y);
            }
        }
        (AdapterKind::Vera(a), AdapterKind::Vera(b)) => {
            a.d_initial = close(a.d_initial, b.d_initial);
            a.vera_dropout = close(a.vera_dropout, b.vera_dropout);
        }
        _ => {}
    }
    assert_eq!(&a, b);
}

#[test]
fn mutated_configurations() {
    let mut rng = ChaCha8Rng::seed_from_u64(0x5eed);
    let fixtures = fixtures();
    let mut tally = Tally::default();
    for number in 0..CONFIGS {
        let mut bytes = pick(&mut rng, &fixtures).config.clone();
        if number % 2 == 0 {
            for _ in 0..rng.random_range(1..4) {
                mutate_json(&mut rng, &mut bytes, &fixtures);
            }
        } else {
            for _ in 0..rng.random_range(1..3) {
                let other = &pick(&mut rng, &fixtures).config;
                mutate(&mut rng, &mut bytes, other);
            }
        }
        let read = || AdapterConfig::from_json(&bytes);
        if let Some(config) = tally.run("configuration", number, &[&bytes], read) {
            let text = config.to_json().unwrap_or_else(|error| {
                panic!("read, not written: {error}: {}", bytes.escape_ascii());
            });
            let again = AdapterConfig::from_json(text.as_bytes()).unwrap();
            assert_same_kind(&again.kind, &config.kind);
        }
    }
    tally.report("configurations");
}

#[test]
fn mutated_weights() {
    let mut rng = ChaCha8Rng::seed_from_u64(0xf11e);
    let fixtures = fixtures();
    let options = ReadOptions {
        allow_non_finite: true,
        ..ReadOptions::default()
    };
    let mut tally = Tally::default();
    for number in 0..WEIGHTS {
        let source = pick(&mut rng, &fixtures);
        let (mut config, mut bytes) = (source.config.clone(), source.weights.clone());
        match number % 4 {
            0 => mutate_header(&mut rng, &mut bytes),
            1 => {
                let other = &pick(&mut rng, &fixtures).weights;
                mutate(&mut rng, &mut bytes, other);
            }
            2 => {
                // The numbers only.
                let from = bytes.len().saturating_sub(60);
                for _ in 0..4 {
                    let at = rng.random_range(from..bytes.len());
                    bytes[at] = rng.random();
                }
            }
            _ => {
                mutate_header(&mut rng, &mut bytes);
                mutate_json(&mut rng, &mut config, &fixtures);
            }
        }
        let options = if number % 3 == 0 {
            ReadOptions::default()
        } else {
            options.clone()
        };
        let read = || AdapterFiles::from_bytes(&config, &bytes, &options, &Device::Cpu);
        if let Some(files) = tally.run("weights", number, &[&config, &bytes], read) {
            assert!(files.modules().is_ok());
            let held: usize = files
                .tensors
                .values()
                .map(|t| t.elem_count() * t.dtype().size_in_bytes())
                .sum();
            assert!(held <= 2 * bytes.len());
            for key in files.tensors.keys() {
                assert!(key.starts_with("base_model."), "{key}");
            }
        }
    }
    tally.report("weights");
}

/// Everything below a folder: names, and what is in the files.
fn contents(root: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let (mut found, mut open) = (BTreeMap::new(), vec![root.to_path_buf()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let is_dir = fs::symlink_metadata(&path).unwrap().is_dir();
            found.insert(
                path.clone(),
                if is_dir { None } else { fs::read(&path).ok() },
            );
            if is_dir {
                open.push(path);
            }
        }
    }
    found
}

#[test]
fn mutated_folders() {
    let mut rng = ChaCha8Rng::seed_from_u64(0xd15c);
    let fixtures = fixtures();
    let mut tally = Tally::default();
    let names = [
        "fr",
        "default",
        "..",
        "../outside",
        "/",
        "/etc",
        "a/b",
        "",
        ".",
        "fr\0",
        "..\\outside",
        "adapter_config.json",
        "%2e%2e",
        "fr/../../outside",
        "fr",
    ];
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    for number in 0..FOLDERS {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let whole = pick(&mut rng, &fixtures);
        fs::write(outside.join(files[0]), &whole.config).unwrap();
        fs::write(outside.join(files[1]), &whole.weights).unwrap();

        let folder = root.path().join("adapter");
        let inner = if rng.random() {
            folder.clone()
        } else {
            folder.join("fr")
        };
        fs::create_dir_all(&inner).unwrap();
        let source = pick(&mut rng, &fixtures);
        let mut parts = [source.config.clone(), source.weights.clone()];
        let one = rng.random_range(0..3);
        for (at, bytes) in parts.iter_mut().enumerate() {
            let other = pick(&mut rng, &fixtures);
            let other = if at == 0 {
                &other.config
            } else {
                &other.weights
            };
            if at == one {
                mutate(&mut rng, bytes, other);
            }
            match rng.random_range(0..30) {
                0 => {}
                1 => fs::create_dir(inner.join(files[at])).unwrap(),
                2 => {
                    fs::write(inner.join(".adapter_config.0123456789abcdef.json"), &*bytes).unwrap()
                }
                _ => fs::write(inner.join(files[at]), &*bytes).unwrap(),
            }
        }
        let before = contents(root.path());
        let options = ReadOptions {
            adapter: rng
                .random::<bool>()
                .then(|| pick(&mut rng, &names).to_string()),
            allow_non_finite: rng.random(),
        };
        let read = || AdapterFiles::read_with(&folder, &options, &Device::Cpu);
        let read = tally.run("folder", number, &[&parts[0], &parts[1]], read);
        assert_eq!(contents(root.path()), before, "reading changed something");

        // Writing touches its own folder only, and there its two files.
        if let Some(adapter) = read {
            let name = pick(&mut rng, &names);
            let target = root.path().join("adapter/written");
            let written = adapter.write_named(&target, name).is_ok();
            let mut after = contents(root.path());
            after.retain(|path, _| !path.starts_with(&target));
            assert_eq!(after, before, "writing {name:?} changed something outside");
            if written {
                let again = ReadOptions {
                    adapter: Some((*name).to_string()),
                    ..options.clone()
                };
                let again = AdapterFiles::read_with(&target, &again, &Device::Cpu).unwrap();
                assert_eq!(again.tensors.len(), adapter.tensors.len());
            }
        }
    }
    tally.report("folders");
}

/// A safetensors file with this header and no numbers.
fn with_header(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

#[test]
fn large_inputs() {
    const MANY: usize = 100_000;
    let mut worst = 0.0f64;
    let mut bounded = |what: &str, bytes: &[u8], read: &dyn Fn(&[u8]) -> bool| {
        let (accepted, memory) = measured(|| read(bytes));
        let ratio = memory.peak as f64 / bytes.len() as f64;
        assert!(!accepted, "{what}");
        assert!(
            memory.peak <= PER_BYTE * bytes.len() + BESIDES,
            "{what}: {ratio:.1}"
        );
        println!(
            "{what}: {ratio:.1} bytes held for each of {} bytes",
            bytes.len()
        );
        worst = worst.max(ratio);
    };

    let tensors = |count: usize, shape: &str| -> String {
        let one = |i| {
            format!(
                r#""x{i}.lora_A.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}"#
            )
        };
        format!("{{{}}}", (0..count).map(one).collect::<Vec<_>>().join(","))
    };
    let read = |bytes: &[u8]| {
        let config = br#"{"peft_type": "LORA"}"#;
        AdapterFiles::from_bytes(config, bytes, &ReadOptions::default(), &Device::Cpu).is_ok()
    };
    for (what, header) in [
        (
            "a shape of zeros",
            tensors(1, &format!("[{}0]", "0,".repeat(MANY))),
        ),
        (
            "a shape of ones",
            tensors(1, &format!("[{}0]", "1,".repeat(MANY))),
        ),
        ("many tensors", tensors(MANY / 10, "[0]")),
        (
            "a long name",
            tensors(1, "[0]").replacen('x', &"x".repeat(MANY), 1),
        ),
        (
            "a long path",
            tensors(1, "[0]").replacen('x', &"x.".repeat(MANY), 1),
        ),
        (
            "one key again and again",
            format!("{{{}\"a\":1}}", "\"a\":[[]],".repeat(MANY)),
        ),
        (
            "much metadata",
            format!(
                "{{\"__metadata__\":{{{}\"z\":\"\"}}}}",
                "\"a\":\"\",".repeat(MANY)
            ),
        ),
        ("deep lists", "[".repeat(MANY)),
        ("deep objects", "{\"a\":".repeat(MANY)),
        ("blanks", " ".repeat(MANY)),
    ] {
        bounded(what, &with_header(&header), &read);
    }

    let read = |bytes: &[u8]| AdapterConfig::from_json(bytes).is_ok();
    let keys = (0..MANY).map(|i| format!("\"{i}\":1,")).collect::<String>();
    for (what, fields) in [
        ("many numbers", format!("\"a\": [{}0]", "0,".repeat(MANY))),
        ("many lists", format!("\"a\": [{}[]]", "[],".repeat(MANY))),
        (
            "many layers",
            format!("\"layers_to_transform\": [{}-1]", "0,".repeat(MANY)),
        ),
        (
            "many targets",
            format!("\"target_modules\": [{}0]", "\"\",".repeat(MANY)),
        ),
        (
            "many ranks",
            format!("\"rank_pattern\": {{{keys}\"z\": 0}}"),
        ),
        ("many keys", format!("{keys}\"a\": 0")),
        ("a long text", format!("\"a\": \"{}\"", "x".repeat(MANY))),
        ("a long key", format!("\"{}\": 1", "x".repeat(MANY))),
        ("a long number", format!("\"r\": {}", "9".repeat(MANY))),
    ] {
        let text = format!("{{\"peft_type\": \"LORA\", {fields}}}");
        bounded(what, text.as_bytes(), &read);
    }
    println!("at most {worst:.1}");
}

#[test]
fn numbers_of_ordinary_size() {
    let config = br#"{"peft_type": "LORA", "r": 64}"#;
    for (dtype, most) in [
        (DType::F32, 1.1),
        (DType::F64, 1.1),
        (DType::F16, 2.2),
        (DType::BF16, 2.2),
    ] {
        let tensors: BTreeMap<String, Tensor> = (0..20)
            .flat_map(|i| {
                [
                    (format!("l.{i}.lora_A.weight"), (64, 512)),
                    (format!("l.{i}.lora_B.weight"), (512, 64)),
                ]
            })
            .map(|(key, shape)| (key, Tensor::ones(shape, dtype, &Device::Cpu).unwrap()))
            .collect();
        let bytes = safetensors::serialize(tensors.iter(), None).unwrap();
        let (read, memory) = measured(|| {
            AdapterFiles::from_bytes(config, &bytes, &ReadOptions::default(), &Device::Cpu)
        });
        assert_eq!(read.unwrap().tensors.len(), 40);
        let ratio = memory.peak as f64 / bytes.len() as f64;
        println!(
            "{dtype:?}: {ratio:.2} bytes held for each of {} bytes",
            bytes.len()
        );
        assert!(ratio < most, "{dtype:?}: {ratio}");
    }
}

/// A pattern may be built to take very long or very much memory; both have an end.
#[test]
fn hostile_patterns() {
    let fixtures = fixtures();
    let source = fixtures.iter().find(|adapter| {
        let config = AdapterConfig::from_json(&adapter.config);
        config.is_ok_and(|config| config.lora().is_some_and(|lora| lora.r == 2))
    });
    let source = source.unwrap();
    let long = "a".repeat(3000);
    for pattern in [
        "((a{99}){99}){99}",
        "(\\p{L}{99}){99}",
        "(a|a)*b",
        "(?=(.*)*x)y",
        "(.*)*\\1z",
        "(x+x+)+y",
        &format!("{}{}", "(".repeat(5000), ")".repeat(5000)),
        &"(".repeat(5000),
        &long,
        "(?<n>a)\\k<n>",
        "[",
        "",
    ] {
        let mut config: Value = serde_json::from_slice(&source.config).unwrap();
        config["rank_pattern"] = json!({pattern: 2});
        let config = serde_json::to_vec(&config).unwrap();
        let start = std::time::Instant::now();
        let (read, memory) = measured(|| {
            let options = ReadOptions::default();
            AdapterFiles::from_bytes(&config, &source.weights, &options, &Device::Cpu)
        });
        let shown: String = pattern.chars().take(20).collect();
        println!(
            "{shown}: {} bytes, {:?}, {}",
            memory.peak,
            start.elapsed(),
            read.map_or_else(
                |error| error.to_string().chars().take(150).collect::<String>(),
                |_| "read".into()
            )
        );
        assert!(memory.peak < 64 << 20, "{shown}: {} bytes", memory.peak);
        assert!(
            start.elapsed().as_secs() < 20,
            "{shown}: {:?}",
            start.elapsed()
        );
    }
}
