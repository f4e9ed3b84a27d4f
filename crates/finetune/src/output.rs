//! The folder of a run: its settings, its checkpoints, and in the end its adapter.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor, Var, safetensors};
use lora::LoraModel;
use lora::optim::LoraOptimizer;
use lora::peft::AdapterFiles;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::arguments::Settings;

/// The name under which a run's adapter goes.
pub const ADAPTER: &str = lora::DEFAULT_ADAPTER;

const SETTINGS: &str = "finetune.json";
const PARTIAL_SETTINGS: &str = "finetune.partial";
const LOCK: &str = ".lock";
const STATE: &str = "trainer_state.json";
const TENSORS: &str = "trainer_state.safetensors";
/// Before the names of the optimiser's tensors, to keep them apart from the parameters.
const OPTIMIZER: &str = "optimizer.";
/// So many checkpoints stay.
const KEPT: usize = 2;

/// What has been, beside the tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// The loss of every step.
    pub losses: Vec<f64>,
    /// The held-out loss before the first step.
    pub held_out_before: Option<f64>,
    /// Seconds of training.
    pub seconds: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
}

/// A folder that holds this run and no other, for this process alone.
#[derive(Debug)]
pub struct Output {
    folder: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
}

/// What `finetune.json` holds.
#[derive(Serialize, Deserialize)]
struct Run {
    settings: Value,
    /// Once the run is over.
    result: Option<Value>,
}

