//! Every committed checkpoint is read and measured again: it must be as good as its card says,
//! on the device that `COURSE_DEVICE` names.

#![allow(clippy::unwrap_used)]

use course::data::{self, Sequences, Tokens};
use course::meta::{MetaConfig, MetaLearner, Sinusoids};
use course::models::AdapterCheckpoint;
use course::prelude::*;
use lora::quant::QuantConfig;

/// How far a held-out loss may be from the card on another machine: sums in another order.
const TOLERANCE: f64 = 1e-4;

fn language_model(name: &str, corpus: &str) {
    let checkpoint = Checkpoint::open(name).unwrap();
    let (llama, model) = checkpoint.frozen(&device().unwrap(), Llama::new).unwrap();
    assert_eq!(model.parameter_count().all, checkpoint.card().parameters);

    let text = data::text(corpus).unwrap().held_out;
    let tokenizer = checkpoint.tokenizer().unwrap();
    let ids = tokenizer.encode(&text).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(tokenizer.vocab_size(), llama.config().vocab_size);

    let windows = Tokens::new(ids)
        .windows(16, 128, &device().unwrap())
        .unwrap();
    let loss = llama.held_out_loss(&windows).unwrap();
    let want = checkpoint.card().held_out["loss"];
    assert!(
        (loss - want).abs() < TOLERANCE,
        "{name}: {loss}, not {want}"
    );
}

#[test]
fn sotu_lm_is_as_good_as_its_card_says() {
    language_model("sotu-lm", "sotu");
}

#[test]
fn sotu_lm_kjv_is_as_good_as_its_card_says() {
    language_model("sotu-lm-kjv", "kjv");
}

#[test]
fn smollm2_hamlet_is_as_good_as_its_card_says() {
    let adapter = AdapterCheckpoint::open("smollm2-hamlet").unwrap();
    let base = Pretrained::fetched("smollm2").unwrap();
    let nf4 = QuantConfig::default();
    let (llama, mut model) = base
        .quantized(&device().unwrap(), &nf4, Llama::new)
        .unwrap();
    let play = data::dialogue(40).unwrap().held_out;
    let (tokenizer, template) = (base.tokenizer().unwrap(), base.chat_template().unwrap());
    let chats = Sequences::chats(&play, &tokenizer, &template, 160, &device().unwrap()).unwrap();
    let chats = chats.in_order(8).unwrap();
    let before = llama.held_out_loss(&chats).unwrap();
    model.load_adapter(adapter.folder(), "hamlet").unwrap();
    let count = model.parameter_count().trainable;
    assert_eq!(count, adapter.card().parameters);
    let (loss, want) = (
        llama.held_out_loss(&chats).unwrap(),
        adapter.card().held_out["loss"],
    );
    assert!((loss - want).abs() < TOLERANCE, "{loss}, not {want}");
    assert!(loss < before - 1.0, "{before} before");
}

#[test]
fn fashion_cnn_is_as_good_as_its_card_says() {
    let checkpoint = Checkpoint::open("fashion-cnn").unwrap();
    let (cnn, model) = checkpoint.frozen(&device().unwrap(), Cnn::new).unwrap();
    assert_eq!(model.parameter_count().all, checkpoint.card().parameters);
    let test = data::fashion(&device().unwrap()).unwrap().test;
    let accuracy = cnn.accuracy(&test.images, &test.labels).unwrap();
    let want = checkpoint.card().held_out["accuracy"];
    // Sums in another order may turn one image of the 2,000.
    assert!((accuracy - want).abs() < 0.001, "{accuracy}, not {want}");
}

#[test]
fn fashion_vit_is_as_good_as_its_card_says() {
    let checkpoint = Checkpoint::open("fashion-vit").unwrap();
    let (vit, model) = checkpoint.frozen(&device().unwrap(), ViT::new).unwrap();
    assert_eq!(vit.config(), &ViTConfig::fashion());
    assert_eq!(model.parameter_count().all, checkpoint.card().parameters);
    let test = data::fashion(&device().unwrap()).unwrap().test;
    let accuracy = vit.accuracy(&test.images, &test.labels).unwrap();
    let want = checkpoint.card().held_out["accuracy"];
    // Sums in another order may turn one image of the 2,000.
    assert!((accuracy - want).abs() < 0.001, "{accuracy}, not {want}");
}

/// The garments of the test images, and the Fréchet distance of made images to the first 1,000 of
/// them, as `cargo course pretrain` measures it.
fn garments(made: &Tensor) -> (data::Images, f64) {
    let test = data::fashion(&device().unwrap()).unwrap().test;
    let test = test.of_classes(&[0, 1, 2, 3, 4, 6]).unwrap();
    let checkpoint = Checkpoint::open("fashion-cnn").unwrap();
    let (cnn, _) = checkpoint.frozen(&device().unwrap(), Cnn::new).unwrap();
    let features = |images: &Tensor| cnn.features(images, false).unwrap();
    let real = features(&test.take(1000).unwrap().images);
    let distance = course::linalg::frechet_distance(&features(made), &real).unwrap();
    (test, distance)
}

