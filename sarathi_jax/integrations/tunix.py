# SPDX-License-Identifier: Apache-2.0
"""Rollouts of tunix's learners, of google-tunix 0.1.7.

  cluster_config = rl_cluster.ClusterConfig(
    rollout_engine=tunix.SarathiRollout, ...
  )

or `functools.partial(tunix.SarathiRollout, config=EngineConfig(...))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import threading
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from sarathi_jax.integrations import tunix_models

try:
  from tunix.rl.rollout import base_rollout
except ModuleNotFoundError as error:
  raise ImportError(
    'sarathi_jax.integrations.tunix needs google-tunix with all that it needs, '
    f'and there is no {error.name}: pip install "sarathi-jax[tunix]".'
  ) from error

# Sequences of the most tokens that the KV cache has room for, if the engine's
# configuration doesn't say how large it is.
_NUM_SEQS = 64
_NUM_SEEDS = 2**62


class SarathiRollout(base_rollout.BaseRollout):
  """Continues prompts by an `LLM` that serves the trainer's own arrays.

  Several threads may use it; they take turns.

  Attributes:
    llm: the engine. `llm.sleep()` gives the KV cache's memory to the trainer;
      `generate` takes it again.
  """

  def __init__(
    self,
    rollout_actor: nnx.Module,
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    rollout_config: base_rollout.RolloutConfig,
    *,
    config: config_lib.EngineConfig | None = None,
    axis_names: Mapping[str, str | Sequence[str]] | None = None,
    on_compiled: llm_lib.OnCompiled | None = None,
  ) -> None:
    """Compiles the steps. Called by tunix, but for the last three arguments.

    Args:
      rollout_actor: the model, one of `tunix_models.FAMILIES`.
      tokenizer: tunix's TokenizerAdapter.
      mesh: of Role.ROLLOUT.
      rollout_config: in training. Its lengths say how long a sequence may be,
        if `config` doesn't; its `data_type` what is served in, if it is not
        what the model computes in.
      config: of the engine. By default, its KV cache has room for 64 sequences
        of full length.
      axis_names: which axes of `mesh` are used as 'tp' and 'pp'; by default all
        of them as 'tp': weights that are sharded over 'fsdp', too, are gathered
        and shared by heads, columns and vocabulary.
      on_compiled: see `LLM`.

    Raises:
      ConfigError: the model is another, has adapters (LoRA), or can't be
        divided so; or it doesn't fit.
    """
    self._stand_in = _stand_in(rollout_actor)
    self._tokenizer = tokenizer
    self._temperature = float(rollout_config.temperature)
    self._turn = threading.Lock()
    family = tunix_models.family_of(type(rollout_actor))
    theirs: Any = rollout_actor.config  # type: ignore[attr-defined]
    config = _engine_config(config, rollout_config)
    leaves = _leaves_of(nnx.state(rollout_actor))
    dtype = jnp.dtype(
      rollout_config.data_type
      or getattr(theirs, 'dtype', None)
      or next(iter(leaves.values())).dtype
    )
    self.llm = llm_lib.LLM(
      tunix_models.read_config(family, theirs, config.max_model_len or 0),
      leaves,
      layout='tunix',
      mesh=mesh,
      axis_names=axis_names or {'tp': mesh.axis_names},
      config=dataclasses.replace(config, dtype=dtype.name),
      eos_token_ids=(),
      model_name=type(rollout_actor).__name__,
      on_compiled=on_compiled,
    )

  def generate(
    self,
    prompts: list[str],
    rollout_config: base_rollout.RolloutConfig,
    **kwargs: Any,
  ) -> base_rollout.RolloutOutput:
    """Continues prompts; equal ones behind one another are computed once.

    A temperature of 0 takes the likeliest token; `top_p` None is 1, and `top_k`
    None, 0 or -1 all tokens. With a `seed`, a call's outputs are the same each
    time, and those of equal prompts differ; without, they are others.

    Returns:
      Tokens with the one that ended them, as of tunix's vLLM, and texts
      without, as of its own sampler. Log-probabilities are of the logits
      divided by the temperature, if `return_logprobs`. Prompts are padded to
      `max_prompt_length`, or, where one is longer, to the next power of two.

    Raises:
      InvalidRequestError: a prompt leaves no room to continue it.
      StepError: the weights give logits that are not finite.
    """
    if kwargs:
      raise errors.UnsupportedError(
        f'{min(kwargs)}: is not supported; prompts must be texts.'
      )
    ended_by = rollout_config.eos_tokens or [self.eos_id()]
    sampling = types.SamplingParams(
      max_tokens=rollout_config.max_tokens_to_generate,
      temperature=rollout_config.temperature,
      top_p=1.0 if rollout_config.top_p is None else rollout_config.top_p,
      top_k=rollout_config.top_k,
      logprobs_mode='temperature',
      stop_token_ids=tuple(ended_by),
      ignore_eos=True,
    )
    tokens = [self._tokenize(prompt) for prompt in prompts]
    groups = list(
      _groups(
        tokens,
        1 if not sampling.temperature else self.llm.engine.info.max_num_seqs,
      )
    )
    first = _first_seed(rollout_config.seed)
    starts = itertools.accumulate((n for _, n in groups), initial=0)
    with self._turn:
      self.llm.wake()
      done = self.llm.generate(
        [list(prompt) for prompt, _ in groups],
        [
          dataclasses.replace(
            sampling, n=n, seed=None if first is None else first + start
          )
          for (_, n), start in zip(groups, starts, strict=False)
        ],
      )
    for i, one in enumerate(done):
      if one.finish_reason is types.FinishReason.ERROR:
        raise errors.StepError(
          f'prompts[{i}]: the weights give logits that are not finite.'
        )
    return base_rollout.RolloutOutput(
      text=[self._text(one.token_ids, ended_by) for one in done],
      logits=[],
      tokens=[np.array(one.token_ids, np.int32) for one in done],
      left_padded_prompt_tokens=self._padded(
        tokens, rollout_config.max_prompt_length
      ),
      logprobs=(
        [np.array(one.logprobs, np.float32) for one in done]
        if rollout_config.return_logprobs
        else None
      ),
    )

  def get_per_token_logps(
    self, prompt_tokens: jax.Array, completion_tokens: jax.Array
  ) -> jax.Array:
    """Returns log-probabilities as the learner's loss has them.

    They are of the logits divided by the temperature of training.

    Args:
      prompt_tokens: [B, P], padded.
      completion_tokens: [B, C], padded.

    Returns:
      [B, C] float32; 0 where there is padding.
    """
    pad = self.pad_id()
    prompts, completions = map(np.asarray, (prompt_tokens, completion_tokens))
    is_token = completions != pad
    with self._turn:
      self.llm.wake()
      scores = self.llm.score(
        [row[row != pad].tolist() for row in prompts],
        [row[mask] for row, mask in zip(completions, is_token, strict=True)],
        self._temperature,
      )
    found = np.zeros(completions.shape, np.float32)
    found[is_token] = np.concatenate(scores)
    return jnp.asarray(found)

  def update_params(
    self, params: Any, filter_types: tuple[Any, ...] | None = None
  ) -> None:
    """Serves new weights from now on.

    Args:
      params: an nnx.State of the model.
      filter_types: what it was filtered by.

    Raises:
      ConfigError: they are not those of the model, or not on a device; the old
        ones stay.
    """
    del filter_types  # `params` says it.
    leaves = _leaves_of(params)
    with self._turn:
      self.llm.update_params(leaves)

  def pad_id(self) -> int:
    """Returns the tokenizer's."""
    return int(self._tokenizer.pad_id())

  def eos_id(self) -> int:
    """Returns the tokenizer's."""
    return int(self._tokenizer.eos_id())

  def model(self) -> nnx.Module:
    """Returns a model without arrays.

    tunix looks here whether arrays are the trainer's, and if so hands over no
    new ones: but its modules get others as they learn.
    """
    return self._stand_in

  def _tokenize(self, prompt: str) -> tuple[int, ...]:
    """Returns a prompt's token ids, as tunix's samplers do."""
    begin = self._tokenizer.bos_id()
    tokens = [begin] * bool(begin) + list(self._tokenizer.encode(prompt))
    return tuple(map(int, self._tokenizer.dedup_bos_ids(tokens)))

  def _text(self, tokens: Sequence[int], ended_by: Sequence[int]) -> str:
    has_end = bool(tokens) and tokens[-1] in ended_by
    text: str = self._tokenizer.decode(list(tokens[: len(tokens) - has_end]))
    return text

  def _padded(self, tokens: Sequence[Sequence[int]], width: int) -> np.ndarray:
    longest = max(map(len, tokens))
    if longest > width:
      width = 1 << (longest - 1).bit_length()
    padded = np.full((len(tokens), width), self.pad_id(), np.int32)
    for row, prompt in zip(padded, tokens, strict=True):
      row[width - len(prompt) :] = prompt
    return padded


