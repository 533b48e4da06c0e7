# SPDX-License-Identifier: Apache-2.0
"""Measures a mixture of experts against all its experts, by turns.

  python -m sarathi_jax.benchmarks.experts

Of one layer: through the experts that each row chose, as models go, and through
all of them, as one product of the rows with all their columns, which is the
fastest way to do that. Weights are kept as steps keep those of a checkpoint.
The arithmetic saved is E / k; `of it` is how much of that the time shows. As
fractions, 1 - k / E of the arithmetic is saved, and 1 - chosen / all of the
time: `time saved, of arithmetic` is the second in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import statistics
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import rich.console

from sarathi_jax.benchmarks import common
from sarathi_jax.cli import mains
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import matrices
from sarathi_jax.models import moe
from sarathi_jax.models import router
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_integer('num_experts', 64, 'Experts, E.')
  flags.DEFINE_integer('experts_per_token', 4, 'Experts of a row, k.')
  flags.DEFINE_integer('hidden_size', 1024, 'Width of a row.')
  flags.DEFINE_integer('intermediate_size', 512, 'Width of an expert.')
  flags.DEFINE_list('rows', ['1', '8', '32'], 'Numbers of rows.')
  flags.DEFINE_integer('runs', 20, 'Runs of each, by turns.', lower_bound=1)
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


def model(
  num_experts: int, per_token: int, width: int, inner: int
) -> config_lib.MixtralConfig:
  """Returns a model whose layers have these experts."""
  return config_lib.MixtralConfig(
    vocab_size=16,
    hidden_size=width,
    intermediate_size=inner,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    max_position_embeddings=16,
    num_experts=num_experts,
    experts_per_token=per_token,
  )


def random_params(config: config_lib.MixtralConfig) -> dict[str, jax.Array]:
  """Returns a layer's experts and router, in float32."""
  specs = moe.moe_specs(config)
  keys = jax.random.split(jax.random.key(0), len(specs))
  return {
    name: jax.random.normal(key, spec.shape) * spec.shape[-2] ** -0.5
    for key, (name, spec) in zip(keys, specs.items(), strict=True)
  }


def side_by_side(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns all experts' matrices as one of each kind."""
  experts, inner, width = params['down'].shape
  into = {
    name: params[name].transpose(1, 0, 2).reshape(width, experts * inner)
    for name in ('gate', 'up')
  }
  return {
    'router': params['router'],
    **into,
    'down': params['down'].reshape(experts * inner, width),
  }


def through_all(
  config: config_lib.MixtralConfig, params: Mapping[str, Any], x: jax.Array
) -> jax.Array:
  """Returns what `moe.moe` does, with each row through all experts.

  Args:
    config: the model.
    params: as `side_by_side` makes them.
    x: [rows, D].
  """
  experts, weights = router.route(config, params, x)
  shares = (
    jnp.zeros((len(x), config.num_experts))
    .at[jnp.arange(len(x))[:, None], experts]
    .set(weights)
  )
  inner = layers.ACTIVATIONS[config.activation](
    matrices.matmul(x, params['gate'])
  )
  inner *= matrices.matmul(x, params['up'])
  inner *= jnp.repeat(shares, config.intermediate_size, axis=1)
  return matrices.matmul(inner, params['down'])


def as_served(
  config: config_lib.MixtralConfig, params: Mapping[str, jax.Array]
) -> dict[str, Any]:
  """Returns parameters as steps on this device keep those of a checkpoint."""
  layout = placement.of_checkpoint(mesh_lib.make(), jnp.float32)
  kept: dict[str, Any] = {}
  for name, leaf in moe.moe_specs(config).items():
    node = layout.node(name, leaf)
    kept[name] = params[name] if node is None else node.of(params[name])
  return kept


def measure(
  config: config_lib.MixtralConfig, rows: int, runs: int
) -> dict[str, Any]:
  """Returns the medians of both ways, in ms, and what is made of them."""
  params = random_params(config)
  x = jax.random.normal(jax.random.key(1), (rows, config.hidden_size))
  ways: dict[str, Callable[[], jax.Array]] = {}
  pairs: dict[str, tuple[Callable[..., jax.Array], Any]] = {
    'chosen': (moe.moe, as_served(config, params)),
    'all': (through_all, as_served(config, side_by_side(params))),
  }
  for name, (way, weights) in pairs.items():
    compiled = jax.jit(way, static_argnums=0).lower(config, weights, x)
    ways[name] = functools.partial(compiled.compile(), weights, x)
  difference = float(jnp.abs(ways['chosen']() - ways['all']()).max())
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(runs):
    for name, run in ways.items():
      start = time.perf_counter()
      run().block_until_ready()
      seconds[name].append(time.perf_counter() - start)
  chosen, every = (statistics.median(seconds[name]) for name in ways)
  saved = config.num_experts / config.experts_per_token
  part = 1 - 1 / saved
  return {
    'rows': rows,
    'chosen, ms': chosen * 1e3,
    'all, ms': every * 1e3,
    'times as fast': every / chosen,
    'arithmetic saved': saved,
    'of it': every / chosen / saved,
    'time saved, of arithmetic': (1 - chosen / every) / part if part else None,
    'largest difference': difference,
  }


def main() -> None:
  config = model(
    FLAGS.num_experts,
    FLAGS.experts_per_token,
    FLAGS.hidden_size,
    FLAGS.intermediate_size,
  )
  results = [measure(config, int(n), FLAGS.runs) for n in FLAGS.rows]
  rich.console.Console().print(
    common.table(
      results,
      f'{config.num_experts} experts of {config.hidden_size} x '
      f'{config.intermediate_size}, {config.experts_per_token} a row, float32, '
      f'{jax.devices()[0].device_kind}',
    )
  )
  common.write_json(FLAGS.json, 'experts', FLAGS, results)


if __name__ == '__main__':
  mains.run(main, define_flags)
