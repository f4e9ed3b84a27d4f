//! The convolution by candle's own means, with gradients that are right.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Layout, MetalStorage, Result, Shape, Storage, Tensor, bail,
};

use super::How;
use super::patches::Sizes;

/// The convolution of contiguous tensors, without a bias.
pub(super) fn convolution(x: &Tensor, w: &Tensor, how: How) -> Result<Tensor> {
    let (plain_x, plain_w) = (x.detach(), w.detach());
    let How {
        stride,
        padding,
        dilation,
        groups,
        algorithm,
    } = how;
    let y = match x.rank() {
        3 => plain_x.conv1d_with_algo(&plain_w, padding, stride, dilation, groups, algorithm)?,
        _ => plain_x.conv2d_with_algo(&plain_w, padding, stride, dilation, groups, algorithm)?,
    };
    if x.track_op() || w.track_op() {
        x.apply_op2(w, Graph { y, how })
    } else {
        Ok(y)
    }
}

/// The same of operations whose gradients have gradients.
pub(super) fn looked_up(x: &Tensor, w: &Tensor, sizes: &Sizes) -> Result<Tensor> {
    let &Sizes {
        batch,
        inputs,
        out,
        groups,
        input: [height, width],
        ..
    } = sizes;
    let ([rows, columns], patch) = (sizes.padding(), sizes.patch() / groups);
    let shape = sizes.output_shape(x.rank());
    let x = x.reshape((batch, inputs, height, width))?;
    let x = x.pad_with_zeros(2, rows, rows)?;
    let x = x.pad_with_zeros(3, columns, columns)?.flatten_from(2)?;
    let patches = x.index_select(&Tensor::new(sizes.seen(), x.device())?, 2)?;
    let patches = patches.reshape((batch, groups, patch, sizes.places()))?;
    let w = w.reshape((1, groups, out / groups, patch))?;
    let y = w.broadcast_matmul(&patches)?;
    y.reshape(shape)
}

/// A convolution that candle has computed, as a node of the graph.
///
/// candle 0.11.1's own gradients cannot be used: on the CPU Conv1d's are wrong for a batch above
/// 1 (the kernel's always, the input's without padding and dilation); Conv2d's fail where height
/// and width leave different remainders of the stride; both overflow for an input shorter than the
/// padding. They also compute the gradient of a frozen kernel, at the cost of the forward pass.
struct Graph {
    y: Tensor,
    how: How,
}

impl Graph {
    /// The transposed convolution, cut to the input's sizes `dims`.
    fn input_gradient(&self, g: &Tensor, w: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let (s, p, d) = (self.how.stride, self.how.padding, self.how.dilation);
        let left = (2..dims.len()).map(|i| {
            let reached = (g.dims()[i] - 1) * s + (w.dims()[i] - 1) * d + 1;
            dims[i] + 2 * p - reached
        });
        // One more than needed: with no padding of any kind candle's transposed Conv1d mixes up
        // the batch on the CPU.
        let extra = left.max().unwrap_or(0) + 1;
        let mut whole = match dims.len() {
            3 => g.conv_transpose1d(w, 0, extra, s, d, 1)?,
            _ => g.conv_transpose2d(w, 0, extra, s, d)?,
        };
        for (i, size) in dims.iter().enumerate().skip(2) {
            whole = whole.narrow(i, p, *size)?;
        }
        whole.contiguous()
    }

    /// The input convolved with the output's gradient, stride and dilation exchanged.
    fn kernel_gradient(&self, g: &Tensor, x: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let (s, p, d) = (self.how.stride, self.how.padding, self.how.dilation);
        let turned = |t: &Tensor| t.transpose(0, 1)?.contiguous();
        let (x, g) = (turned(x)?, turned(g)?);
        let mut whole = match dims.len() {
            3 => x.conv1d(&g, p, d, s, 1)?,
            _ => x.conv2d(&g, p, d, s, 1)?,
        };
        for (i, size) in dims.iter().enumerate().skip(2) {
            whole = whole.narrow(i, 0, *size)?;
        }
        turned(&whole)
    }
}

impl CustomOp2 for Graph {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        match &*storage {
            Storage::Cpu(y) => Ok((y.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a convolution on the CPU whose output is elsewhere"),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        match &*storage {
            Storage::Cuda(y) => Ok((y.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a convolution on CUDA whose output is elsewhere"),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        match &*storage {
            Storage::Metal(y) => Ok((y.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a convolution on Metal whose output is elsewhere"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (need_x, need_w) = (x.track_op(), w.track_op());
        let (x, w) = (x.detach(), w.detach());
        let (mut gx, mut gw) = (vec![], vec![]);
        let parts = |t: &Tensor, dim| t.contiguous()?.chunk(self.how.groups, dim);
        for ((x, w), g) in parts(&x, 1)?.iter().zip(parts(&w, 0)?).zip(parts(g, 1)?) {
            let (w, g) = (w.contiguous()?, g.contiguous()?);
            if need_x {
                gx.push(self.input_gradient(&g, &w, x.dims())?);
            }
            if need_w {
                gw.push(self.kernel_gradient(&g, x, w.dims())?);
            }
        }
        let joined = |parts: Vec<Tensor>, dim| match parts.is_empty() {
            true => Ok(None),
            false => Tensor::cat(&parts, dim).map(Some),
        };
        Ok((joined(gx, 1)?, joined(gw, 0)?))
    }
}