impl Output {
    /// Makes the folder, or takes that of the same run.
    ///
    /// # Errors
    ///
    /// A folder with something else in it, or with a run of other settings, with what differs.
    pub fn open(folder: &Path, settings: &Settings) -> Result<Self> {
        let file = folder.join(SETTINGS);
        let ours = serde_json::to_value(settings)?;
        let named = || folder.display().to_string();
        let known = [LOCK, PARTIAL_SETTINGS];
        if !file.is_file() && folder.exists() {
            let entries = fs::read_dir(folder).with_context(named)?;
            for entry in entries {
                let name = entry?.file_name();
                ensure!(
                    known.iter().any(|known| name == *known),
                    "{} is not empty and holds no run; give a new folder as --out",
                    folder.display()
                );
            }
        }
        fs::create_dir_all(folder).with_context(named)?;
        let lock = File::create(folder.join(LOCK)).with_context(named)?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => {
                bail!("{}: another process works on this run", folder.display())
            }
            // A file system without locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        if file.is_file() {
            let run = read_run(&file)?;
            let differing = differing(&run.settings, &ours);
            ensure!(
                differing.is_empty(),
                "{} holds a run with other settings ({}); give another --out, or the same settings",
                folder.display(),
                differing.join(", ")
            );
        } else {
            let run = Run {
                settings: ours,
                result: None,
            };
            write_atomic(&file, &pretty(&run)?)?;
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            _lock: lock,
        })
    }

    /// Whether the run is over.
    pub fn is_finished(&self) -> Result<bool> {
        Ok(read_run(&self.folder.join(SETTINGS))?.result.is_some())
    }

    /// The checkpoints by their steps, newest last.
    fn checkpoints(&self) -> Result<Vec<(usize, PathBuf)>> {
        let entries =
            fs::read_dir(&self.folder).with_context(|| self.folder.display().to_string())?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let step = name
                .to_str()
                .and_then(|name| name.strip_prefix("checkpoint-"));
            if let Some(step) = step.and_then(|step| step.parse().ok()) {
                found.push((step, entry.path()));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Puts the newest checkpoint's numbers into the model and the optimiser.
    ///
    /// None where there is no checkpoint yet.
    pub fn resume(
        &self,
        model: &LoraModel,
        optimizer: &mut LoraOptimizer,
    ) -> Result<Option<History>> {
        let Some((step, folder)) = self.checkpoints()?.pop() else {
            return Ok(None);
        };
        let told = || {
            format!(
                "{}: this checkpoint cannot be read; delete it to go on from the one before",
                folder.display()
            )
        };
        let read = || -> Result<(History, HashMap<String, Tensor>)> {
            let history: History = serde_json::from_slice(&fs::read(folder.join(STATE))?)?;
            ensure!(
                history.losses.len() == step,
                "it holds {} losses",
                history.losses.len()
            );
            let tensors = safetensors::load(folder.join(TENSORS), &Device::Cpu)?;
            Ok((history, tensors))
        };
        let (history, saved) = read().with_context(told)?;
        let (mut tensors, mut state) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in saved {
            match name.strip_prefix(OPTIMIZER) {
                Some(own) => state.insert(own.to_string(), tensor),
                None => tensors.insert(name, tensor),
            };
        }
        let taken = take(&model.trainable_parameters(), &tensors)
            .and_then(|()| Ok(optimizer.load_state_dict(&state)?));
        taken.with_context(told)?;
        Ok(Some(history))
    }

    /// Keeps what is needed to go on, and the adapter as PEFT reads it; older checkpoints but one go.
    pub fn save(
        &self,
        model: &LoraModel,
        optimizer: &LoraOptimizer,
        settings: &Settings,
        history: &History,
    ) -> Result<PathBuf> {
        let folder = self
            .folder
            .join(format!("checkpoint-{}", history.losses.len()));
        // A folder has its name only when all of it is on the disk.
        let partial = self.folder.join(".partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        let written = || -> Result<()> {
            fs::create_dir(&partial)?;
            let mut tensors: HashMap<String, Tensor> = HashMap::new();
            for (name, var) in model.trainable_parameters() {
                tensors.insert(name, var.as_tensor().clone());
            }
            for (name, tensor) in optimizer.state_dict()? {
                tensors.insert(format!("{OPTIMIZER}{name}"), tensor);
            }
            safetensors::save(&tensors, partial.join(TENSORS))?;
            fs::write(partial.join(STATE), pretty(history)?)?;
            for file in [TENSORS, STATE] {
                File::open(partial.join(file))?.sync_all()?;
            }
            adapter(model, settings)?.write(&partial)?;
            fs::rename(&partial, &folder)?;
            Ok(())
        };
        written().with_context(|| format!("{} cannot be written", folder.display()))?;
        let all = self.checkpoints()?;
        let old = all.len().saturating_sub(KEPT);
        for (_, folder) in &all[..old] {
            fs::remove_dir_all(folder)?;
        }
        Ok(folder)
    }

    /// Writes the adapter, and that the run is over.
    pub fn finish(
        &self,
        model: &LoraModel,
        settings: &Settings,
        history: &History,
        held_out_after: Option<f64>,
    ) -> Result<()> {
        adapter(model, settings)?.write(&self.folder)?;
        let run = Run {
            settings: serde_json::to_value(settings)?,
            result: Some(serde_json::json!({
                "history": history,
                "held_out_after": held_out_after,
            })),
        };
        write_atomic(&self.folder.join(SETTINGS), &pretty(&run)?)
    }
}

/// The adapter as PEFT reads it, with what it says of its base.
fn adapter(model: &LoraModel, settings: &Settings) -> Result<AdapterFiles> {
    let mut files = model.adapter_files(ADAPTER)?;
    let other = &mut files.config.other;
    other.insert(
        "base_model_name_or_path".into(),
        settings.model.clone().into(),
    );
    other.insert("task_type".into(), "CAUSAL_LM".into());
    Ok(files)
}

/// Sets parameters to the tensors of their names, all or none of them.
fn take(parameters: &[(String, Var)], tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    for (name, var) in parameters {
        match tensors.get(name) {
            Some(tensor) if tensor.dims() == var.dims() => {}
            Some(tensor) => bail!(
                "{name} is {:?} and should be {:?}",
                tensor.dims(),
                var.dims()
            ),
            None => bail!("{name} is missing"),
        }
    }
    for (name, var) in parameters {
        var.set(&tensors[name].to_device(var.device())?)?;
    }
    Ok(())
}

fn read_run(file: &Path) -> Result<Run> {
    let read = || -> Result<Run> { Ok(serde_json::from_slice(&fs::read(file)?)?) };
    read().with_context(|| {
        format!(
            "{} cannot be read; give another --out, or delete this folder to begin anew",
            file.display()
        )
    })
}

/// What two runs' settings have different, in words.
fn differing(theirs: &Value, ours: &Value) -> Vec<String> {
    let empty = serde_json::Map::new();
    let of = |value: &'_ Value| value.as_object().unwrap_or(&empty).clone();
    let (theirs, ours) = (of(theirs), of(ours));
    let keys = ours
        .keys()
        .chain(theirs.keys().filter(|key| !ours.contains_key(*key)));
    let differ = keys.filter(|key| ours.get(*key) != theirs.get(*key));
    let shown = |value: Option<&Value>| value.map_or("nothing".to_string(), Value::to_string);
    let told = differ.map(|key| {
        let (there, here) = (shown(theirs.get(key)), shown(ours.get(key)));
        format!("{key}: {there} there, {here} here")
    });
    told.collect()
}

fn pretty(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(text)
}

/// The old file or the new one, whatever happens.
fn write_atomic(file: &Path, bytes: &[u8]) -> Result<()> {
    let partial = file.with_extension("partial");
    let write = || -> std::io::Result<()> {
        let mut out = File::create(&partial)?;
        out.write_all(bytes)?;
        out.sync_all()?;
        fs::rename(&partial, file)
    };
    write().with_context(|| format!("{} cannot be written", file.display()))
}