def _engine_config(
  config: config_lib.EngineConfig | None,
  rollout_config: base_rollout.RolloutConfig,
) -> config_lib.EngineConfig:
  """Fills in what the lengths of rollouts say."""
  config = config or config_lib.EngineConfig(grammars=False)
  if config.max_model_len is None:
    config = dataclasses.replace(
      config,
      max_model_len=max(
        rollout_config.kv_cache_size,
        rollout_config.max_prompt_length
        + rollout_config.max_tokens_to_generate,
      ),
    )
  assert config.max_model_len is not None
  if config.num_pages is None and config.kv_cache_gib is None:
    pages = -(-config.max_model_len // config.page_size)
    config = dataclasses.replace(config, num_pages=_NUM_SEQS * pages)
  return config


class _Elsewhere:
  """What a model without arrays has in their places."""

  @property
  def sharding(self) -> Any:
    raise errors.ConfigError(
      'offload_to_cpu: is not supported; use ClusterConfig('
      'offload_to_cpu=False), and llm.sleep for memory.'
    )


def _stand_in(model: nnx.Module) -> nnx.Module:
  graphdef, state = nnx.split(model)
  stand_in: nnx.Module = nnx.merge(
    graphdef, jax.tree.map(lambda _: _Elsewhere(), state)
  )
  return stand_in


def _leaves_of(params: Any) -> dict[str, jax.Array]:
  """Returns the arrays of an nnx.State by their names.

  Raises:
    ConfigError: there are adapters, or arrays that are not on a device.
  """
  leaves = {}
  for path, variable in nnx.to_flat_state(params):
    name = '.'.join(map(str, path))
    if isinstance(variable, nnx.LoRAParam):
      raise errors.ConfigError(
        f'params.{name}: is an adapter (LoRA), which is not served; train all '
        'weights.'
      )
    if not isinstance(variable, nnx.Param):
      continue
    leaf = variable.get_value()
    kind = leaf.sharding.memory_kind
    (device, *_) = leaf.sharding.device_set
    if kind not in (None, device.default_memory().kind):
      raise errors.ConfigError(
        f'params.{name}: is in {kind} memory; weights must be on devices: '
        'ClusterConfig(offload_to_cpu=False).'
      )
    leaves[name] = leaf
  return leaves


def _groups(
  prompts: Sequence[tuple[int, ...]], most: int
) -> list[tuple[tuple[int, ...], int]]:
  """Returns prompts, and how many equal ones are behind one another."""
  groups = []
  for prompt, alike in itertools.groupby(prompts):
    num = len(list(alike))
    while num > 0:
      groups.append((prompt, min(num, most)))
      num -= most
  return groups


def _first_seed(seed: Any) -> int | None:
  """Returns the seed of the first output; each next one has one more.

  Keys that differ give seeds that are far apart.
  """
  if seed is None:
    return None
  if isinstance(seed, jax.Array) and jnp.issubdtype(
    seed.dtype, jax.dtypes.prng_key
  ):
    seed = jax.random.key_data(seed)
  number = 0
  for word in np.asarray(seed).reshape(-1).tolist():
    number = (number << 32) ^ int(word)
  return (number * 0x9E3779B97F4A7C15) % _NUM_SEEDS
