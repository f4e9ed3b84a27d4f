//! Deep Q-learning.

use std::time::Instant;

use candle_core::{D, Device, Tensor, Var};
use gymnasium_rs::core::Env;
use lora::optim::{LoraOptimizer, ParameterGroup, clip_grad_norm};
use rand::Rng as _;

use super::batch::EnvBatch;
use super::env::Observation;
use super::evaluate::{best, evaluate};
use super::replay::{ReplayBuffer, Transitions};
use crate::metrics::Spread;
use crate::models::{QNetwork, QSnapshot};
use crate::rng::{Rng, rng};
use crate::{Error, Result, interrupt};

/// Deep Q-learning and its settings, under Stable-Baselines3's names.
///
/// The network learns, by the Huber loss over transitions drawn from a replay buffer, the value
///
/// Q(s, a) = r + γ max Q′(s′, a′),
///
/// and r alone where the task terminated; through a time limit the value goes on. Q′ is a copy of
/// the network from some steps ago, the target network; with `double` the network itself says
/// which a′ is best, and Q′ only what that is worth. Actions are the best ones, or with
/// probability ε any.
///
/// The defaults solve CartPole-v1, as a test shows with five of five seeds: a mean return of at
/// least 475 over 100 episodes. δ of the Huber loss is 10, not 1: with 1 nearly every
/// transition pulls equally hard, so that the few falls are outvoted by the many steps that go
/// well. With δ = 1 and a target network copied every 50 steps none of the four seeds that were
/// tried solved it, and the values grew to 130,000, where no return is worth more than 100.
///
/// Sources: Mnih et al. 2015, doi:10.1038/nature14236; van Hasselt et al. 2016, arXiv:1509.06461.
///
/// ```
/// use course::candle_nn::VarBuilder;
/// use course::models::{QNetwork, QNetworkConfig};
/// use course::prelude::*;
/// use course::rl::{self, Dqn};
///
/// let sizes = QNetworkConfig::default();
/// let weights = sizes.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
/// let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
/// let builder = LoraBuilder::trainable(vb);
/// let q = QNetwork::new(&sizes, &builder)?;
/// let dqn = Dqn { total_timesteps: 2_000, ..Dqn::default() };
/// let history = dqn.learn((&q, &builder.variables()), rl::cartpole_v1, 1, &Device::Cpu)?;
/// assert_eq!(history.evaluations.len(), 1, "after 2,000 steps");
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Dqn {
    /// Steps of all environments together.
    pub total_timesteps: usize,
    /// Environments that step together.
    pub n_envs: usize,
    /// Adam's learning rate.
    pub learning_rate: f64,
    /// Transitions in the replay buffer.
    pub buffer_size: usize,
    /// Steps before the first update.
    pub learning_starts: usize,
    /// Transitions in an update.
    pub batch_size: usize,
    /// The discount of a reward that is one step away.
    pub gamma: f64,
    /// Steps between updates.
    pub train_freq: usize,
    /// Updates at a time.
    pub gradient_steps: usize,
    /// Steps between copies of the network to the target network.
    pub target_update_interval: usize,
    /// The share of the steps over which ε falls.
    pub exploration_fraction: f64,
    /// ε at the start.
    pub exploration_initial_eps: f64,
    /// ε at the end.
    pub exploration_final_eps: f64,
    /// Where the Huber loss turns from a square to a line.
    pub huber_delta: f64,
    /// The largest norm of the gradients.
    pub max_grad_norm: f64,
    /// Lets the network choose the next action and the target network value it (double DQN).
    pub double: bool,
    /// Steps between evaluations.
    pub eval_freq: usize,
    /// Episodes of an evaluation.
    pub n_eval_episodes: usize,
    /// Ends the training at an evaluation with this mean return.
    pub reward_threshold: Option<f64>,
}

impl Default for Dqn {
    fn default() -> Self {
        Self {
            total_timesteps: 100_000,
            n_envs: 8,
            learning_rate: 2e-3,
            buffer_size: 50_000,
            learning_starts: 1_000,
            batch_size: 128,
            gamma: 0.99,
            train_freq: 8,
            gradient_steps: 2,
            target_update_interval: 100,
            exploration_fraction: 0.1,
            exploration_initial_eps: 1.0,
            exploration_final_eps: 0.05,
            huber_delta: 10.0,
            max_grad_norm: 10.0,
            double: true,
            eval_freq: 2_000,
            n_eval_episodes: 20,
            reward_threshold: None,
        }
    }
}

