//! A linear layer that turns a text's or picture's vector into classes.

use std::path::Path;

use candle_core::{D, DType, Device, Tensor, Var};
use lora::ops;

use crate::{Error, Result};

/// Logits = x Wᵀ + b, with a W and b that train.
///
/// Both start at 0, where every class is equally likely: on vectors that do not change, the loss
/// has one valley, so there is nothing to draw.
///
/// ```
/// use course::models::Classifier;
/// use course::prelude::*;
///
/// let x = Tensor::new(&[[1f32, 0.], [0., 1.], [0.9, 0.2]], &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 1, 0], &Device::Cpu)?;
/// let head = Classifier::new(2, 2, &Device::Cpu)?;
/// let batches = std::iter::repeat_with(|| Ok(()));
/// Training::new("head", 50)
///     .quiet()
///     .run((head.parameters(), 0.1), batches, |()| head.loss(&x, &labels))?;
/// assert_eq!(head.accuracy(&x, &labels)?, 1.0);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Classifier {
    weight: Var,
    bias: Var,
}

const WEIGHT: &str = "classifier.weight";
const BIAS: &str = "classifier.bias";

impl Classifier {
    /// Of vectors with `features` numbers into `classes`.
    ///
    /// # Errors
    ///
    /// No feature or no class.
    pub fn new(features: usize, classes: usize, device: &Device) -> Result<Self> {
        if features == 0 || classes == 0 {
            return Err(refused(format!(
                "features = {features} and classes = {classes} must be at least 1"
            )));
        }
        Ok(Self {
            weight: Var::zeros((classes, features), DType::F32, device)?,
            bias: Var::zeros(classes, DType::F32, device)?,
        })
    }

    /// W and b under the names that transformers gives them.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Var)> {
        vec![
            (BIAS.to_string(), self.bias.clone()),
            (WEIGHT.to_string(), self.weight.clone()),
        ]
    }

    /// A classifier with the same numbers that trains apart from this one.
    ///
    /// # Errors
    ///
    /// What candle reports when it copies.
    ///
    /// ```
    /// use course::models::Classifier;
    /// use course::prelude::*;
    ///
    /// let head = Classifier::new(2, 2, &Device::Cpu)?;
    /// let other = head.copy()?;
    /// other.parameters()[0].1.set(&Tensor::new(&[1f32, 0.], &Device::Cpu)?)?;
    /// let x = Tensor::zeros((1, 2), DType::F32, &Device::Cpu)?;
    /// assert_eq!(head.forward(&x)?.to_vec2::<f32>()?, [[0., 0.]]);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn copy(&self) -> Result<Self> {
        Ok(Self {
            weight: Var::from_tensor(&self.weight.copy()?)?,
            bias: Var::from_tensor(&self.bias.copy()?)?,
        })
    }

    /// The logits of the classes.
    ///
    /// # Shapes
    ///
    /// x [n, features] → [n, classes].
    ///
    /// # Errors
    ///
    /// Vectors of another size.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::linear(x, &self.weight, Some(&self.bias))?)
    }

    /// The mean cross entropy of the right classes, in nats.
    ///
    /// # Shapes
    ///
    /// x [n, features], `labels` (n) of u32; → a number.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward); a label that is no class.
    pub fn loss(&self, x: &Tensor, labels: &Tensor) -> Result<Tensor> {
        Ok(ops::cross_entropy(&self.forward(x)?, labels)?)
    }

    /// The likeliest class of each vector.
    ///
    /// # Shapes
    ///
    /// x [n, features] → n labels.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn predict(&self, x: &Tensor) -> Result<Vec<u32>> {
        Ok(self.forward(x)?.argmax(D::Minus1)?.to_vec1()?)
    }

    /// The share of vectors whose likeliest class is the right one, from 0 to 1.
    ///
    /// # Shapes
    ///
    /// x [n, features], `labels` (n) of u32.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward); no vector at all, or another number of labels.
    pub fn accuracy(&self, x: &Tensor, labels: &Tensor) -> Result<f64> {
        let (labels, predicted) = (labels.to_vec1::<u32>()?, self.predict(x)?);
        if labels.is_empty() || labels.len() != predicted.len() {
            return Err(refused(format!(
                "{} labels for {} vectors; give each vector one, and at least one vector",
                labels.len(),
                predicted.len()
            )));
        }
        let right = labels.iter().zip(&predicted).filter(|(a, b)| a == b);
        Ok(right.count() as f64 / labels.len() as f64)
    }

    /// Writes W and b to a safetensors file, for instance beside an adapter's.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn save(&self, file: impl AsRef<Path>) -> Result<()> {
        let tensors = self.parameters().into_iter();
        let tensors = tensors.map(|(name, var)| (name, var.as_tensor().clone()));
        let tensors: std::collections::HashMap<_, _> = tensors.collect();
        Ok(candle_core::safetensors::save(&tensors, file)?)
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or holds no classifier.
    ///
    /// ```
    /// use course::models::Classifier;
    /// use course::prelude::*;
    ///
    /// let file = std::env::temp_dir().join(format!("head-{}.safetensors", std::process::id()));
    /// Classifier::new(3, 2, &Device::Cpu)?.save(&file)?;
    /// let head = Classifier::open(&file, &Device::Cpu);
    /// std::fs::remove_file(&file).ok();
    /// assert_eq!(head?.parameters()[1].1.dims(), [2, 3]);
    /// assert!(Classifier::open("no/such/file", &Device::Cpu).is_err());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn open(file: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = file.as_ref();
        let bytes = std::fs::read(path).map_err(Error::file(path))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, device)?;
        let (weight, bias) = (tensors.get(WEIGHT), tensors.get(BIAS));
        let (Some(weight), Some(bias)) = (weight, bias) else {
            let path = path.display();
            return Err(refused(format!("{path} has no {WEIGHT} or no {BIAS}")));
        };
        if weight.rank() != 2 || bias.dims() != &weight.dims()[..1] {
            let (path, w, b) = (path.display(), weight.dims(), bias.dims());
            return Err(refused(format!(
                "{path} has a {WEIGHT} of {w:?} and a {BIAS} of {b:?}, which do not fit"
            )));
        }
        Ok(Self {
            weight: Var::from_tensor(&weight.to_dtype(DType::F32)?)?,
            bias: Var::from_tensor(&bias.to_dtype(DType::F32)?)?,
        })
    }
}

fn refused(problem: String) -> Error {
    Error::Model {
        model: "Classifier",
        problem,
    }
}
