//! The Vision Transformer that knows clothes.

use crate::fashion::{DEVICE, Run, SEED};
use crate::{Result, store};
use course::candle_core::Tensor;
use course::data::{FASHION_NAMES, Images};
use course::models::{ViT, ViTConfig};
use course::rng::{Rng, rng};
use serde_json::{Map, Value, json};

/// How far an image is moved at most, in pixels.
const SHIFT: usize = 2;

/// `fashion-vit`: a small Vision Transformer that learns Fashion-MNIST.
pub fn base() -> Result<()> {
    let config = ViTConfig::fashion();
    let mut rng = rng(SEED);
    let weights = config.random_weights(&mut rng, &DEVICE)?;
    let builder = store::builder(weights);
    let vit = ViT::new(&config, &builder)?;
    let run = Run {
        name: "fashion-vit",
        about: "A small Vision Transformer trained on 12,000 images of Fashion-MNIST, moved and \
                mirrored",
        // Thirty-two times through the images, which never look quite the same.
        steps: 6000,
        rate: 2e-3,
    };
    run.train((&vit, &builder), &for_transformers(&config)?, |batch| {
        varied(&batch, &mut rng)
    })
}

/// Each image moved by up to [`SHIFT`] pixels in both directions, and every second one mirrored.
/// What comes in from outside is black, as the background is.
fn varied(batch: &Images, rng: &mut Rng) -> course::Result<Images> {
    let (_, _, height, width) = batch.images.dims4()?;
    let light: Vec<f32> = batch.images.flatten_all()?.to_vec1()?;
    let mut varied = vec![0f32; light.len()];
    let pixels = height * width;
    let images = light.chunks_exact(pixels);
    for (from, to) in images.zip(varied.chunks_exact_mut(pixels)) {
        let (down, right) = (rng.below(2 * SHIFT + 1)?, rng.below(2 * SHIFT + 1)?);
        let mirrored = rng.below(2)? == 1;
        for (place, pixel) in to.iter_mut().enumerate() {
            let (y, x) = (place / width, place % width);
            let x = if mirrored { width - 1 - x } else { x };
            // Where it lies in an image with a frame of SHIFT pixels around it.
            let (y, x) = (y + down, x + right);
            let inside = |at: usize, size: usize| (SHIFT..SHIFT + size).contains(&at);
            if inside(y, height) && inside(x, width) {
                *pixel = from[(y - SHIFT) * width + x - SHIFT];
            }
        }
    }
    Ok(Images {
        images: Tensor::from_vec(varied, batch.images.shape(), &DEVICE)?,
        labels: batch.labels.clone(),
    })
}

/// As transformers reads it.
fn for_transformers(config: &ViTConfig) -> Result<Value> {
    let mut json = serde_json::to_value(config)?;
    let names = || FASHION_NAMES.iter().enumerate();
    let id2label: Map<_, _> = names()
        .map(|(id, name)| (id.to_string(), json!(name)))
        .collect();
    let label2id: Map<_, _> = names()
        .map(|(id, name)| (name.to_string(), json!(id)))
        .collect();
    for (key, value) in [
        ("architectures", json!(["ViTForImageClassification"])),
        ("model_type", json!("vit")),
        ("id2label", id2label.into()),
        ("label2id", label2id.into()),
        ("torch_dtype", json!("float16")),
    ] {
        json[key] = value;
    }
    Ok(json)
}