/// An evaluation during the training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Steps so far.
    pub steps: usize,
    /// Episodes that had ended so far.
    pub episodes: usize,
    /// Seconds of training so far, without the evaluations.
    pub seconds: f64,
    /// The mean return without exploration.
    pub mean_return: f64,
}

/// What a training showed.
#[derive(Clone, Debug, Default)]
pub struct DqnHistory {
    /// The evaluations.
    pub evaluations: Vec<Evaluation>,
    /// The returns of the episodes, with exploration, in the order of their ends.
    pub returns: Vec<f64>,
}

/// The learner.
struct Learner<'a> {
    config: &'a Dqn,
    q: &'a QNetwork,
    target: QSnapshot,
    optimizer: LoraOptimizer,
}

impl<'a> Learner<'a> {
    fn new(config: &'a Dqn, q: &'a QNetwork, vars: &[(String, Var)]) -> Result<Self> {
        let group = ParameterGroup::all(vars.to_vec(), config.learning_rate);
        Ok(Self {
            config,
            q,
            target: q.snapshot()?,
            optimizer: LoraOptimizer::new(vec![group])?,
        })
    }

    /// r + γ max Q(s'), and r alone where the task ended.
    fn goals(&self, batch: &Transitions) -> Result<Tensor> {
        let of_target = self.target.forward(&batch.nexts)?;
        let best = if self.config.double {
            let chosen = self.q.forward_t(&batch.nexts, false)?.detach();
            let chosen = chosen.argmax_keepdim(D::Minus1)?;
            of_target.gather(&chosen, 1)?.squeeze(1)?
        } else {
            of_target.max(D::Minus1)?
        };
        Ok((&batch.rewards + ((best * &batch.going)? * self.config.gamma)?)?)
    }

    /// The Huber loss of the values against their goals.
    fn loss(&self, batch: &Transitions) -> Result<Tensor> {
        let goals = self.goals(batch)?.detach();
        let values = self.q.forward_t(&batch.observations, true)?;
        let values = values.gather(&batch.actions, 1)?.squeeze(1)?;
        huber(&(values - goals)?, self.config.huber_delta)
    }

    fn update(&mut self, batch: &Transitions) -> Result<()> {
        let mut gradients = self.loss(batch)?.backward()?;
        let vars = self.optimizer.parameters();
        clip_grad_norm(&mut gradients, vars, self.config.max_grad_norm)?;
        Ok(self.optimizer.step(&gradients)?)
    }
}

/// The mean of d²/2 where |d| ≤ δ, and of δ (|d| − δ/2) elsewhere.
fn huber(d: &Tensor, delta: f64) -> Result<Tensor> {
    // c d − c²/2 with c = d cut to ±δ, whose derivative by d is c.
    let cut = d.clamp(-delta, delta)?.detach();
    Ok(((d - (&cut * 0.5)?)? * cut)?.mean_all()?)
}

/// What its errors call it.
const NAME: &str = "DQN";
/// Where the seeds of training episodes begin; those of evaluations begin at 0.
const TRAINING_SEEDS: u64 = 1_000_000;

impl Dqn {
    /// Trains the variables of a Q network, all of its weights or those of its adapters, until
    /// the steps are done, the threshold is reached or the learner presses stop.
    ///
    /// `make` gives a new environment. The environments of the training start with the seeds from
    /// 1,000,000 + 1,000 · `seed` on, every evaluation is of the episodes with the seeds from 0
    /// on; so a last evaluation with seeds from 100,000 on, say, is of episodes that nobody saw.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] for settings that mean nothing, [`Error::TrainingStep`] for a training
    /// that diverged to numbers that are not finite; what the environments refuse.
    pub fn learn<E: Env<Observation, i32>>(
        &self,
        (q, vars): (&QNetwork, &[(String, Var)]),
        make: impl Fn() -> E,
        seed: u64,
        device: &Device,
    ) -> Result<DqnHistory> {
        self.check(vars)?;
        let mut random = rng(seed);
        let first = seed.saturating_mul(1_000).saturating_add(TRAINING_SEEDS);
        let mut envs = EnvBatch::new(self.n_envs, &make, first)?;
        let mut buffer = ReplayBuffer::new(self.buffer_size, q.config().state_size)?;
        let mut learner = Learner::new(self, q, vars)?;
        let mut history = DqnHistory::default();
        let mut running = vec![0.0; envs.len()];
        let (mut steps, mut seconds) = (0, 0.0);
        while steps < self.total_timesteps && !interrupt::requested() {
            let start = Instant::now();
            let actions = act(q, &envs, self.epsilon(steps), &mut random, device)?;
            let before = envs.observations().to_vec();
            let after = envs.step(&actions)?;
            for (i, (seen, step)) in before.iter().zip(&after).enumerate() {
                running[i] += f64::from(step.reward);
                if step.done() {
                    history.returns.push(std::mem::take(&mut running[i]));
                }
                buffer.push(seen, actions[i], step)?;
            }
            let earlier = steps;
            steps += envs.len();
            // Whether a multiple of `every` was reached in this round.
            let due = |every: usize| earlier / every != steps / every;
            if steps >= self.learning_starts && due(self.train_freq) {
                for _ in 0..self.gradient_steps {
                    let batch = buffer.sample(self.batch_size, &mut random, device)?;
                    learner
                        .update(&batch)
                        .map_err(|source| Error::TrainingStep {
                            name: NAME.to_string(),
                            step: steps,
                            steps: self.total_timesteps,
                            source: Box::new(source),
                        })?;
                }
            }
            if due(self.target_update_interval) {
                learner.target = q.snapshot()?;
            }
            seconds += start.elapsed().as_secs_f64();
            if due(self.eval_freq) {
                let returns = evaluate(&q.snapshot()?, &make, self.n_eval_episodes, 0, device);
                if interrupt::requested() {
                    break;
                }
                let mean_return = Spread::of(&returns?)?.mean;
                history.evaluations.push(Evaluation {
                    steps,
                    episodes: history.returns.len(),
                    seconds,
                    mean_return,
                });
                if self
                    .reward_threshold
                    .is_some_and(|enough| mean_return >= enough)
                {
                    break;
                }
            }
        }
        Ok(history)
    }

