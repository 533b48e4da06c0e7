# SPDX-License-Identifier: Apache-2.0
"""An `LLM` as the `Sampler` of tunix's distributed learners.

Unverified: written after `tunix/experimental/rollout/sampler.py` of August
2026, which no release of google-tunix has yet. Does not import tunix but for
the types of its answers, where they are there.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence
import dataclasses
import functools
import importlib
import sys
from typing import Any

import jax
import numpy as np

from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from sarathi_jax.in_process import background

# What a request may ask for that is not served, and what it says then.
_NOT_SERVED = {
  'return_logits': False,
  'return_routed_experts': False,
  'beam_size': None,
}
_MOST_TOLD = 1000  # updates of weights, of which it is known that they came
_FINISH_REASONS = {
  types.FinishReason.STOP: 'stop',
  types.FinishReason.LENGTH: 'length',
  types.FinishReason.ABORT: 'cancelled',
  types.FinishReason.ERROR: 'error',
}


@dataclasses.dataclass(kw_only=True)
class SamplingResponse:
  """What tunix's class of this name has.

  Attributes:
    request_id: of the request.
    error: unused; what is refused is raised.
    metadata: 'versions' has (version, number of tokens) of the weights that
      the tokens were sampled by, and 'policy_version' the last of them.
    text: the output, without what ended it.
    prompt_token_ids: [P] int32.
    token_ids: [T] int32, with the one that ended it.
    logprobs: [T] float32, of logits divided by the temperature; None if they
      are not asked for.
    finish_reason: a value of `_FINISH_REASONS`.
    routed_experts: None.
  """

  request_id: str = ''
  error: Any = None
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
  text: str = ''
  prompt_token_ids: np.ndarray
  token_ids: np.ndarray
  logprobs: np.ndarray | None = None
  finish_reason: str = 'stop'
  routed_experts: Any = None


@dataclasses.dataclass(kw_only=True)
class LoadInfo:
  """What tunix's class of this name has: outputs, and a share in [0, 1]."""

  num_requests_waiting: int = 0
  num_requests_running: int = 0
  kv_cache_usage_perc: float = 0.0


@functools.cache
def _types() -> Any:
  """Returns tunix's module with these types, or this one."""
  try:
    return importlib.import_module('tunix.experimental.rollout.sampler')
  except ModuleNotFoundError:
    return sys.modules[__name__]


