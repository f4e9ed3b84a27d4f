//! The programs that are timed: each answers requests, one line of JSON a time.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longer than any answer takes, torch.compile of the largest case included.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A running program.
pub struct Worker {
    name: String,
    child: Child,
    requests: Option<ChildStdin>,
    answers: Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
    logging: JoinHandle<()>,
    patience: Duration,
    /// What it said of itself when it was ready.
    pub hello: Value,
}

impl Worker {
    /// Starts a program and waits until it is ready.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        Self::patient(name, command, PATIENCE)
    }

    fn patient(name: &str, command: &mut Command, patience: Duration) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{name}: cannot start {program}"))?;
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = log.clone();
        let logging = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(line);
            }
        });
        let mut worker = Self {
            name: name.to_owned(),
            requests: child.stdin.take(),
            child,
            answers,
            log,
            logging,
            patience,
            hello: Value::Null,
        };
        worker.hello = worker.answer()?;
        Ok(worker)
    }

    /// Sends a request and waits for its answer. An answer that is an error, and a program that
    /// ends or stays silent, are errors with the end of its stderr.
    pub fn ask(&mut self, request: &Value) -> Result<Value> {
        let sent = match &mut self.requests {
            Some(requests) => writeln!(requests, "{request}").and_then(|()| requests.flush()),
            None => Ok(()),
        };
        // A program that is gone cannot be written to; reading tells how it went.
        match self.answer() {
            Ok(answer) => sent.map(|()| answer).context("a lost request"),
            Err(error) => Err(error),
        }
    }

    fn answer(&mut self) -> Result<Value> {
        let line = match self.answers.recv_timeout(self.patience) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.stop();
                return Err(self.failed(&format!("ended with {status}")));
            }
            Err(RecvTimeoutError::Timeout) => {
                let silence = format!("said nothing for {} s", self.patience.as_secs());
                return Err(self.failed(&silence));
            }
        };
        let Ok(answer) = serde_json::from_str::<Value>(&line) else {
            return Err(self.failed(&format!("answered {line:?}, which is not JSON")));
        };
        match answer["error"].as_str() {
            Some(error) => Err(self.failed(&format!("said: {error}"))),
            None => Ok(answer),
        }
    }

    /// Ends the program; an error with what happened and the end of its stderr.
    fn failed(&mut self, what: &str) -> anyhow::Error {
        self.stop();
        // A program that this one started may hold stderr open: the wait has an end.
        for _ in 0..20 {
            if self.logging.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let from = log.len().saturating_sub(20);
        let tail: String = log[from..]
            .iter()
            .map(|line| format!("\n    {line}"))
            .collect();
        match tail.is_empty() {
            true => anyhow::anyhow!("{} {what}. Its stderr is empty.", self.name),
            false => anyhow::anyhow!("{} {what}. The end of its stderr:{tail}", self.name),
        }
    }

    /// Ends the program, by force where it does not end itself; how it ended.
    fn stop(&mut self) -> String {
        self.requests = None;
        if let Some(status) = self.wait(Duration::from_secs(2)) {
            return status;
        }
        let _ = self.child.kill();
        let status = self.child.wait();
        status.map_or("no status".to_owned(), |status| status.to_string())
    }

    fn wait(&mut self, at_most: Duration) -> Option<String> {
        let step = Duration::from_millis(20);
        for _ in 0..at_most.as_millis() / step.as_millis() {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status.to_string());
            }
            std::thread::sleep(step);
        }
        None
    }

    /// Asks for seconds: those of a `load` or a `time`.
    pub fn seconds(&mut self, request: &Value) -> Result<Vec<f64>> {
        numbers(&self.ask(request)?, "seconds").with_context(|| self.name.clone())
    }

    /// Asks for the losses of a `check`.
    pub fn losses(&mut self, request: &Value) -> Result<Vec<f64>> {
        numbers(&self.ask(request)?, "losses").with_context(|| self.name.clone())
    }

    /// The most memory that was resident: `peak` and `start` in bytes.
    pub fn peak(&mut self) -> Result<Value> {
        let peak = self.ask(&json!({"do": "peak"}))?;
        if peak["peak"].as_u64().unwrap_or(0) == 0 {
            bail!("this system does not tell a program's peak memory (Linux does, in /proc)");
        }
        Ok(peak)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn numbers(answer: &Value, key: &str) -> Result<Vec<f64>> {
    let list = answer[key].as_array();
    let numbers: Option<Vec<f64>> = list
        .with_context(|| format!("the answer {answer} lacks {key}"))?
        .iter()
        .map(Value::as_f64)
        .collect();
    numbers.with_context(|| format!("{key} of the answer {answer} are not all numbers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str) -> Result<Worker> {
        let patience = Duration::from_millis(500);
        Worker::patient(
            "The rival",
            Command::new("sh").args(["-c", script]),
            patience,
        )
    }

    fn failure(script: &str) -> String {
        match start(script).and_then(|mut worker| worker.ask(&json!({"do": "peak"}))) {
            Ok(answer) => panic!("it answered {answer}"),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn answers_come_in_turn() {
        let mut worker = start(
            r#"echo '{"ready": true}'; read a; echo '{"seconds": [1, 2.5]}'; read b; echo "$b""#,
        )
        .unwrap();
        assert_eq!(worker.hello["ready"], true);
        assert_eq!(worker.seconds(&json!({"do": "time"})).unwrap(), [1.0, 2.5]);
        assert_eq!(worker.ask(&json!({"do": "quit"})).unwrap()["do"], "quit");
    }

    #[test]
    fn a_dying_worker_is_an_error_with_its_stderr() {
        let said = failure("echo '{}'; read a; echo out of luck >&2; exit 3");
        assert!(
            said.contains("The rival ended") && said.contains("status: 3"),
            "{said}"
        );
        assert!(said.contains("out of luck"), "{said}");
        let said = failure("echo no torch here >&2; exit 1");
        assert!(said.contains("no torch here"), "{said}");
    }

    #[test]
    fn an_error_of_a_worker_is_told_with_its_stderr() {
        let said = failure(
            r#"echo '{}'; read a; echo the traceback >&2; echo '{"error": "no memory"}'; read b"#,
        );
        assert!(
            said.contains("no memory") && said.contains("the traceback"),
            "{said}"
        );
    }

    #[test]
    fn silence_ends() {
        let said = failure("echo '{}'; echo thinking >&2; exec sleep 60");
        assert!(
            said.contains("said nothing") && said.contains("thinking"),
            "{said}"
        );
    }

    #[test]
    fn an_answer_without_numbers_is_refused() {
        assert!(numbers(&json!({"seconds": [1, "x"]}), "seconds").is_err());
        assert!(numbers(&json!({"second": [1]}), "seconds").is_err());
        assert!(failure("echo '{}'; echo nonsense; read a").contains("not JSON"));
    }
}