    /// ε after so many steps.
    fn epsilon(&self, steps: usize) -> f64 {
        let span = self.exploration_fraction * self.total_timesteps as f64;
        let done = if span > 0.0 {
            (steps as f64 / span).min(1.0)
        } else {
            1.0
        };
        self.exploration_initial_eps
            + done * (self.exploration_final_eps - self.exploration_initial_eps)
    }

    fn check(&self, vars: &[(String, Var)]) -> Result<()> {
        let counts = [
            ("total_timesteps", self.total_timesteps),
            ("n_envs", self.n_envs),
            ("buffer_size", self.buffer_size),
            ("batch_size", self.batch_size),
            ("train_freq", self.train_freq),
            ("target_update_interval", self.target_update_interval),
            ("eval_freq", self.eval_freq),
            ("n_eval_episodes", self.n_eval_episodes),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(refused(format!("{name} is 0: give it at least 1")));
        }
        let unit = 0.0..=1.0;
        let shares = [
            ("gamma", self.gamma),
            ("exploration_fraction", self.exploration_fraction),
            ("exploration_initial_eps", self.exploration_initial_eps),
            ("exploration_final_eps", self.exploration_final_eps),
        ];
        if let Some((name, share)) = shares.iter().find(|(_, share)| !unit.contains(share)) {
            return Err(refused(format!("{name} is {share}: give it 0 to 1")));
        }
        if !(self.huber_delta > 0.0 && self.huber_delta.is_finite()) {
            let delta = self.huber_delta;
            return Err(refused(format!(
                "huber_delta is {delta}: give it more than 0"
            )));
        }
        if vars.is_empty() {
            let remedy = "give it the model's trainable_parameters()";
            return Err(refused(format!("there is nothing to train: {remedy}")));
        }
        Ok(())
    }
}

fn refused(problem: String) -> Error {
    Error::Training {
        name: NAME.to_string(),
        problem,
    }
}

