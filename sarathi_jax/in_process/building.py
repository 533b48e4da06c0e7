# SPDX-License-Identifier: Apache-2.0
"""Puts an engine together: mesh, runner, scheduler."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import functools
import os
import time
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import xla_flags
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import facts
from sarathi_jax.models import parallel
from sarathi_jax.runner import compiled
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import hosts
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs as programs_lib
from sarathi_jax.scheduler import pacing
from sarathi_jax.text import tokenizer as tokenizer_lib

OnCompiled = programs_lib.OnCompiled


def make_mesh(
  model: model_config_lib.ModelConfig,
  config: config_lib.EngineConfig,
  *,
  users: Mesh | None = None,
  axis_names: mesh_lib.AxisNames | None = None,
  home: Collection[jax.Device] = (),
) -> Mesh:
  """Checks what can be checked before weights are loaded, and picks devices.

  Args:
    model, config: the deployment.
    users: the mesh to run on; None: one is made of the first devices.
    axis_names: of `users`, see `mesh.of_users`.
    home: the devices that hold the weights. Where they are on one, and a
      single device is asked for, it runs them.

  Raises:
    ConfigError: model, config, mesh and devices don't fit each other.
  """
  scheduler_lib.class_of(config)
  model = model.divided(config)
  config_lib.check(
    (config.max_model_len or 1) <= model.context_len,
    'max_model_len',
    config.max_model_len,
    f'the model was made for at most {model.context_len} tokens',
  )
  config_lib.check(
    users is not None or axis_names is None,
    'axis_names',
    axis_names,
    'they are those of a mesh, and there is none',
  )
  mesh = _choose_mesh(model, config, users, axis_names, home)
  if config.deterministic:
    mesh_lib.check_deterministic(mesh)
  mesh_lib.check_activations(mesh, model)
  return mesh


def _choose_mesh(
  model: model_config_lib.ModelConfig,
  config: config_lib.EngineConfig,
  users: Mesh | None,
  axis_names: mesh_lib.AxisNames | None,
  home: Collection[jax.Device],
) -> Mesh:
  asked = parallel.Parallelism(tp=config.tp or 1, pp=config.pp)
  if users is not None:
    mesh = mesh_lib.of_users(users, axis_names)
    given = mesh_lib.parallelism_of(mesh)
    config_lib.check(
      asked in (given, parallel.Parallelism()),
      'tp, pp',
      (asked.tp, config.pp),
      f'the mesh has tp={given.tp}, pp={given.pp}',
    )
    given.check(model)
    return mesh
  asked.check(model)
  if not home or asked.num_devices > 1:
    return mesh_lib.make(asked)
  config_lib.check(
    len(home) == 1,
    'params',
    f'on {len(home)} devices',
    'with neither tp, pp nor a mesh they must be on one',
  )
  return mesh_lib.make(asked, list(home))


def check_same(
  path: str,
  metadata: checkpoint.CheckpointMetadata,
  model: model_config_lib.ModelConfig,
  dtype: Any,
  config: config_lib.EngineConfig,
  mesh: Mesh,
) -> None:
  """Raises CheckpointError if a checkpoint can't replace an engine's weights.

  Args:
    path: of the checkpoint.
    metadata: of the checkpoint.
    model, dtype, config, mesh: of the engine.
  """
  if metadata.model != model:
    raise errors.CheckpointError(
      f'{path}: is of another model than the one that is served.'
    )
  if dtype not in (
    jnp.dtype(metadata.dtype),
    placement.choose_dtype(model, config.dtype, metadata.dtype, mesh),
  ):
    raise errors.CheckpointError(
      f'{path}: is in {metadata.dtype}, and {dtype} is served.'
    )


def step_programs(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  config: config_lib.EngineConfig,
  *,
  layout: placement.Layout,
  kv_dtype: Any,
) -> programs_lib.StepPrograms:
  """Returns the uncompiled steps of a deployment; its devices may be absent.

  Args:
    model, mesh, config: the deployment.
    layout: how the weights lie.
    kv_dtype: dtype of the cache.
  """
  max_model_len = config.max_model_len or model.context_len
  return programs_lib.StepPrograms(
    model,
    mesh,
    config,
    layout=layout,
    kv_dtype=kv_dtype,
    max_model_len=max_model_len,
    max_step_tokens=scheduler_lib.max_step_tokens(config, max_model_len),
  )


def build_runner(
  model: model_config_lib.ModelConfig,
  params: Any,
  layout: placement.Layout,
  mesh: Mesh,
  config: config_lib.EngineConfig,
  on_compiled: OnCompiled,
  leader: hosts.Leader | None = None,
) -> device_runner.DeviceRunner:
  """Makes a runner, and compiles its steps.

  Args:
    model: the model.
    params: its weights, placed on the mesh; see `runner.placement`.
    layout: how they lie.
    mesh: of `make_mesh`.
    config: of the engine.
    on_compiled: told of the progress.
    leader: see `device_runner.DeviceRunner`.

  Raises:
    ConfigError: the KV cache has no room, or attention is unknown.
  """
  if mesh.devices.flat[0].platform == 'gpu' and (
    unset := xla_flags.unset(os.environ)
  ):
    warnings.warn(
      f'XLA_FLAGS lacks {unset}, without which steps take longer. Set it '
      'before JAX first computes: sarathi_jax.xla_flags.set_environment('
      'os.environ).',
      RuntimeWarning,
      stacklevel=2,
    )
  with compiled.kept_in(_compilation_cache_dir(config)) as kept:
    return device_runner.DeviceRunner(
      model,
      params,
      layout,
      mesh,
      config,
      functools.partial(scheduler_lib.max_step_tokens, config),
      on_compiled,
      leader,
      kept=kept,
    )


def build_engine(
  model: model_config_lib.ModelConfig,
  runner: device_runner.DeviceRunner,
  config: config_lib.EngineConfig,
  *,
  tokenizer: tokenizer_lib.Tokenizer | None,
  eos_token_ids: Sequence[int],
  model_name: str,
  default_sampling: Mapping[str, Any],
  adapters: Mapping[str, Any],
) -> engine_lib.Engine:
  """Builds an engine around a runner; for the arguments see `llm.LLM`."""
  scheduler = scheduler_lib.make(
    config,
    runner.num_rows,
    max_model_len=runner.max_model_len,
    num_pages=runner.num_pages,
    windows=runner.windows,
    num_stages=runner.num_stages,
    max_adjusted_seqs=config.num_adjusted_seqs(model.vocab_size),
    eos_token_ids=tuple(eos_token_ids),
    prefix_cost=facts.prefix_cost(model, runner.num_stages),
    dynamic_rope_len=facts.dynamic_rope_len(model),
    rope_counts_outputs=facts.rope_counts_outputs(model),
  )
  engine = engine_lib.Engine(
    scheduler,
    pacing.paced(runner, scheduler, time.monotonic),
    tokenizer=tokenizer,
    adapters=adapters,
    info=engine_lib.EngineInfo.of(
      scheduler.config,
      policy=config.policy,
      model_name=model_name,
      family=model.family,
      vocab_size=model.vocab_size,
      default_sampling=default_sampling,
      grammars=config.grammars,
    ),
  )
  engine.adapters.limit(config.max_cpu_loras)
  return engine


def _compilation_cache_dir(config: config_lib.EngineConfig) -> str | None:
  folder = config.compilation_cache_dir
  if folder != config_lib.AUTO:
    return None if folder is None else os.fspath(folder)
  if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    return None  # JAX keeps them already.
  return str(config_lib.default_cache_dir() / 'compiled')
