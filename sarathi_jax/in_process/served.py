# SPDX-License-Identifier: Apache-2.0
"""What an `LLM` serves: an engine, the weights, adapters and cache of it.

How these are replaced while it lives is here; what it is asked, in `LLM`.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import os
import pathlib
from typing import Any

import jax

from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import opening
from sarathi_jax import types
from sarathi_jax.in_process import adapters as adapters_lib
from sarathi_jax.in_process import background as background_lib
from sarathi_jax.in_process import building
from sarathi_jax.in_process import live as live_lib
from sarathi_jax.in_process import progress
from sarathi_jax.in_process import runs as runs_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import hosts
from sarathi_jax.runner import placement
from sarathi_jax.runner import settings
from sarathi_jax.text import tokenizer as tokenizer_lib

Params = live_lib.Params
OnCompiled = building.OnCompiled
# What becomes of requests that are running -> whether they keep their pages.
_ON_UPDATE = {'recompute': False, 'keep': True}


class Served:
  """An engine that serves weights, and takes others in their place.

  Attributes:
    engine: the engine.
    model: the model's configuration.
    adapters: reads what is loaded as an adapter.
  """

  _live: live_lib.LiveParams
  _requests: Callable[..., list[types.Request]]

  def _start(
    self,
    model: model_config_lib.ModelConfig,
    placed: Params,
    layout: placement.Layout,
    mesh: jax.sharding.Mesh,
    config: config_lib.EngineConfig,
    on_compiled: OnCompiled | None,
    source: adapters_lib.Source,
    leader: hosts.Leader | None = None,
    **engine: Any,
  ) -> None:
    """Compiles the steps and builds the engine, once weights are placed."""
    words: tokenizer_lib.Tokenizer | None = engine['tokenizer']
    engine['tokenizer'] = words and words.with_parsers(
      config.tool_parser, config.reasoning_parser
    )
    engine['default_sampling'] = types.SamplingParams.defaults(
      engine['default_sampling'] or {}
    )  # Checked before anything is compiled.
    self.model = model
    self._config = config
    self.adapters = source
    self._leader = leader
    with progress.told(on_compiled, 'Compiling steps') as tell:
      self._runner = building.build_runner(
        model, placed, layout, mesh, config, tell, leader
      )
    self.engine = building.build_engine(model, self._runner, config, **engine)
    self._dtype = layout.given_dtype
    self._runs = runs_lib.Runs(self.engine, self._check_awake)

  def open_weights(
    self,
    path: str | pathlib.Path,
    *,
    cache_dir: str | pathlib.Path | None = None,
    **options: Any,
  ) -> checkpoint.Checkpoint:
    """Opens other weights of the same model, for `load_weights`.

    Does not touch what is served, so any thread may call it.

    Args:
      path, cache_dir: see `LLM.from_checkpoint`.
      **options: convert, sampling_defaults, allow_nonfinite; see there.

    Raises:
      CheckpointError: there is no checkpoint, or it is of another model or
        dtype.
    """
    opened = opening.open_checkpoint(
      path, cache_dir or config_lib.default_cache_dir(), **options
    )
    self._check_opened(opened, str(path))
    return opened

  def load_weights(
    self,
    opened: checkpoint.Checkpoint,
    *,
    on_update: str = 'recompute',
    version: int | None = None,
  ) -> None:
    """Serves a checkpoint's weights from now on, without compiling.

    Replaces the old weights array by array, so that memory suffices; nothing
    is served meanwhile.

    Args:
      opened: of `open_weights`.
      on_update, version: see `update_params`.

    Raises:
      BusyError: another thread uses this LLM; the old weights stay.
      ConfigError: it is something else, or of another model or dtype; the old
        weights stay.
      EngineDeadError: they can't be read; the old ones are gone.
      UnsupportedError: several hosts serve the weights.
    """
    if self._leader is not None:
      raise errors.UnsupportedError(
        "weights: can't be replaced while several hosts serve them; start anew."
      )
    keeps = _keeps(on_update, version)
    with self._runs.turns.take('load_weights'), settings.own():
      if not isinstance(opened, checkpoint.Checkpoint):
        raise errors.ConfigError(
          f'opened: is a {type(opened).__name__}; must be what open_weights '
          'returns.'
        )
      self._check_opened(opened, str(opened.folder))
      with self._runs.whole():
        self.engine.drain()
        self._runner.load_params(opened.read)
        self.engine.new_weights(version, keeps=keeps)

  def _check_opened(self, opened: checkpoint.Checkpoint, path: str) -> None:
    building.check_same(
      path,
      opened.metadata,
      self.model,
      self._dtype,
      self._config,
      self._runner.mesh,
    )

  @property
  def num_compiled(self) -> int:
    """The number of programs compiled for steps, before the first request."""
    return self._runner.num_programs

  def follow(self, follower: hosts.Follower) -> None:
    """Computes what another process schedules, until this process ends."""
    self._runner.follow(follower)

  def connect(self) -> None:
    """Runs a step that all processes meet in, before there are requests."""
    self._runner.connect()

  def update_params(
    self,
    params: Params,
    *,
    on_update: str = 'recompute',
    version: int | None = None,
  ) -> None:
    """Serves new weights from now on, without compiling.

    Does not copy them where they lie as the engine's do.

    Args:
      params: in the layout that it began with.
      on_update: what becomes of requests under way. 'recompute': the new
        weights compute what they have so far, which later tokens attend to.
        'keep': they go on with what the KV cache has of them, by the weights
        that computed it; of requests that come, nothing is found there.
      version: a number for these weights, which tokens have from now on
        (`Completion.versions`); None: one more than the last. The first are 0.

    Raises:
      BusyError: another thread uses this LLM; the old weights stay.
      ConfigError: they have another tree, shape or dtype, or can't be moved to
        where they are served; the old weights stay.
      EngineDeadError: there was no memory to move them; the old ones are gone.
    """
    keeps = _keeps(on_update, version)
    params = self._live.read(params, self._dtype)
    with self._runs.turns.take('update_params'), settings.own():
      with self._runs.whole():
        self.engine.drain()  # Batches in flight use the old weights.
      with self._runs.inside():
        params = self._live.as_ours(params)
      try:
        with self._runs.inside():
          self._runner.update_params(params)
          self.engine.new_weights(version, keeps=keeps)
      except errors.EngineDeadError as error:
        self._runs.fault = error
        raise
      except Exception as error:  # A device's faults have no common type.
        raise errors.ConfigError(
          "params: can't be moved to where they are served: "
          f'{errors.describe(error)}. The old weights stay.'
        ) from error

  def check_params(self, params: Params) -> None:
    """Checks what `update_params` would; any thread may call it.

    Raises:
      ConfigError: they have another tree, shape or dtype.
    """
    self._live.read(params, self._dtype)

  @property
  def wanted_params(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves that `update_params` takes, by their names."""
    return self._live.wanted(self._dtype)

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The mesh ('pp', 'tp') that it runs on."""
    return self._runner.mesh

  def background(self) -> background_lib.Background:
    """Lets a thread of its own generate, while this one trains.

    Returns:
      What to ask for it; until it is closed nobody else may use this LLM.

    Raises:
      BusyError: another thread uses this LLM.
    """
    return background_lib.Background(self)

  def load_adapter(self, name: str, adapter: Any) -> None:
    """Lets requests ask for a LoRA adapter from now on; compiles nothing.

    One of the same name is gone; requests that have it keep it.

    Args:
      name, adapter: see `LLM`, or `LLM.from_checkpoint`.

    Raises:
      ConfigError: it can't be served, or there is no room
        (`EngineConfig.max_loras`, `max_lora_rank`).
    """
    self.engine.adapters.load(
      name,
      self.adapters.read(name, adapter),
      functools.partial(self.adapters.read, name, adapter)
      if isinstance(adapter, (str, os.PathLike))
      else None,  # Arrays would be kept by it.
    )

  def unload_adapter(self, name: str) -> None:
    """Forgets an adapter; requests that have it keep it until they end.

    Raises:
      NotFoundError: there is none of this name.
    """
    self.engine.adapters.unload(name)

  def sleep(self) -> None:
    """Gives the memory of the KV cache back, until `wake`; weights stay.

    Requests under way wait, and are recomputed; until then, what computes gets
    a BusyError. `update_params` may be called meanwhile.

    Raises:
      BusyError: another thread uses this LLM.
      UnsupportedError: several hosts serve it.
    """
    if self._leader is not None:
      raise errors.UnsupportedError("sleep: several hosts can't.")
    with self._runs.turns.take('sleep'):
      with self._runs.whole():
        self.engine.invalidate_cache()
      self._runner.sleep()

  def wake(self) -> None:
    """Takes the memory again that `sleep` gave back; compiles no step.

    Raises:
      BusyError: another thread uses this LLM.
      ConfigError: the device has not enough of it; it sleeps on.
    """
    with self._runs.turns.take('wake'), settings.own():
      if self._runner.is_asleep:
        self._runner.wake()

  def reset_prefix_cache(self) -> bool:
    """Forgets what earlier prompts and outputs left in the KV cache.

    Returns:
      False, and nothing is forgotten, while requests are under way.

    Raises:
      BusyError: another thread uses this LLM.
    """
    with self._runs.turns.take('reset_prefix_cache'), self._runs.inside():
      return self.engine.reset_prefix_cache()

  def _check_awake(self) -> None:
    if self._runner.is_asleep:
      raise errors.BusyError('LLM: sleeps; call wake first.')
    if not self._runner.has_params:
      raise errors.ConfigError(
        'params: were deleted, or donated to a computation; call '
        'update_params with those that took their place.'
      )


def _keeps(on_update: Any, version: Any) -> bool:
  """Returns whether what runs keeps its pages.

  Raises:
    ConfigError: `on_update` or `version` is something else.
  """
  config_lib.check(
    on_update in tuple(_ON_UPDATE),  # Unlike a dict, takes lists, too.
    'on_update',
    on_update,
    f'must be one of {", ".join(_ON_UPDATE)}',
  )
  config_lib.check(
    version is None or (type(version) is int and version >= 0),
    'version',
    version,
    'must be an integer >= 0',
  )
  return _ON_UPDATE[on_update]
