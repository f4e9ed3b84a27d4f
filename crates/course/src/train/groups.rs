//! What a run trains.

use candle_core::Var;
use lora::optim::ParameterGroup;

/// The parameters a run trains, with their learning rates. Made from
///
/// - parameters and one learning rate: `(model.trainable_parameters(), 1e-3)`;
/// - one [`ParameterGroup`];
/// - several, as [`loraplus_groups`](lora::optim::loraplus_groups) makes them.
///
/// ```
/// use course::prelude::*;
/// use course::train::Groups;
///
/// let parameters = vec![("w".to_string(), Var::new(&[3f32], &Device::Cpu)?)];
/// let group = ParameterGroup::all(parameters.clone(), 1e-3);
/// for groups in [
///     Groups::from((parameters, 1e-3)),
///     Groups::from(group.clone()),
///     Groups::from(vec![group]),
/// ] {
///     assert_eq!((groups.0.len(), groups.0[0].lr), (1, 1e-3));
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Groups(pub Vec<ParameterGroup>);

impl From<Vec<ParameterGroup>> for Groups {
    fn from(groups: Vec<ParameterGroup>) -> Self {
        Self(groups)
    }
}

impl From<ParameterGroup> for Groups {
    fn from(group: ParameterGroup) -> Self {
        Self(vec![group])
    }
}

impl From<(Vec<(String, Var)>, f64)> for Groups {
    fn from((parameters, lr): (Vec<(String, Var)>, f64)) -> Self {
        ParameterGroup::all(parameters, lr).into()
    }
}
