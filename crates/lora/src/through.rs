//! A `VarBuilder` that looks at every tensor it hands on.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

/// A builder like `vb` whose tensors go through `each`, with their full names.
pub(crate) fn through<'a>(
    vb: &VarBuilder<'a>,
    each: impl Fn(&str, Tensor) -> Result<Tensor> + Send + Sync + 'a,
) -> VarBuilder<'a> {
    let backend = Through {
        vb: vb.root(),
        each,
    };
    let root = VarBuilder::from_backend(Box::new(backend), vb.dtype(), vb.device().clone());
    match vb.prefix() {
        prefix if prefix.is_empty() => root,
        prefix => root.set_prefix(prefix),
    }
}

struct Through<'a, F> {
    vb: VarBuilder<'a>,
    each: F,
}

impl<F: Fn(&str, Tensor) -> Result<Tensor> + Send + Sync> SimpleBackend for Through<'_, F> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let vb = self.vb.clone().set_device(device.clone());
        (self.each)(name, vb.get_with_hints_dtype(shape, name, init, dtype)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let vb = self.vb.clone().set_device(device.clone());
        (self.each)(name, vb.get_unchecked_dtype(name, dtype)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vb.contains_tensor(name)
    }
}
