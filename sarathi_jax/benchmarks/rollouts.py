# SPDX-License-Identifier: Apache-2.0
"""Compares rollouts in a trainer's process with tunix's own sampler.

  python -m sarathi_jax.benchmarks.rollouts --json=results/rollouts_cpu.json

Needs the extra `tunix`. Groups of outputs of mixed lengths, on one device, by
turns: how many times as fast they are; whether memory grows over updates of the
weights; and how far log-probabilities are from those of the learner's own
forward pass, in 32 and in 16 bits. A model with random weights does: an output
ends at one of some letters, so that lengths differ as learners' do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import gc
import importlib
import pathlib
import random
import statistics
import string
import time
from typing import Any, NamedTuple

from absl import flags
from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import rich.console

import sarathi_jax
from sarathi_jax.benchmarks import common
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS
_TEMPERATURE = 0.9
_PROMPT_LEN = 64  # the most


class Family(NamedTuple):
  """A model of tunix's.

  Attributes:
    path: of its class, below `tunix.models`.
    vocab: the name of its config's field for V.
    fields: further fields of its config.
  """

  path: str
  vocab: str
  fields: dict[str, Any]


_USUAL = dict(rope_theta=1_000_000, norm_eps=1e-6)
FAMILIES = {
  'llama3': Family('llama3.model.Llama3', 'vocab_size', _USUAL),
  'qwen3': Family('qwen3.model.Qwen3', 'vocab_size', _USUAL),
  'gemma3': Family(
    'gemma3.model.Gemma3',
    'num_embed',
    dict(
      sliding_window_size=32,
      global_base_frequency=1_000_000,
      param_dtype=jnp.float32,
    ),
  ),
}


def define_flags() -> None:
  flags.DEFINE_enum('model', 'qwen3', list(FAMILIES), 'Which model.')
  flags.DEFINE_integer('width', 512, 'D of the model.', lower_bound=64)
  flags.DEFINE_integer('layers', 6, 'Layers of the model.', lower_bound=1)
  flags.DEFINE_integer('prompts', 8, 'Prompts of a batch.', lower_bound=1)
  flags.DEFINE_integer('group', 8, 'Outputs of each.', lower_bound=1)
  flags.DEFINE_integer('max_tokens', 64, 'The most of one.', lower_bound=2)
  flags.DEFINE_integer(
    'runs', 3, 'Batches of each, by turns; 0: none are timed.', lower_bound=0
  )
  flags.DEFINE_integer('updates', 100, 'Of the weights.', lower_bound=10)
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


class Letters:
  """A tokenizer as tunix takes them: a token is a letter."""

  first = 3
  vocab_size = 64

  def encode(self, text: str) -> list[int]:
    return [self.first + string.ascii_lowercase.index(x) for x in text]

  def decode(self, ids: Sequence[int]) -> str:
    return ' '.join(map(str, ids))

  def pad_id(self) -> int:
    return 2

  def bos_id(self) -> int:
    return 1

  def eos_id(self) -> int:
    return 2


def make_model(name: str, width: int, layers: int) -> nnx.Module:
  """Makes a model of tunix's with random weights, in float32."""
  family = FAMILIES[name]
  module, cls = f'tunix.models.{family.path}'.rsplit('.', 1)
  found = importlib.import_module(module)
  config = found.ModelConfig(
    **{family.vocab: Letters.vocab_size},
    num_layers=layers,
    embed_dim=width,
    hidden_dim=3 * width,
    num_heads=8,
    head_dim=width // 8,
    num_kv_heads=4,
    **family.fields,
  )
  model: nnx.Module = getattr(found, cls)(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  nnx.update(
    model,
    jax.tree.map(
      lambda x: x + rng.normal(0, 0.02, x.shape).astype(x.dtype),
      nnx.state(model, nnx.Param),
    ),
  )
  return model


def rollout_config(**fields: Any) -> Any:
  """Returns tunix's configuration of a rollout."""
  base_rollout = importlib.import_module('tunix.rl.rollout.base_rollout')
  return base_rollout.RolloutConfig(
    **dict(
      max_prompt_length=_PROMPT_LEN,
      max_tokens_to_generate=FLAGS.max_tokens,
      kv_cache_size=_PROMPT_LEN + FLAGS.max_tokens,
      temperature=_TEMPERATURE,
      return_logprobs=True,
      # About one in as many tokens ends an output.
      eos_tokens=[2, 30, 40, 50],
    )
    | fields
  )


def make_rollout(model: nnx.Module, dtype: Any = None) -> Any:
  """Makes ours."""
  adapter = importlib.import_module('tunix.generate.tokenizer_adapter')
  ours = importlib.import_module('sarathi_jax.integrations.tunix')
  devices = np.array(jax.devices()[:1]).reshape(1, 1)
  return ours.SarathiRollout(
    rollout_actor=model,
    tokenizer=adapter.TokenizerAdapter(Letters()),
    mesh=jax.sharding.Mesh(devices, ('fsdp', 'tp')),
    rollout_config=rollout_config(data_type=dtype),
    config=sarathi_jax.EngineConfig(
      token_budget=128, max_num_seqs=64, page_size=16, grammars=False
    ),
  )


def make_vanilla(model: Any) -> Any:
  """Makes tunix's own."""
  adapter = importlib.import_module('tunix.generate.tokenizer_adapter')
  base = importlib.import_module('tunix.rl.rollout.base_rollout')
  vanilla = importlib.import_module('tunix.rl.rollout.vanilla_rollout')
  config = model.config
  return vanilla.VanillaRollout(
    model,
    adapter.TokenizerAdapter(Letters()),
    base.CacheConfig(
      _PROMPT_LEN + FLAGS.max_tokens,
      config.num_layers,
      config.num_kv_heads,
      config.head_dim,
    ),
  )


def prompts_of(num: int, group: int) -> list[str]:
  """Draws prompts of mixed lengths, each as often as a group asks."""
  draw = random.Random(0)
  drawn = [
    ''.join(draw.choices(string.ascii_lowercase, k=draw.choice((4, 8, 16, 60))))
    for _ in range(num)
  ]
  return [prompt for prompt in drawn for _ in range(group)]


def speed(ours: Any, vanilla: Any, prompts: list[str]) -> dict[str, Any]:
  """Returns microseconds a token of either, by turns, and their ratios."""

  def us_per_token(rollout: Any, seed: int) -> float:
    config = rollout_config(seed=jax.random.PRNGKey(seed))
    began = time.perf_counter()
    output = rollout.generate(prompts, config)
    seconds = time.perf_counter() - began
    return 1e6 * seconds / sum(map(len, output.tokens))

  for rollout in (ours, vanilla):
    us_per_token(rollout, 0)  # What is compiled at first is not counted.
  pairs = [
    (us_per_token(ours, seed), us_per_token(vanilla, seed))
    for seed in range(1, FLAGS.runs + 1)
  ]
  return {
    'ours_us_per_token': [a for a, _ in pairs],
    'vanilla_us_per_token': [b for _, b in pairs],
    'times_as_fast': statistics.median(b / a for a, b in pairs),
  }


def live_bytes() -> int:
  """Returns the bytes of all arrays that are alive."""
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())


