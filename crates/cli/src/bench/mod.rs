//! `cargo course bench`: figures that the README repeats, measured on this machine.

mod against;
mod cases;
mod growth;
mod kernel;
mod machine;
mod summary;
mod worker;

use crate::home::{Checkout, Home};
use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// What to measure: a rival, or one of the subcommands.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub struct Options {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    against: Against,
}

/// A comparison with another library.
#[derive(Args)]
pub struct Against {
    /// Time LoRA here against another library, on the same work
    #[arg(long, value_name = "LIBRARY")]
    against: Option<Rival>,
    /// How often the sides take turns
    #[arg(long, default_value_t = 15, requires = "against",
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// These cases alone
    #[arg(long, value_name = "CASE", value_delimiter = ',', requires = "against")]
    only: Vec<String>,
    /// Write all samples to this file as JSON
    #[arg(long, value_name = "FILE", requires = "against")]
    json: Option<PathBuf>,
}

/// With whom.
#[derive(Clone, Copy, ValueEnum)]
enum Rival {
    /// Hugging Face PEFT on torch, eager and under torch.compile
    Peft,
}

/// What to measure of our own.
#[derive(Subcommand)]
enum Action {
    /// The kernel: ready, first cell, first tensor, println, matrix product against release
    Kernel {
        /// How many kernels to start
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=50))]
        runs: u8,
        /// Write the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// How a step's time and memory grow with rank, batch, sequence length, number of adapters
    Growth {
        /// Write the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Draw the times to this file, PNG or SVG
        #[arg(long, value_name = "FILE")]
        figure: Option<PathBuf>,
    },
}

/// `cargo course bench`; false when a goal is missed.
pub fn command(home: &Home, checkout: &Checkout, options: &Options) -> Result<bool> {
    match (&options.action, &options.against.against) {
        (Some(Action::Kernel { runs, json }), _) => {
            kernel::command(home, checkout, *runs, json.as_deref())
        }
        (Some(Action::Growth { json, figure }), _) => {
            growth::command(checkout, json.as_deref(), figure.as_deref())
        }
        (None, Some(Rival::Peft)) => against::command(home, checkout, &options.against),
        (None, None) => bail!("name what to measure: kernel, growth, or --against peft"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parsed(words: &str) -> Result<Options, clap::Error> {
        let words = std::iter::once("bench").chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
    }

    #[test]
    fn a_rival_and_a_subcommand_are_both_understood() {
        let options = parsed("--against peft --rounds 3 --only mlp-step,mixed --json f").unwrap();
        assert!(options.against.against.is_some() && options.action.is_none());
        assert_eq!(options.against.rounds, 3);
        assert_eq!(options.against.only, ["mlp-step", "mixed"]);
        let kernel = parsed("kernel --runs 2 --json f").unwrap();
        assert!(matches!(
            kernel.action,
            Some(Action::Kernel { runs: 2, .. })
        ));
        assert!(matches!(
            parsed("growth").unwrap().action,
            Some(Action::Growth { .. })
        ));
    }

    #[test]
    fn options_of_a_comparison_alone_are_refused() {
        for words in [
            "",
            "--rounds 3",
            "--only mixed",
            "--json f",
            "--against axolotl",
        ] {
            assert!(parsed(words).is_err(), "{words}");
        }
        assert!(parsed("--against peft kernel").is_err());
        assert!(parsed("--against peft --rounds 0").is_err());
    }
}
