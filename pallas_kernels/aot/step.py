# SPDX-License-Identifier: Apache-2.0
"""A model's whole step, compiled for a GPU. Alone here, it knows models."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import pathlib
import re
import runpy
import types
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases
from pallas_kernels.aot import compiler
from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax import scheduler
from sarathi_jax.benchmarks import throughput
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import kv_cache


def check(path: str, device: str) -> cases.Result:
  """Compiles the largest hybrid step of a model; see --model.

  Raises:
    sarathi_jax.errors.ConfigError: there is no such config, or it can't work.
  """
  config, model = _read_config(path)
  target = gpu_targets.get(device)
  max_len = config.max_model_len or model.context_len
  with compiler.on(device):
    params = compiler.placed(jax.eval_shape(lambda: models.init_params(
      model, jax.random.key(0), jnp.bfloat16)), device)
    stats = {'bytes_limit': target.memory_bytes,
             'bytes_in_use': compiler.num_bytes(params)}
    num_pages = kv_cache.choose_num_pages(
      model, config, max_len, jnp.dtype(jnp.bfloat16),
      types.SimpleNamespace(memory_stats=lambda: stats), 0)
    kv = compiler.placed(jax.eval_shape(lambda: kv_cache.init(
      model, num_pages, config.page_size, jnp.bfloat16, 'pallas_triton')),
      device)
  max_len = min(max_len, num_pages * config.page_size)
  programs = device_runner.StepPrograms(
    model, page_size=config.page_size,
    pages_per_seq=-(-max_len // config.page_size),
    max_num_seqs=config.max_num_seqs,
    max_step_tokens=_max_step_tokens(config, max_len),
    attention='pallas_triton')
  size = programs.sizes[-1]
  result = cases.measure(f'{pathlib.Path(path).stem}, {size} tokens', device,
                         lambda: programs.lower(size, params, kv))
  memory = cases.Memory(
    compiler.num_bytes(params), compiler.num_bytes(kv), 0,
    target.memory_bytes, num_pages * config.page_size)
  if result.compiled is None:
    return dataclasses.replace(result, memory=memory)
  analysis = result.compiled.memory_analysis()
  memory = dataclasses.replace(memory, temporaries=(
    analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes))
  last_tokens = jax.ShapeDtypeStruct((config.max_num_seqs,), jnp.int32)
  problems = [*result.problems, *compiler.in_place_problems(
    result.compiled, (kv, last_tokens), kv)]
  if waits := {'kConditional', 'kWhile'} & set(result.outside_graphs):
    problems.append(f'{", ".join(sorted(waits))} in no CUDA graph: there the '
                    'host waits for the device in the middle of a step')
  needed = memory.weights + memory.kv_cache + memory.temporaries
  if needed > memory.device:
    problems.append(f'it needs {needed:,} bytes of memory, and the device '
                    f'has {memory.device:,}')
  return dataclasses.replace(result, problems=problems, memory=memory)


def _read_config(path: str) -> tuple[Any, Any]:
  """The engine's config and the model that the file is named after."""
  file = pathlib.Path(path)
  config_lib.check(file.is_file(), 'model', path, 'no such file')
  known: Mapping[str, Any] = {
    re.sub(r'\W', '_', name): model
    for name, model in throughput.MODELS.items()}
  name = next((n for n in known if file.stem.startswith(n)), '')
  config_lib.check(bool(name), 'model', path,
                   f'its name must begin with one of {", ".join(known)}')
  return runpy.run_path(path)['get_config'](), known[name]


def _max_step_tokens(config: Any, max_model_len: int) -> int:
  return scheduler.policy_class(config.policy).max_step_tokens(
    config_lib.SchedulerConfig(
      token_budget=config.token_budget, max_num_seqs=config.max_num_seqs,
      max_model_len=max_model_len, num_pages=max_model_len,
      page_size=config.page_size))
