# SPDX-License-Identifier: Apache-2.0
"""GRPO by tunix's learner with rollouts by sarathi_jax, on a CPU, in minutes.

  pip install 'sarathi-jax[tunix]'
  python examples/grpo_tunix.py

A tiny model with random weights learns to write vowels. Each step's line says
the mean reward, and how far the log-probabilities of what was sampled are from
those that it is trained by.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import importlib
import random
import string
from typing import Any

from absl import app
from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.rl import common
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.rl.rollout import vanilla_rollout

import sarathi_jax
from sarathi_jax.integrations import tunix as sarathi_tunix

_MODELS = {
  'llama3': 'Llama3',
  'qwen2': 'Qwen2',
  'qwen3': 'Qwen3',
  'gemma3': 'Gemma3',
}
_MODEL = flags.DEFINE_enum(
  'model', 'qwen3', list(_MODELS), 'Which model of tunix is trained.'
)
_SAMPLER = flags.DEFINE_enum(
  'sampler',
  'sarathi',
  ['sarathi', 'vanilla'],
  "What continues prompts: sarathi_jax, or tunix's own sampler, to compare.",
)
_STEPS = flags.DEFINE_integer(
  'steps', 30, 'How many steps to train for.', lower_bound=1
)
_PROMPTS = flags.DEFINE_integer(
  'prompts', 4, 'How many prompts a step has.', lower_bound=1
)
_GROUP = flags.DEFINE_integer(
  'group', 8, 'How many outputs of each prompt.', lower_bound=2
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 16, 'The most tokens of an output.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.9, 'Temperature of sampling.', lower_bound=0.01
)
_LEARNING_RATE = flags.DEFINE_float(
  'learning_rate', 0.003, "Adam's learning rate.", lower_bound=0.0
)
_DEVICES = flags.DEFINE_integer(
  'devices', 2, 'How many devices share the model.', lower_bound=1
)

_PROMPT_LEN = 8
_VOWELS = 'aeiou'


class Letters:
  """A tokenizer as tunix takes them: a token is a letter.

  What ends a text pads it, too, as of Llama-3: a learner takes no token of
  padding for one that was sampled.
  """

  first = 3  # behind the tokens for the beginning and the end
  vocab_size = first + len(string.ascii_lowercase)

  def encode(self, text: str) -> list[int]:
    return [self.first + string.ascii_lowercase.index(x) for x in text]

  def decode(self, ids: Sequence[int]) -> str:
    letters = ' ' * self.first + string.ascii_lowercase
    return ''.join(letters[i : i + 1] for i in ids)

  def pad_id(self) -> int:
    return 2

  def bos_id(self) -> int:
    return 1

  def eos_id(self) -> int:
    return 2


class Says:
  """Says how far a rollout's log-probabilities are from the trainer's."""

  def __init__(self, rollout_actor: nnx.Module, *args: Any, **kw: Any) -> None:
    super().__init__(rollout_actor, *args, **kw)
    self._actor = rollout_actor

  def generate(self, prompts: Any, rollout_config: Any, **kwargs: Any) -> Any:
    output: Any = super().generate(prompts, rollout_config, **kwargs)
    width = rollout_config.max_tokens_to_generate
    completions = np.full((len(prompts), width), self.pad_id(), np.int32)
    for row, tokens in zip(completions, output.tokens, strict=True):
      row[: len(tokens)] = tokens
    trainers = common.compute_per_token_logps(
      *nnx.split(self._actor),
      prompt_tokens=jnp.asarray(output.left_padded_prompt_tokens),
      completion_tokens=jnp.asarray(completions),
      pad_id=self.pad_id(),
      eos_id=self.eos_id(),
      temperature=rollout_config.temperature,
    )
    theirs = [
      row[: len(tokens)]
      for row, tokens in zip(np.asarray(trainers), output.tokens, strict=True)
    ]
    reward = np.mean(share_of_vowels(prompts, output.text))
    difference = sarathi_jax.compare_logprobs(output.logprobs, theirs)
    print(f'reward {reward:.3f}; {difference}', flush=True)
    return output


class Rollout(Says, sarathi_tunix.SarathiRollout):
  """Ours."""


class Vanilla(Says, vanilla_rollout.VanillaRollout):
  """tunix's own."""

  def __init__(
    self, rollout_actor: Any, tokenizer: Any, mesh: Any, rollout_config: Any
  ) -> None:
    del mesh  # It samples where the model is.
    config = rollout_actor.config
    super().__init__(
      rollout_actor,
      tokenizer,
      base_rollout.CacheConfig(
        rollout_config.kv_cache_size,
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
      ),
    )


def share_of_vowels(
  prompts: Sequence[str], completions: Sequence[str], **unused: Any
) -> list[float]:
  """Returns the rewards."""
  del prompts, unused
  return [
    sum(letter in _VOWELS for letter in text) / max(len(text), 1)
    for text in completions
  ]


def make_model(name: str) -> nnx.Module:
  """Makes a tiny model with random weights."""
  module = importlib.import_module(f'tunix.models.{name}.model')
  own = (
    dict(
      num_embed=Letters.vocab_size,
      sliding_window_size=8,
      param_dtype=jnp.float32,
    )
    if name == 'gemma3'
    else dict(
      vocab_size=Letters.vocab_size, rope_theta=1_000_000, norm_eps=1e-6
    )
  )
  config = module.ModelConfig(
    num_layers=2,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    **own,
  )
  model: nnx.Module = getattr(module, _MODELS[name])(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)  # Its own weights are 0 in part.
  nnx.update(
    model,
    jax.tree.map(
      lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype),
      nnx.state(model, nnx.Param),
    ),
  )
  return model


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  jax.config.update('jax_num_cpu_devices', _DEVICES.value)
  devices = np.array(jax.devices()[: _DEVICES.value])
  mesh = jax.sharding.Mesh(devices.reshape(-1, 1), ('fsdp', 'tp'))
  engine = sarathi_jax.EngineConfig(
    token_budget=64, max_num_seqs=32, page_size=8, grammars=False
  )
  cluster = rl_cluster.RLCluster(
    actor=make_model(_MODEL.value),
    tokenizer=Letters(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(
        (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT), mesh
      ),
      rollout_engine=(
        functools.partial(Rollout, config=engine)
        if _SAMPLER.value == 'sarathi'
        else Vanilla
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_prompt_length=_PROMPT_LEN,
        max_tokens_to_generate=_MAX_TOKENS.value,
        kv_cache_size=_PROMPT_LEN + _MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        return_logprobs=True,
      ),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adam(_LEARNING_RATE.value),
        max_steps=_STEPS.value,
        eval_every_n_steps=_STEPS.value + 1,
      ),
    ),
  )
  learner = grpo_learner.GRPOLearner(
    cluster,
    grpo_learner.GRPOConfig(num_generations=_GROUP.value, beta=0.0),
    share_of_vowels,
  )
  draw = random.Random(0).choices
  learner.train(
    {
      'prompts': np.array(
        [
          ''.join(draw(string.ascii_lowercase, k=_PROMPT_LEN - 1))
          for _ in range(_PROMPTS.value)
        ]
      )
    }
    for _ in range(_STEPS.value)
  )


if __name__ == '__main__':
  app.run(main)