#[test]
fn fashion_gan_is_as_good_as_its_card_says() {
    let checkpoint = Checkpoint::open("fashion-gan").unwrap();
    let (generator, drawing) = checkpoint
        .frozen(&device().unwrap(), Generator::new)
        .unwrap();
    let (_, judging) = checkpoint
        .frozen(&device().unwrap(), Discriminator::new)
        .unwrap();
    let parameters = drawing.parameter_count().all + judging.parameter_count().all;
    assert_eq!(parameters, checkpoint.card().parameters);
    let z = rng(2).randn((1000, 100), &device().unwrap()).unwrap();
    let made = generator.forward_t(&z, false).unwrap();
    let (_, distance) = garments(&made.affine(0.5, 0.5).unwrap());
    let want = checkpoint.card().held_out["frechet"];
    assert!(
        (distance - want).abs() < 1e-3 * want,
        "{distance}, not {want}"
    );
}

#[test]
fn cartpole_dqn_is_as_good_as_its_card_says() {
    let checkpoint = Checkpoint::open("cartpole-dqn").unwrap();
    let (q, model) = checkpoint
        .frozen(&device().unwrap(), QNetwork::new)
        .unwrap();
    assert_eq!(model.parameter_count().all, checkpoint.card().parameters);
    let q = q.snapshot().unwrap();
    let returns = rl::evaluate(&q, rl::cartpole_v1, 100, 100_000, &device().unwrap()).unwrap();
    let mean = Spread::of(&returns).unwrap().mean;
    let want = checkpoint.card().held_out["mean_return"];
    assert!((mean - want).abs() < 1.0, "{mean}, not {want}");
}

#[test]
fn fashion_vae_is_as_good_as_its_card_says() {
    let checkpoint = Checkpoint::open("fashion-vae").unwrap();
    let (vae, model) = checkpoint.frozen(&device().unwrap(), Vae::new).unwrap();
    assert_eq!(model.parameter_count().all, checkpoint.card().parameters);
    let mut random = rng(2);
    let z = random.randn((1000, 20), &device().unwrap()).unwrap();
    let (test, distance) = garments(&vae.decode(&z, false).unwrap());
    let want = checkpoint.card().held_out["frechet"];
    assert!(
        (distance - want).abs() < 1e-3 * want,
        "{distance}, not {want}"
    );

    let noise = random.randn((test.len(), 20), &device().unwrap()).unwrap();
    let loss = vae.loss(&test.images, &noise, false).unwrap();
    let loss = f64::from(loss.to_scalar::<f32>().unwrap());
    let want = checkpoint.card().held_out["loss"];
    assert!((loss - want).abs() < TOLERANCE * want, "{loss}, not {want}");
}

/// The errors of 1,000 sine waves that no training saw, learned from 5 points each, after `told` of
/// 0, 1, 5 and 10 steps: those at which no wave has diverged.
fn sinusoids(name: &str, told: usize) {
    let checkpoint = Checkpoint::open(name).unwrap();
    let config: MetaConfig = checkpoint.config().unwrap();
    let weights = checkpoint.tensors(&device().unwrap()).unwrap();
    let learner = MetaLearner::new(&config, &weights).unwrap();
    assert_eq!(config.parameters(), checkpoint.card().parameters);
    let mut held_out = Sinusoids::new(1_000_001, &device().unwrap());
    let tasks = held_out.tasks(1000, 5, 100).unwrap();
    let errors = learner.evaluate(&tasks, 10).unwrap();
    assert_eq!(checkpoint.card().held_out.len(), told);
    for (of, want) in &checkpoint.card().held_out {
        let steps: usize = of.strip_prefix("error_").unwrap().parse().unwrap();
        let error = Spread::interval(&errors[steps]).unwrap().mean;
        let gap = (error - want).abs();
        assert!(gap < 1e-3 * want, "{name}, {of}: {error}, not {want}");
    }
}

#[test]
fn sinusoid_first_order_is_as_good_as_its_card_says() {
    sinusoids("sinusoid-first-order", 3);
}

#[test]
fn sinusoid_maml_is_as_good_as_its_card_says() {
    sinusoids("sinusoid-maml", 4);
}

#[test]
fn sinusoid_maml_lora_is_as_good_as_its_card_says() {
    sinusoids("sinusoid-maml-lora", 4);
}

#[test]
fn sinusoid_maml_lora_r1_is_as_good_as_its_card_says() {
    sinusoids("sinusoid-maml-lora-r1", 4);
}

#[test]
fn sinusoid_maml_rates_is_as_good_as_its_card_says() {
    sinusoids("sinusoid-maml-rates", 2);
}

#[test]
fn sinusoid_pretrained_is_as_good_as_its_card_says() {
    sinusoids("sinusoid-pretrained", 4);
}

#[test]
fn sinusoid_reptile_is_as_good_as_its_card_says() {
    sinusoids("sinusoid-reptile", 4);
}

#[test]
fn a_name_that_does_not_exist_is_told_with_those_that_do() {
    for name in ["", "sotu", "../checkpoints/sotu-lm", "/"] {
        let error = Checkpoint::open(name).unwrap_err().to_string();
        assert!(
            error.contains(
                "cartpole-dqn, fashion-cnn, fashion-gan, fashion-vae, fashion-vit, \
                 sinusoid-first-order, sinusoid-maml, sinusoid-maml-lora, sinusoid-maml-lora-r1, \
                 sinusoid-maml-rates, sinusoid-pretrained, sinusoid-reptile, sotu-lm"
            ),
            "{error}"
        );
    }
}
