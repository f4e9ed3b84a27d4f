//! The cells that `cargo course bench kernel` times in a notebook, here in a release build: prints
//! what each prints, a line each, in the order of their names.

use course::prelude::*;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    lora::tune_process();
    include!("cells/matmul.rs");
    include!("cells/mlp_step.rs");
    Ok(())
}
