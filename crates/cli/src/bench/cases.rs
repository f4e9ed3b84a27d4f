//! What is compared: each case's parts, how they are set up, and what they must reach.

use anyhow::{Result, bail};
use serde_json::{Value, json};

/// Something to time, in one or more forms.
pub struct Case {
    pub name: &'static str,
    pub parts: Vec<Part>,
    pub goals: Vec<Goal>,
    /// Each side's peak memory is asked for.
    pub memory: bool,
}

/// A form of a case.
pub struct Part {
    pub label: String,
    /// The settings, as the workers read them.
    pub settings: Value,
}

/// A figure that may be at most so much. Times are medians.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Rust's time over PEFT's.
    Eager(f64),
    /// Rust's time over that of PEFT under torch.compile.
    Compiled(f64),
    /// Rust's time over that of the products alone.
    Floor(f64),
    /// Rust's peak memory over PEFT's.
    Memory(f64),
    /// Rust's time of one part over its time of another.
    Parts {
        part: &'static str,
        over: &'static str,
        at_most: f64,
    },
}

/// All cases, or those that are named.
pub fn chosen(names: &[String]) -> Result<Vec<Case>> {
    let all = all();
    for name in names {
        if !all.iter().any(|case| case.name == name) {
            let known: Vec<_> = all.iter().map(|case| case.name).collect();
            bail!("there is no case {name:?}; there are {}", known.join(", "));
        }
    }
    let asked = |case: &Case| names.is_empty() || names.iter().any(|name| name == case.name);
    Ok(all.into_iter().filter(asked).collect())
}

fn all() -> Vec<Case> {
    vec![
        case("linear-forward", linear("linear-forward"), vec![]),
        case("linear-step", linear("linear-step"), vec![]),
        case(
            "mlp-step",
            vec![part("768-3072-768, batch 256", json!({"case": "mlp-step"}))],
            vec![Goal::Eager(0.85), Goal::Compiled(0.95), Goal::Floor(1.25)],
        ),
        case(
            "attention-step",
            vec![part("12 heads, 2 x 128", json!({"case": "attention-step"}))],
            vec![Goal::Eager(0.85)],
        ),
        case(
            "merged",
            ["base", "merged", "unmerged"]
                .map(|form| part(form, json!({"case": "merged", "form": form})))
                .into(),
            vec![Goal::Parts {
                part: "merged",
                over: "base",
                at_most: 1.02,
            }],
        ),
        case(
            "mixed",
            [(1, "1 adapter"), (8, "8 adapters"), (64, "64 adapters")]
                .map(|(n, label)| part(label, json!({"case": "mixed", "adapters": n})))
                .into(),
            vec![Goal::Parts {
                part: "64 adapters",
                over: "1 adapter",
                at_most: 1.30,
            }],
        ),
        Case {
            memory: true,
            ..case(
                "llama-step",
                vec![part("SmolLM2-135M, 1 x 256", json!({"case": "llama-step"}))],
                vec![Goal::Eager(0.70), Goal::Compiled(0.95), Goal::Memory(0.90)],
            )
        },
    ]
}

fn case(name: &'static str, parts: Vec<Part>, goals: Vec<Goal>) -> Case {
    Case {
        name,
        parts,
        goals,
        memory: false,
    }
}

fn part(label: &str, settings: Value) -> Part {
    Part {
        label: label.to_owned(),
        settings,
    }
}

/// 768 → 768 at three ranks and two batches.
fn linear(name: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    for batch in [16, 256] {
        for r in [4, 16, 64] {
            let settings = json!({"case": name, "r": r, "batch": batch});
            parts.push(part(&format!("r {r}, batch {batch}"), settings));
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_chosen_by_name() {
        let names = |only: &[&str]| {
            let only: Vec<String> = only.iter().map(|&name| name.to_owned()).collect();
            chosen(&only).map(|cases| cases.iter().map(|case| case.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), 7);
        assert_eq!(
            names(&["mixed", "mlp-step"]).unwrap(),
            ["mlp-step", "mixed"]
        );
        let error = names(&["mlp"]).unwrap_err().to_string();
        assert!(error.contains("mlp-step"), "{error}");
    }

    #[test]
    fn goals_name_parts_that_are_there() {
        for case in all() {
            for goal in &case.goals {
                if let Goal::Parts { part, over, .. } = goal {
                    for name in [part, over] {
                        assert!(case.parts.iter().any(|part| part.label == *name), "{name}");
                    }
                } else {
                    assert_eq!(case.parts.len(), 1, "{}", case.name);
                }
            }
        }
    }
}
