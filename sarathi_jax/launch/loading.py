# SPDX-License-Identifier: Apache-2.0
"""Loads a model for a main, and shows how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import gc
import os
import pathlib
import time
from typing import Any

from absl import flags
from absl import logging
from rich import filesize
import rich.console
import rich.markup

from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import opening
from sarathi_jax import xla_flags
from sarathi_jax.in_process import building
from sarathi_jax.in_process import progress as progress_lib
from sarathi_jax.launch import fingerprint
from sarathi_jax.runner import hosts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Logs only errors, as Orbax logs a lot, unless --verbosity is given."""
  before = logging.get_verbosity()
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def load_llm(
  checkpoint: str,
  config: config_lib.EngineConfig,
  *,
  cache_dir: str | None = None,
  convert: bool = True,
  end: hosts.Leader | hosts.Follower | None = None,
  model_name: str | None = None,
  adapters: Mapping[str, Any] | None = None,
  console: rich.console.Console | None = None,
  **options: Any,
) -> llm_lib.LLM:
  """Calls `LLM.from_checkpoint` with a progress bar on standard error.

  Args:
    checkpoint, config, cache_dir, convert: see `LLM.from_checkpoint`.
    model_name: what clients are told; None for `served_name`.
    adapters: see `LLM.from_checkpoint`.
    end: this process's end, if it is one of several; see `join`. All load the
      same, or none goes on; the first one returns once all are warm.
    console: where to show the progress.
    **options: sampling_defaults, allow_nonfinite; see `LLM.from_checkpoint`.

  Raises:
    ConfigError: as `LLM.from_checkpoint`; or other processes load something
      else.
  """
  console = console or rich.console.Console(stderr=True)
  xla_flags.set_environment(os.environ)
  if end is None:
    xla_flags.make_cpu_devices(os.environ, (config.tp or 1) * config.pp)
  path = pathlib.Path(checkpoint).expanduser()
  start = time.monotonic()
  told = progress_lib.Lines(console)
  with _quiet(), progress_lib.bar(console) as progress:
    task = progress.add_task('Loading weights', total=None, count='')

    @contextlib.contextmanager
    def converting(title: str, total: int) -> Iterator[Callable[[int], None]]:
      shown = rich.markup.escape(model_name or checkpoint)
      console.print(
        f'Converting {shown} (once) ...', highlight=False, soft_wrap=True
      )
      bar = progress.add_task(
        title.capitalize(), total=total, count=filesize.decimal(total)
      )
      yield functools.partial(progress.advance, bar)
      progress.remove_task(bar)

    def tell(what: str, done: int, total: int) -> None:
      progress.update(
        task,
        description=what,
        completed=done,
        total=total,
        count=f'{done}/{total}',
      )
      told.tell(lambda: f'{what}: {done} of {total}')

    kept = pathlib.Path(cache_dir or config_lib.default_cache_dir())
    kept = kept.expanduser()
    if convert:
      path = opening.resolve(
        path if path.exists() else checkpoint,
        kept,
        converting,
        functools.partial(building.make_mesh, config=config),
        functools.partial(
          console.print, markup=False, highlight=False, soft_wrap=True
        ),
        **options,
      )
    where = path if path.exists() else checkpoint
    if end is not None:
      end.agree(
        fingerprint.weights(
          opening.open_checkpoint(where, kept, convert=convert, **options)
        )
      )
    leader = end if isinstance(end, hosts.Leader) else None
    llm = llm_lib.LLM.from_checkpoint(
      where,
      config=config,
      cache_dir=kept,
      convert=convert,
      model_name=model_name or served_name(checkpoint),
      adapters=adapters,
      leader=leader,
      on_loaded=functools.partial(tell, 'Loading weights'),
      on_compiled=functools.partial(tell, 'Compiling steps'),
      **options,
    )
    if leader is not None:
      progress.update(
        task, description='Waiting for other hosts', total=None, count=''
      )
      leader.wait_until_warm()
      llm.connect()
  collect_less_garbage()
  info = llm.engine.info
  console.print(
    f'[bold]{rich.markup.escape(info.model_name)}[/] ({info.family}) ready '
    f'after {time.monotonic() - start:.1f} s: {info.policy}, '
    f'{info.token_budget} tokens a step, {info.max_num_seqs} sequences, '
    f'{info.kv_tokens(info.num_pages):,} tokens of KV cache, at most '
    f'{info.max_model_len:,} a sequence.',
    highlight=False,
    soft_wrap=True,
  )
  return llm


def served_name(checkpoint: str) -> str:
  """Returns a checkpoint's name for clients: a folder's own name, or the id.

  The folder's path is left out, as clients need not know where it lies.
  """
  path = pathlib.Path(checkpoint).expanduser()
  return path.resolve().name if path.exists() else checkpoint


def join(
  processes: Mapping[str, Any] | None,
  checkpoint: str,
  config: config_lib.EngineConfig,
  **options: Any,
) -> hosts.Leader | None:
  """Joins several processes; all but the first compute with it and end here.

  Args:
    processes: arguments of `hosts.start`; None for a single process.
    checkpoint, config, **options: what each process loads, see `load_llm`.

  Returns:
    The first process's end, for `load_llm`; what uses the model has to be in
    its `with` block. None for a single process.

  Raises:
    ConfigError: the processes don't find each other, or differ.
  """
  if processes is None:
    return None
  config_lib.check(
    config.max_loras is None or config.max_lora_rank is not None,
    'max_lora_rank',
    config.max_lora_rank,
    'must be said where several hosts serve adapters',
  )
  xla_flags.set_environment(os.environ)
  end = hosts.start(**processes, facts=fingerprint.program(config))
  if not isinstance(end, hosts.Follower):
    return end
  with end:
    # It schedules nothing, so it has no steps of its own to time.
    nothing: dict[str, Any] = dict.fromkeys(config_lib.SLOS)
    config = dataclasses.replace(config, **nothing)
    llm = load_llm(checkpoint, config, end=end, **options)
    end.tell_warm()
    llm.follow(end)
  raise AssertionError  # The block ended this process.


def collect_less_garbage() -> None:
  """Makes Python look for cyclic garbage seldom, and only in what is new.

  An engine's step makes thousands of objects and no cycles. Looking through
  them, and all that was loaded, took a quarter of the step's host time
  (benchmarks/host_overhead.py).
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, *gc.get_threshold()[1:])