/// The best action of each environment, or with probability ε any.
fn act<E: Env<Observation, i32>>(
    q: &QNetwork,
    envs: &EnvBatch<E>,
    eps: f64,
    random: &mut Rng,
    device: &Device,
) -> Result<Vec<i32>> {
    let mut actions = best(&q.forward_t(&envs.tensor(device)?, false)?)?;
    for action in &mut actions {
        if random.random::<f64>() < eps {
            *action = random.random_range(0..q.config().action_size as i32);
        }
    }
    Ok(actions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::QNetworkConfig;
    use crate::rl::env::Step;
    use crate::rl::{CartPole, Info, cartpole_v1};
    use candle_core::DType;
    use candle_nn::VarBuilder;
    use lora::LoraBuilder;
    use ndarray::array;

    const CPU: Device = Device::Cpu;

    /// A network for observations of one number whose values are a·x and b·x.
    fn linear(a: f32, b: f32) -> (QNetwork, Vec<(String, Var)>) {
        let sizes = QNetworkConfig {
            state_size: 1,
            hidden_sizes: vec![],
            action_size: 2,
        };
        let weight = Tensor::new(&[[a], [b]], &CPU).unwrap();
        let bias = Tensor::zeros(2, DType::F32, &CPU).unwrap();
        let weights = [("q.layers.0.weight", weight), ("q.layers.0.bias", bias)];
        let weights = weights.map(|(name, w)| (name.to_string(), w)).into();
        let vb = VarBuilder::from_tensors(weights, DType::F32, &CPU);
        let builder = LoraBuilder::trainable(vb);
        let q = QNetwork::new(&sizes, &builder).unwrap();
        (q, builder.variables())
    }

    fn step(observation: f32, reward: f32, terminated: bool, truncated: bool) -> Step {
        Step {
            observation: array![observation],
            reward,
            terminated,
            truncated,
            info: Info::new(),
        }
    }

    /// A batch of one: seen 1, done 0.
    fn only(step: &Step) -> Transitions {
        let mut buffer = ReplayBuffer::new(1, 1).unwrap();
        buffer.push(&array![1.0], 0, step).unwrap();
        buffer.sample(1, &mut rng(1), &CPU).unwrap()
    }

    fn goal(dqn: &Dqn, (target, q): ([f32; 2], [f32; 2]), step: &Step) -> f32 {
        let (q, vars) = linear(q[0], q[1]);
        let mut learner = Learner::new(dqn, &q, &vars).unwrap();
        learner.target = linear(target[0], target[1]).0.snapshot().unwrap();
        let goals = learner.goals(&only(step)).unwrap();
        goals.to_vec1::<f32>().unwrap()[0]
    }

    /// Termination ends the value, a time limit does not.
    #[test]
    fn goals_go_on_through_a_time_limit() {
        let dqn = Dqn {
            gamma: 0.5,
            ..Dqn::default()
        };
        let values = ([10.0, 20.0], [1.0, 2.0]);
        let of = |terminated, truncated| goal(&dqn, values, &step(3.0, 7.0, terminated, truncated));
        assert_eq!(of(false, false), 7.0 + 0.5 * 60.0);
        assert_eq!(of(false, true), 7.0 + 0.5 * 60.0);
        assert_eq!(of(true, false), 7.0);
        assert_eq!(of(true, true), 7.0);
    }

    /// The network would do the first, which the target network holds for worth 30.
    #[test]
    fn double_asks_the_network_what_to_do_and_the_target_what_it_is_worth() {
        let values = ([10.0, 20.0], [2.0, 1.0]);
        for (double, want) in [(true, 30.0), (false, 60.0)] {
            let dqn = Dqn {
                gamma: 1.0,
                double,
                ..Dqn::default()
            };
            assert_eq!(goal(&dqn, values, &step(3.0, 0.0, false, false)), want);
        }
    }

    #[test]
    fn huber_by_its_formula() -> Result<()> {
        let d = Var::new(&[0.5f32, -1.0, 3.0, -5.0], &CPU)?;
        let loss = huber(&d, 2.0)?;
        let want = (0.125 + 0.5 + 2.0 * 2.0 + 2.0 * 4.0) / 4.0;
        assert!((loss.to_scalar::<f32>()? - want).abs() < 1e-6);
        let gradients = loss.backward()?;
        let of_d = gradients.get(&d).unwrap().to_vec1::<f32>()?;
        assert_eq!(of_d, [0.125, -0.25, 0.5, -0.5]);
        Ok(())
    }

    /// The value of what was done is 5, its goal 2.
    #[test]
    fn the_loss_turns_at_huber_delta() -> Result<()> {
        let (q, vars) = linear(5.0, 9.0);
        let batch = only(&step(3.0, 2.0, true, false));
        for (huber_delta, want) in [(0.5, 0.5 * (3.0 - 0.25)), (10.0, 4.5)] {
            let dqn = Dqn {
                huber_delta,
                ..Dqn::default()
            };
            let loss = Learner::new(&dqn, &q, &vars)?.loss(&batch)?;
            assert!((loss.to_scalar::<f32>()? - want).abs() < 1e-6, "{loss}");
        }
        Ok(())
    }

    #[test]
    fn epsilon_falls_and_stays() {
        let dqn = Dqn {
            total_timesteps: 1000,
            exploration_fraction: 0.2,
            exploration_initial_eps: 0.9,
            exploration_final_eps: 0.1,
            ..Dqn::default()
        };
        let eps = |dqn: &Dqn, steps| (1e6 * dqn.epsilon(steps)).round() / 1e6;
        let falls = [0, 100, 200, 999].map(|steps| eps(&dqn, steps));
        assert_eq!(falls, [0.9, 0.5, 0.1, 0.1]);
        let at_once = Dqn {
            exploration_fraction: 0.0,
            ..dqn
        };
        assert_eq!(eps(&at_once, 0), 0.1);
    }

    fn short(dqn: &Dqn, seed: u64) -> Result<(DqnHistory, Vec<f32>)> {
        let sizes = QNetworkConfig::default();
        let weights = sizes.random_weights(&mut rng(1), &CPU)?;
        let vb = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, &CPU);
        let builder = LoraBuilder::trainable(vb);
        let q = QNetwork::new(&sizes, &builder)?;
        let history = dqn.learn((&q, &builder.variables()), cartpole_v1, seed, &CPU)?;
        let probe = Tensor::new(&[[0.1f32, 0.2, -0.3, 0.4]], &CPU)?;
        Ok((
            history,
            q.forward_t(&probe, false)?.flatten_all()?.to_vec1()?,
        ))
    }

    #[test]
    fn the_seed_decides() -> Result<()> {
        let dqn = Dqn {
            total_timesteps: 1_200,
            learning_starts: 400,
            eval_freq: 600,
            ..Dqn::default()
        };
        let (one, two, other) = (short(&dqn, 1)?, short(&dqn, 1)?, short(&dqn, 2)?);
        assert_eq!((&one.0.returns, &one.1), (&two.0.returns, &two.1));
        assert_ne!(one.0.returns, other.0.returns);
        let at: Vec<usize> = one.0.evaluations.iter().map(|e| e.steps).collect();
        assert_eq!(at, [600, 1200]);
        assert!(one.0.evaluations[0].episodes < one.0.evaluations[1].episodes);
        assert_eq!(one.0.evaluations[1].episodes, one.0.returns.len());
        Ok(())
    }

    /// An untrained network that does not learn: what differs comes from exploration and starts.
    #[test]
    fn exploration_and_the_seed_reach_the_environments() -> Result<()> {
        let idle = |exploration_final_eps| Dqn {
            total_timesteps: 800,
            learning_starts: 10_000,
            exploration_fraction: 0.0,
            exploration_final_eps,
            ..Dqn::default()
        };
        let returns = |eps, seed| short(&idle(eps), seed).map(|(history, _)| history.returns);
        let (greedy, random) = (returns(0.0, 1)?, returns(1.0, 1)?);
        assert_ne!(greedy, random);
        assert_ne!(greedy, returns(0.0, 2)?, "other starts");
        // A step is worth 1: the episodes that have ended are most of the 800.
        for returns in [greedy, random] {
            let sum: f64 = returns.iter().sum();
            assert!((500.0..=800.0).contains(&sum), "{sum}");
        }
        Ok(())
    }

    /// Every episode of a random policy is over in far less than 1,200 steps.
    #[test]
    fn the_threshold_ends_it() -> Result<()> {
        let dqn = Dqn {
            total_timesteps: 1_200,
            eval_freq: 400,
            reward_threshold: Some(1.0),
            ..Dqn::default()
        };
        assert_eq!(short(&dqn, 1)?.0.evaluations.len(), 1);
        Ok(())
    }

    #[test]
    fn settings_that_mean_nothing_are_refused_by_name() {
        let refused = |change: fn(&mut Dqn)| {
            let mut dqn = Dqn::default();
            change(&mut dqn);
            short(&dqn, 1).unwrap_err().to_string()
        };
        assert!(refused(|d| d.train_freq = 0).contains("train_freq is 0"));
        assert!(refused(|d| d.n_envs = 0).contains("n_envs is 0"));
        assert!(refused(|d| d.gamma = 1.5).contains("gamma is 1.5"));
        assert!(refused(|d| d.exploration_final_eps = f64::NAN).contains("final_eps is NaN"));
        assert!(refused(|d| d.huber_delta = 0.0).contains("huber_delta is 0"));
        let (q, _) = linear(1.0, 2.0);
        let make = CartPole::new;
        let nothing = Dqn::default().learn((&q, &[]), make, 1, &CPU);
        assert!(
            nothing
                .unwrap_err()
                .to_string()
                .contains("nothing to train")
        );
    }

    #[test]
    fn a_seed_that_is_too_large_is_refused() {
        let error = short(&Dqn::default(), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("too large"), "{error}");
    }

    #[test]
    fn a_training_that_diverges_says_where() {
        let dqn = Dqn {
            total_timesteps: 2_000,
            learning_starts: 200,
            learning_rate: 1e30,
            ..Dqn::default()
        };
        let error = short(&dqn, 1).map(|(history, _)| history).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("training \"DQN\", step 2"), "{error}");
        assert!(error.contains("norm of its gradient is NaN"), "{error}");
    }
}