def resident_bytes() -> int:
  """Returns the bytes that this process has in memory; 0 if unknown."""
  status = pathlib.Path('/proc/self/statm')
  if not status.exists():
    return 0
  return int(status.read_text().split()[1]) * 4096


def memory(ours: Any, model: nnx.Module, num: int) -> dict[str, Any]:
  """Returns the memory after each tenth of some updates, and compilations."""
  compiled: list[str] = []

  def listen(event: str, duration_secs: float, **fields: Any) -> None:
    del duration_secs
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(fields['fun_name'])

  def update() -> None:
    state = nnx.state(model, (nnx.Param,))
    nnx.update(model, jax.tree.map(lambda x: x * 1.0001, state))
    ours.update_params(nnx.state(model, (nnx.Param,)), (nnx.Param,))
    ours.generate(['hello'] * 4, rollout_config(max_tokens_to_generate=4))

  update()  # Of the trainer and the layout, what is compiled is.
  update()
  jax.monitoring.register_event_duration_secs_listener(listen)
  marks = []
  for i in range(num):
    update()
    if not (i + 1) % (num // 10):
      marks.append((live_bytes(), resident_bytes()))
  jax.monitoring.clear_event_listeners()
  return {
    'updates': num,
    'live_bytes': [live for live, _ in marks],
    'resident_bytes': [resident for _, resident in marks],
    'live_bytes_grow_by': marks[-1][0] - marks[0][0],
    'compiled': compiled,
  }


def difference(model: nnx.Module, prompts: list[str], dtype: Any) -> Any:
  """Compares log-probabilities of what was sampled with the learner's.

  Args:
    model: the trainer's, in float32.
    prompts: to continue.
    dtype: to serve in, and to compute the learner's in.
  """
  common_lib = importlib.import_module('tunix.rl.common')
  cast = nnx.clone(model)
  nnx.update(
    cast,
    jax.tree.map(lambda x: x.astype(dtype), nnx.state(cast, nnx.Param)),
  )
  rollout = make_rollout(cast, dtype)
  output = rollout.generate(prompts, rollout_config())
  completions = np.full(
    (len(prompts), FLAGS.max_tokens), rollout.pad_id(), np.int32
  )
  for row, tokens in zip(completions, output.tokens, strict=True):
    row[: len(tokens)] = tokens
  theirs = np.asarray(
    common_lib.compute_per_token_logps(
      *nnx.split(cast),
      prompt_tokens=jnp.asarray(output.left_padded_prompt_tokens),
      completion_tokens=jnp.asarray(completions),
      pad_id=rollout.pad_id(),
      eos_id=rollout.eos_id(),
      temperature=_TEMPERATURE,
    )
  )
  return sarathi_jax.compare_logprobs(
    output.logprobs,
    [row[: len(t)] for row, t in zip(theirs, output.tokens, strict=True)],
  )


def main() -> None:
  console = rich.console.Console(highlight=False)
  say: Callable[..., None] = console.print
  model = make_model(FLAGS.model, FLAGS.width, FLAGS.layers)
  prompts = prompts_of(FLAGS.prompts, FLAGS.group)
  ours = make_rollout(model)
  results: dict[str, Any] = {}
  if FLAGS.runs:
    results['speed'] = speed(ours, make_vanilla(model), prompts)
    times = results['speed']['times_as_fast']
    say(f"{times:.2f} times as fast as tunix's sampler (median of turns)")
  results['memory'] = found = memory(ours, model, FLAGS.updates)
  say(
    f'{found["updates"]} updates: live arrays grow by '
    f'{found["live_bytes_grow_by"]:,} bytes, of {found["live_bytes"][0]:,}; '
    f'{len(found["compiled"])} programs compiled'
  )
  del ours
  results['logprobs'] = {}
  for dtype in ('float32', 'bfloat16'):
    told = difference(model, prompts[:: FLAGS.group], jnp.dtype(dtype))
    results['logprobs'][dtype] = told._asdict()
    say(f'{dtype}: {told}')
  common.write_json(
    FLAGS.json, 'rollouts', FLAGS, results, device=jax.devices()[0].device_kind
  )


if __name__ == '__main__':
  mains.run(main, define_flags, verbosity=logging.WARNING)
