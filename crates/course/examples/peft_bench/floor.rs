//! The matrix products that a case cannot do without: those with the frozen weights, and those
//! of the attention's scores. The adapters' own are left out.

use crate::case::{Case, Result, Spec};
use crate::{attention, merged, mlp};
use course::candle_core::{DType, Device, Tensor};

/// `count` products of [batch, m, k] with [batch, k, n].
struct Product {
    count: usize,
    batch: usize,
    m: usize,
    k: usize,
    n: usize,
    /// The right side lies as [n, k]: a forward pass's x Wᵀ. A gradient dy W has it as [k, n].
    transposed: bool,
}

impl Product {
    /// x Wᵀ for `rows` rows.
    fn forward(count: usize, rows: usize, inputs: usize, outputs: usize) -> Self {
        Self {
            count,
            batch: 1,
            m: rows,
            k: inputs,
            n: outputs,
            transposed: true,
        }
    }

    /// dy W for `rows` rows: the gradient of the layer's input.
    fn backward(count: usize, rows: usize, inputs: usize, outputs: usize) -> Self {
        Self {
            count,
            batch: 1,
            m: rows,
            k: outputs,
            n: inputs,
            transposed: false,
        }
    }

    /// A product of attention, `heads` times [tokens, tokens] with [tokens, 64]. Half of it: the
    /// rest is masked.
    fn scores(count: usize, heads: usize, tokens: usize) -> Self {
        Self {
            count,
            batch: heads,
            m: tokens,
            k: tokens.div_ceil(2),
            n: 64,
            transposed: false,
        }
    }

    /// Its two sides.
    fn sides(&self) -> Result<(Tensor, Tensor)> {
        let ones = |shape: [usize; 3]| Tensor::ones(&shape, DType::F32, &Device::Cpu);
        let right = match self.transposed {
            true => ones([self.batch, self.n, self.k])?.transpose(1, 2)?,
            false => ones([self.batch, self.k, self.n])?,
        };
        let left = ones([self.batch, self.m, self.k])?;
        Ok(match self.batch {
            1 => (left.squeeze(0)?, right.squeeze(0)?),
            _ => (left, right),
        })
    }
}

/// One iteration computes every product once.
pub fn products(spec: &Spec) -> Result<Case> {
    let of = spec.of.as_ref().ok_or("floor: of which case?")?;
    let products = of_case(of)?;
    let sides: Vec<_> = products.iter().map(Product::sides).collect::<Result<_>>()?;
    let nothing = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    Ok(Box::new(move || {
        for (product, (left, right)) in products.iter().zip(&sides) {
            for _ in 0..product.count {
                std::hint::black_box(left.matmul(right)?);
            }
        }
        Ok(nothing.clone())
    }))
}

fn of_case(spec: &Spec) -> Result<Vec<Product>> {
    use Product as P;
    let batch = spec.batch.unwrap_or(256);
    Ok(match spec.case.as_str() {
        // The input is data, so that a step has no product more.
        "linear-forward" | "linear-step" => vec![P::forward(1, batch, 768, 768)],
        "mlp-step" => vec![
            P::forward(1, batch, mlp::WIDTH, mlp::HIDDEN),
            P::forward(1, batch, mlp::HIDDEN, mlp::WIDTH),
            P::backward(1, batch, mlp::HIDDEN, mlp::WIDTH),
        ],
        "attention-step" => {
            let (rows, tokens) = (spec.batch.unwrap_or(2), spec.tokens.unwrap_or(128));
            let width = attention::WIDTH;
            vec![
                P::forward(4, rows * tokens, width, width),
                P::backward(1, rows * tokens, width, width),
                // Scores and their product with v; backward those of q, v and the scores. k has
                // no adapter.
                P::scores(5, rows * attention::HEADS, tokens),
            ]
        }
        "merged" => vec![P::forward(
            1,
            merged::BATCH,
            merged::INPUTS,
            merged::OUTPUTS,
        )],
        "mixed" => {
            let rows = spec.rows.unwrap_or(64) * spec.tokens.unwrap_or(16);
            vec![P::forward(1, rows, 768, 768)]
        }
        "llama-step" => llama(spec),
        other => return Err(format!("floor: there is no case {other:?}").into()),
    })
}

/// SmolLM2-135M: hidden 576, 9 heads on 3, MLP of 1536, vocabulary 49152.
fn llama(spec: &Spec) -> Vec<Product> {
    use Product as P;
    let (rows, tokens) = (spec.batch.unwrap_or(1), spec.tokens.unwrap_or(256));
    let (all, layers) = (rows * tokens, spec.layers.unwrap_or(30));
    vec![
        P::forward(2 * layers, all, 576, 576),  // q, o
        P::forward(2 * layers, all, 576, 192),  // k, v
        P::forward(2 * layers, all, 576, 1536), // gate, up
        P::forward(layers, all, 1536, 576),
        P::forward(1, all, 576, 49152),
        P::backward(1, all, 576, 49152),
        P::backward(layers, all, 1536, 576),
        P::backward(2 * layers, all, 576, 1536),
        // The first layer's input needs no gradient.
        P::backward(2 * layers - 1, all, 576, 576),
        P::backward(2 * (layers - 1), all, 576, 192),
        // Two forward; backward those of q, k, v and the scores, without k in the first layer.
        P::scores(6 * layers - 1, rows * 9, tokens),
    ]
}
