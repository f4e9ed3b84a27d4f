//! The stop button and stdout as a notebook's process has them: a child that believes it is the
//! kernel's runtime trains until SIGINT.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use course::prelude::*;

const CHILD: &str = "COURSE_TEST_TRAINS";

fn train(quiet: bool, steps: usize) -> History {
    let w = Var::new(&[3f32], &Device::Cpu).unwrap();
    let training = Training::new("button", steps);
    let training = if quiet { training.quiet() } else { training };
    let groups = (vec![("w".to_string(), w.clone())], 0.1);
    training
        .run(groups, std::iter::repeat_with(|| Ok(())), |()| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            Ok(w.sqr()?.sum_all()?)
        })
        .unwrap()
}

/// A DQN that evaluates nearly all of the time, so that a stop comes in the middle of it.
fn dqn() {
    let sizes = QNetworkConfig::default();
    let weights = sizes.random_weights(&mut rng(1), &Device::Cpu).unwrap();
    let weights = weights.into_iter().collect();
    let vb = candle_nn::VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let builder = LoraBuilder::trainable(vb);
    let q = QNetwork::new(&sizes, &builder).unwrap();
    let dqn = rl::Dqn {
        total_timesteps: 10_000_000,
        eval_freq: 8,
        n_eval_episodes: 200,
        ..rl::Dqn::default()
    };
    println!("dqn: begins");
    let variables = builder.variables();
    let history = dqn.learn((&q, &variables), rl::cartpole_v1, 1, &Device::Cpu);
    let kept = history.unwrap().evaluations.len();
    let after = rl::evaluate(&q.snapshot().unwrap(), rl::cartpole_v1, 3, 0, &Device::Cpu);
    println!("history: {}; {}", kept > 0, after.unwrap_err());
}

/// What the child does; by itself, as a test, nothing.
#[test]
fn child() {
    match std::env::var(CHILD).as_deref() {
        Ok("dqn") => dqn(),
        Ok(_) => {
            train(true, 3);
            let history = train(false, 20_000);
            println!(
                "history: {} {}",
                history.stopped,
                history.steps.len() < 20_000
            );
        }
        Err(_) => {}
    }
}

/// Sends SIGINT to a child after its first line with `word`: that line, and all that follows.
fn stopped(trains: &str, word: &str) -> (String, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .envs([
            (CHILD, trains),
            ("COURSE_KERNEL", "1"),
            ("EVCXR_IS_RUNTIME", "1"),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(word) {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "it ended early");
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let pid = libc::pid_t::try_from(child.id()).unwrap();
    // SAFETY: sends a signal to a child that is not waited for yet.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    (line, rest)
}

#[test]
fn sigint_ends_the_loop_and_keeps_the_history() {
    let (line, rest) = stopped("training", "button");
    assert!(
        line.contains("button: step 1 of 20000, loss 9.0000"),
        "the quiet run printed {line}"
    );
    assert!(rest.contains("button: stopped after step "), "{rest}");
    assert!(rest.contains("history: true true"), "{rest}");
}

/// The evaluation that was stopped counts for nothing: its episodes are cut short.
#[test]
fn sigint_ends_a_dqn_and_keeps_the_evaluations() {
    let (_, rest) = stopped("dqn", "dqn: begins");
    assert!(rest.contains("history: true; "), "{rest}");
    assert!(rest.contains("stopped with 3 of 3 episodes open"), "{rest}");
}