class SarathiSampler:
  """Samples in a thread of its own, from `start` to `stop`.

  New weights come with `weight_sync`, by reference, and are served from
  `post_weight_sync` on, between two steps; what is sampled meanwhile goes on.

  Args:
    llm: the engine, with the layout of the trainer's weights.
    tokenizer: has `encode` and `decode`, such as tunix's TokenizerAdapter; None
      for the LLM's own, if it has one.
    ended_by: tokens that end an output, beside those of the LLM.
    on_update: see `LLM.update_params`.
  """

  def __init__(
    self,
    llm: llm_lib.LLM,
    tokenizer: Any = None,
    *,
    ended_by: Sequence[int] = (),
    on_update: str = 'recompute',
  ) -> None:
    self._llm = llm
    self._tokenizer = tokenizer
    self._ended_by = tuple(ended_by)
    self._on_update = on_update
    self._running: background.Background | None = None
    self._staged: tuple[Any, int] | None = None
    self._synced: collections.deque[str] = collections.deque(maxlen=_MOST_TOLD)

  # -- Its life --

  def initialize(self) -> None:
    """Does nothing: an LLM is compiled when it is made."""

  async def start(self, **kwargs: Any) -> None:
    """Lets a thread generate; nobody else may use the LLM until `stop`."""
    del kwargs
    if self._running is None:
      self._running = self._llm.background()

  async def stop(self, **kwargs: Any) -> None:
    """Cancels what is sampled, and ends the thread."""
    del kwargs
    running, self._running = self._running, None
    if running is not None:
      await asyncio.to_thread(running.close)

  async def pause(self, **kwargs: Any) -> None:
    """Makes no step until `resume`."""
    del kwargs
    await asyncio.to_thread(self._thread.pause)

  async def resume(self, **kwargs: Any) -> None:
    """Goes on after `pause`."""
    del kwargs
    await asyncio.to_thread(self._thread.resume)

  async def get_mesh(self, **kwargs: Any) -> jax.sharding.Mesh:
    """Returns the mesh ('pp', 'tp') that is sampled on."""
    del kwargs
    return self._llm.mesh

  async def get_load_info(self, **kwargs: Any) -> Any:
    """Returns a LoadInfo."""
    del kwargs
    engine = self._llm.engine
    stats = await asyncio.to_thread(self._thread.call, engine.stats)
    return _types().LoadInfo(
      num_requests_waiting=stats.num_waiting,
      num_requests_running=stats.num_running,
      kv_cache_usage_perc=1 - stats.num_free_pages / stats.num_pages,
    )

  # -- Sampling --

  async def sample(self, sampling_requests: Any, **kwargs: Any) -> Any:
    """Continues prompts, all at once.

    Args:
      sampling_requests: a SamplingRequest or a prompt, or a sequence of them.
      **kwargs: `return_logprobs`, for all.

    Returns:
      A SamplingResponse each, in a list if they were in a sequence.

    Raises:
      InvalidRequestError: one can't be served; none was started.
      UnsupportedError: it asks for logits, experts or beams, or all for
        something else.
    """
    asks = bool(kwargs.pop('return_logprobs', False))
    if kwargs:
      raise errors.UnsupportedError(
        f'{min(kwargs)}: is not supported; say it in sampling_params.'
      )
    are_several = isinstance(sampling_requests, (list, tuple)) and not (
      sampling_requests and isinstance(sampling_requests[0], (int, np.integer))
    )
    requests = list(sampling_requests) if are_several else [sampling_requests]
    submitted = self._thread.submit(
      [self._prompt(getattr(r, 'prompt', r)) for r in requests],
      [self._sampling(getattr(r, 'sampling_params', None)) for r in requests],
    )
    done = await asyncio.wrap_future(submitted)
    responses = [
      self._response(request, one, asks)
      for request, one in zip(requests, done, strict=True)
    ]
    return responses if are_several else responses[0]

  def _prompt(self, prompt: Any) -> Any:
    if isinstance(prompt, str) and self._tokenizer is not None:
      tokens = list(self._tokenizer.encode(prompt))
      begin = getattr(self._tokenizer, 'bos_id', lambda: None)()
      if begin and tokens[:1] != [begin]:
        tokens.insert(0, begin)
      return list(map(int, tokens))
    if isinstance(prompt, (np.ndarray, jax.Array)):
      return np.asarray(prompt).reshape(-1).tolist()
    return prompt

  def _sampling(self, params: Any) -> types.SamplingParams:
    for name, neutral in _NOT_SERVED.items():
      if (value := getattr(params, name, neutral)) != neutral:
        raise errors.UnsupportedError(f'{name}={value!r}: is not supported.')

    def field(name: str, default: Any) -> Any:
      value = getattr(params, name, None)
      return default if value is None else value

    return types.SamplingParams(
      max_tokens=field('max_tokens', 64),
      temperature=field('temperature', 1.0),
      top_p=field('top_p', 1.0),
      top_k=field('top_k', 0),
      seed=getattr(params, 'seed', None),
      logprobs_mode='temperature',
      stop_token_ids=self._ended_by,
    )

  def _response(self, request: Any, done: types.Completion, asks: bool) -> Any:
    params = getattr(request, 'sampling_params', None)
    tokens = np.array(done.token_ids, np.int32)
    text = done.text
    if self._tokenizer is not None:
      ended = done.finish_reason is types.FinishReason.STOP
      text = self._tokenizer.decode(tokens[: len(tokens) - ended].tolist())
    return _types().SamplingResponse(
      request_id=getattr(request, 'request_id', ''),
      metadata={
        'versions': [tuple(span) for span in done.versions],
        'policy_version': done.versions[-1].version if done.versions else 0,
      },
      text=text,
      prompt_token_ids=np.array(done.prompt_token_ids, np.int32),
      token_ids=tokens,
      logprobs=(
        np.array(done.logprobs, np.float32)
        if asks or getattr(params, 'return_logprobs', False)
        else None
      ),
      finish_reason=_FINISH_REASONS[done.finish_reason],
    )

  # -- New weights --

  def get_target_state(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the leaves that `weight_sync` takes, by their names."""
    return self._llm.wanted_params

  async def get_weight_sync_metadata(self, **kwargs: Any) -> dict[str, Any]:
    """Returns the mesh, and what `get_target_state` does."""
    del kwargs
    return {'mesh': self._llm.mesh, 'state': self.get_target_state()}

  async def bind_weight_sync(
    self, sync_request: Any = None, **kwargs: Any
  ) -> None:
    """Does nothing: weights are handed over in the process."""

  async def pre_weight_sync(
    self, sync_request: Any = None, **kwargs: Any
  ) -> None:
    """Forgets weights that came and were not served."""
    del sync_request, kwargs
    self._staged = None

  async def weight_sync(self, sync_request: Any = None, **kwargs: Any) -> None:
    """Takes new weights, which `post_weight_sync` has served.

    Args:
      sync_request: a WeightSyncRequest, with `weights`.
      **kwargs: unused.

    Raises:
      ConfigError: they are not the model's.
      UnsupportedError: there are none: they are not fetched from elsewhere.
    """
    del kwargs
    weights = getattr(sync_request, 'weights', None)
    if weights is None:
      raise errors.UnsupportedError(
        'weights=None: weights are taken from the process; a transport between '
        'machines is not supported.'
      )
    self._llm.check_params(weights)
    self._staged = weights, int(sync_request.policy_version)
    self._synced.append(str(getattr(sync_request, 'request_id', '')))

  async def post_weight_sync(
    self, sync_request: Any = None, **kwargs: Any
  ) -> None:
    """Serves what `weight_sync` took; tokens have its policy version."""
    del sync_request, kwargs
    update = self._thread.update_params
    staged, self._staged = self._staged, None
    if staged is not None:
      weights, version = staged
      await asyncio.to_thread(
        update, weights, version=version, on_update=self._on_update
      )

  async def abort_weight_sync(
    self, sync_request: Any = None, **kwargs: Any
  ) -> None:
    """Forgets what `weight_sync` took; the old weights are served."""
    del sync_request, kwargs
    self._staged = None

  async def get_transfer_status(self, req_id: str, **kwargs: Any) -> str:
    """Returns 'SUCCESS' if the weights of a request have come, or 'UNKNOWN'."""
    del kwargs
    return 'SUCCESS' if req_id in self._synced else 'UNKNOWN'

  async def migrate_kv_cache(
    self,
    source_server_id: str,
    target_server_id: str,
    token_ids: list[int],
    **kwargs: Any,
  ) -> bool:
    """Raises UnsupportedError: what was computed stays where it is."""
    raise errors.UnsupportedError('migrate_kv_cache: is not supported.')

  @property
  def _thread(self) -> background.Background:
    if self._running is None:
      raise errors.BusyError('SarathiSampler: is not started; call start.')
    return self._running
