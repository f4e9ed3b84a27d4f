//! Fine-tunes a local Llama-shaped model with LoRA or QLoRA.
//!
//! ```text
//! cargo run --release -p finetune -- --model DIR --data FILE.jsonl --out DIR
//! ```
//!
//! The data are texts or chats, a line each; the result is an adapter that PEFT reads. The same
//! command again goes on where a run was stopped or killed, with the same numbers as if it had not
//! been.
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod arguments;
mod data;
mod output;
mod progress;
mod train;

use std::process::ExitCode;

use clap::Parser;

use arguments::Arguments;
use train::End;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    lora::tune_process();
    match train::run(&arguments) {
        Ok(End::Finished) => ExitCode::SUCCESS,
        // As a shell tells of Ctrl-C.
        Ok(End::Stopped) => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {}", told(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes, but for those that a message before says already.
fn told(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |told, cause| {
        let cause = cause.to_string();
        match told.as_str() {
            "" => cause,
            before if before.contains(&cause) => told,
            before => format!("{before}: {cause}"),
        }
    })
}
