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

/// What the child does; by itself, as a test, nothing.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_some() {
        train(true, 3);
        let history = train(false, 20_000);
        println!(
            "history: {} {}",
            history.stopped,
            history.steps.len() < 20_000
        );
    }
}

#[test]
fn sigint_ends_the_loop_and_keeps_the_history() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .envs([
            (CHILD, "1"),
            ("COURSE_KERNEL", "1"),
            ("EVCXR_IS_RUNTIME", "1"),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("button") {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "it ended early");
    }
    assert!(
        line.contains("button: step 1 of 20000, loss 9.0000"),
        "the quiet run printed {line}"
    );

    let pid = libc::pid_t::try_from(child.id()).unwrap();
    // SAFETY: sends a signal to a child that is not waited for yet.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("button: stopped after step "), "{rest}");
    assert!(rest.contains("history: true true"), "{rest}");
}
