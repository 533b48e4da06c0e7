# SPDX-License-Identifier: Apache-2.0
"""`LLM`: the engine inside a JAX program; command lines build theirs by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import functools
import itertools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import opening
from sarathi_jax import types
from sarathi_jax.in_process import adapters as adapters_lib
from sarathi_jax.in_process import building
from sarathi_jax.in_process import layouts
from sarathi_jax.in_process import live as live_lib
from sarathi_jax.in_process import progress
from sarathi_jax.in_process import requests as requests_lib
from sarathi_jax.in_process import runs as runs_lib
from sarathi_jax.in_process import scoring
from sarathi_jax.in_process import served
from sarathi_jax.in_process import tokenizing
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import hosts
from sarathi_jax.runner import memory
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import params as params_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import settings
from sarathi_jax.runner import weights as weights_lib
from sarathi_jax.text import chats
from sarathi_jax.text import collector
from sarathi_jax.text import tokenizer as tokenizer_lib

Params = served.Params
Prompt = tokenizer_lib.Prompt
OnCompiled = served.OnCompiled
AdapterNames = str | None | Sequence[str | None]


class LLM(served.Served):
  """A language model that continues prompts, for use inside JAX programs.

    llm = LLM.from_checkpoint('/path/to/checkpoint')
    done, = llm.generate('Once upon', SamplingParams(temperature=0))
    print(done.text, done.logprobs)

  With live arrays, in a training loop on the same devices:

    llm = LLM(model_config, params=state.params, tokenizer='/its/folder')
    for batch in data:
      state = train_step(state, batch)    # may donate the old state
      llm.update_params(state.params)     # no copy, no compile
      rollouts = llm.generate(prompts, SamplingParams(seed=step))

  A train step that donates its state deletes the weights that are served:
  call `update_params` with the new ones before anything is generated again.

  Making an LLM compiles every step, shows that on standard error, and keeps
  the steps for the next start (`EngineConfig.compilation_cache_dir`). After
  that it uses no threads and no event loop. One thread at a time may use it: a
  second one gets a BusyError that names the first, and nothing is lost.
  Ctrl-C, or a notebook's stop button, ends a `generate` or `stream` between
  two steps, and leaves the LLM intact.

  Args:
    model: the model's configuration.
    params: its weights, a tree of jax.Arrays; see `models.param_specs`. They
      are not copied, so they must not be donated or deleted while this serves
      them.
    layout: whose tree `params` is, if it is not as `models.param_specs` says: a
      name in `in_process.layouts.LAYOUTS`, such as 'nnx' or 'maxtext', or a
      table of your own. What does not lie as ours is copied, leaf by leaf.
    mesh: where to run; None for where the weights are, or for `config.tp *
      config.pp` devices. Weights that lie there as the model needs them (see
      `runner.placement`) are served as they are; others are copied there.
    axis_names: which axes of `mesh` are used as 'tp' and 'pp', such as
      {'tp': 'model'} or {'tp': ('fsdp', 'model')}; None: those named so.
    tokenizer: the folder of one, a fast tokenizer of transformers, or a
      tokenizers.Tokenizer; None for token ids only.
    config: of the engine.
    eos_token_ids: tokens that end a sequence, () for none. By default those
      that the tokenizer's folder names, as a checkpoint's would, or the
      tokenizer itself. Must be given where neither names any.
    model_name: a name for people.
    default_sampling: fields of `SamplingParams` for requests without them.
    adapters: LoRA adapters that requests may ask for by name, trees of live
      arrays; see `in_process.adapters.Source.read`.
    on_compiled: told how many steps are compiled, of how many, instead of a
      bar on standard error.

  Raises:
    ConfigError: params, model or config don't fit each other or the device;
      or the tokenizer is of another kind, or doesn't say where to stop.
  """

  def __init__(
    self,
    model: model_config_lib.ModelConfig,
    params: Params = None,
    *,
    layout: str | layouts.Layout | Sequence[layouts.Leaf] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis_names: mesh_lib.AxisNames | None = None,
    tokenizer: Any = None,
    config: config_lib.EngineConfig | None = None,
    eos_token_ids: int | Iterable[int] | None = None,
    model_name: str = '',
    default_sampling: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
    on_compiled: OnCompiled | None = None,
  ) -> None:
    config = config_lib.or_default(config)
    if not isinstance(model, model_config_lib.ModelConfig):
      raise errors.ConfigError(
        f'model: is a {type(model).__module__}.{type(model).__name__}; must be '
        'a ModelConfig, as of opening.open_checkpoint. A checkpoint is '
        'served by LLM.from_checkpoint.'
      )
    self._live = live_lib.LiveParams(model.divided(config), layout)
    model = self._live.model
    words = tokenizing.tokenizer_of(tokenizer)
    eos_token_ids = tokenizing.known_eos_token_ids(
      eos_token_ids, tokenizer, words, model.vocab_size
    )
    dtype = None if config.dtype == config_lib.AUTO else jnp.dtype(config.dtype)
    params = self._live.read(params, dtype)
    source = adapters_lib.Source(model)
    config, loaded = source.begin(config, adapters)
    with settings.own():
      mesh = building.make_mesh(
        model,
        config,
        users=mesh,
        axis_names=axis_names,
        home=params_lib.devices_of(params),
      )
      lies = placement.of_live(self._live.dtype_of(params, dtype))
      self._live.begin(mesh, lies.dtype)
      self._start(
        model,
        weights_lib.place_live(model, mesh, lies, self._live.as_ours(params)),
        lies,
        mesh,
        config,
        on_compiled,
        source,
        adapters=loaded,
        tokenizer=words,
        eos_token_ids=eos_token_ids,
        model_name=model_name,
        default_sampling=default_sampling,
      )

  def _start(self, *placed: Any, **engine: Any) -> None:
    super()._start(*placed, **engine)
    self._requests = functools.partial(
      requests_lib.make, self.engine, itertools.count()
    )

  @classmethod
  def from_checkpoint(
    cls,
    path: str | pathlib.Path,
    *,
    config: config_lib.EngineConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis_names: mesh_lib.AxisNames | None = None,
    cache_dir: str | pathlib.Path | None = None,
    convert: bool = True,
    sampling_defaults: bool = True,
    allow_nonfinite: bool = False,
    model_name: str | None = None,
    adapters: Mapping[str, Any] | None = None,
    leader: hosts.Leader | None = None,
    on_loaded: OnCompiled | None = None,
    on_compiled: OnCompiled | None = None,
  ) -> LLM:
    """Loads a converted checkpoint, or a Hugging Face one.

    Args:
      path: folder of either kind, or a hub id.
      config: of the engine.
      mesh, axis_names: see `LLM`; None: `config.tp * config.pp` devices.
      cache_dir: folder that keeps converted Hugging Face checkpoints; None for
        `config.default_cache_dir`.
      convert: whether to convert and keep a Hugging Face checkpoint; if not,
        its tensors are read slice by slice.
      sampling_defaults: whether the sampling that a checkpoint's makers
        recommend is the default of requests.
      allow_nonfinite: whether weights may be NaN or infinite.
      model_name: a name for people; by default, `path` as it is given.
      adapters: see `LLM`; folders or hub ids of PEFT's, too.
      leader: the first process's end of the connections, where several
        processes serve; see `runner.hosts`.
      on_loaded: told how many arrays are loaded, of how many, instead of a bar
        on standard error.
      on_compiled: see `LLM`.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged or not
        supported.
    """
    config = config_lib.or_default(config)
    if not isinstance(path, (str, os.PathLike)):
      raise errors.ConfigError(f'path={path!r}: must be a folder, or a hub id.')
    make_mesh = functools.partial(
      building.make_mesh, config=config, users=mesh, axis_names=axis_names
    )
    opened = opening.open_checkpoint(
      path,
      cache_dir or config_lib.default_cache_dir(),
      convert=convert,
      sampling_defaults=sampling_defaults,
      allow_nonfinite=allow_nonfinite,
      on_model=make_mesh,
    )
    metadata = opened.metadata
    model = metadata.model.divided(config)
    source = adapters_lib.Source(model, metadata)
    config, loaded = source.begin(config, adapters)
    with settings.own():
      mesh = make_mesh(model)
      layout = placement.choose_layout(
        model, config.dtype, metadata.dtype, mesh
      )
      memory.check_weights(model, config, mesh, layout)
      with progress.told(on_loaded, 'Loading weights') as tell:
        placed = weights_lib.load(
          model, mesh, layout, opened.read, on_loaded=tell
        )
      llm = object.__new__(cls)
      llm._live = live_lib.LiveParams(model)
      llm._start(
        model,
        placed,
        layout,
        mesh,
        config,
        on_compiled,
        source,
        leader,
        adapters=loaded,
        tokenizer=tokenizer_lib.Tokenizer.from_folder(opened.folder),
        eos_token_ids=metadata.eos_token_ids,
        default_sampling=metadata.default_sampling,
        model_name=str(path) if model_name is None else model_name,
      )
    return llm

  def generate(
    self,
    prompts: Prompt | Sequence[Prompt],
    sampling: types.SamplingParams
    | Sequence[types.SamplingParams]
    | None = None,
    *,
    adapter: AdapterNames = None,
  ) -> list[types.Completion]:
    """Continues prompts, all at once, and waits until the last is done.

    Outputs of one prompt (`SamplingParams.n`) share what is kept of it.

    Args:
      prompts: texts, lists of token ids, or chats (lists of messages); one or
        a list of them.
      sampling: one for all of them, or one each; None: what the makers of the
        checkpoint recommend (`engine.info.default_sampling`).
      adapter: the name of a LoRA adapter, or None for the model as it is; one
        for all of them, or one each.

    Returns:
      The completions of each prompt, `SamplingParams.n` of them, in order.

    Raises:
      InvalidRequestError: a prompt can't be served; none was started.
      BusyError: another thread uses this LLM; none was started.
      ConfigError: the weights were donated; see `update_params`.
      EngineDeadError: a step failed; make a new LLM.
    """
    requests = self._requests(prompts, sampling, adapter)
    collected = {r.request_id: collector.Collector(r) for r in requests}
    done: dict[str, list[types.Completion]] = {}
    run = runs_lib.Run(self._runs, requests, 'generate')
    try:
      with self._runs.turns.take('generate'):
        for delta in run:
          if completions := collected[delta.request_id].add(delta):
            done[delta.request_id] = completions
    finally:
      run.close()
    return [done_of for r in requests for done_of in done[r.request_id]]

  def score(
    self,
    prompts: Prompt | Sequence[Prompt],
    completions: Iterable[Sequence[int]],
    temperature: float = 1.0,
    *,
    adapter: str | None = None,
  ) -> list[scoring.Logprobs]:
    """Returns the log-probabilities of completions that are given.

    They are by the steps that sample: chunks of prompts, packed as all are.

    Args:
      prompts: see `generate`.
      completions: for each prompt the token ids that follow it, none to as many
        as the model takes.
      temperature: that logits are divided by first, if it is not 0.
      adapter: see `generate`; one for all.

    Returns:
      For each completion, of each of its tokens, float32 (natural logarithm);
      NaN where logits are not finite.

    Raises:
      See `generate`; InvalidRequestError, too, for another number of
        completions, and for texts.
    """
    begun = self._requests(prompts, scoring.asked((), temperature), adapter)
    given = scoring.listed(completions, len(begun), self.engine.info.vocab_size)
    asked = [pair for pair in zip(begun, given, strict=True) if pair[1]]
    done = self.generate(
      [[*request.prompt_token_ids, *tokens[:-1]] for request, tokens in asked],
      [scoring.asked(tokens, temperature) for _, tokens in asked],
      adapter=adapter,
    )
    answers = iter(done)
    return [scoring.read(answers, len(tokens)) for tokens in given]

  def chat(
    self,
    messages: Sequence[tokenizer_lib.Message]
    | Sequence[Sequence[tokenizer_lib.Message]],
    sampling: types.SamplingParams
    | Sequence[types.SamplingParams]
    | None = None,
    *,
    adapter: AdapterNames = None,
    **options: Any,
  ) -> list[types.Completion]:
    """Replies to chats, and tells apart what the replies say.

    Args:
      messages: of one chat, or of several.
      sampling, adapter: see `generate`.
      **options: tools, tool_choice, parallel_tool_calls and
        chat_template_kwargs of each chat; see `text.chats.Chat`.

    Returns:
      The completions of each chat, in order, with their `reply`.

    Raises:
      See `generate`.
    """
    are_several = isinstance(messages, (list, tuple)) and not (
      messages and isinstance(messages[0], Mapping)
    )
    several: Any = messages if are_several else [messages]
    prompts = [chats.Chat(messages=chat, **options) for chat in several]
    completions = self.generate(prompts, sampling, adapter=adapter)
    return requests_lib.with_replies(self.engine, prompts, completions)

  def stream(
    self,
    prompt: Prompt,
    sampling: types.SamplingParams | None = None,
    *,
    adapter: str | None = None,
  ) -> runs_lib.Run:
    """Continues one prompt, token by token; outputs come as they are made.

    Leaving the loop early aborts the request. Several streams may be read in
    turn, and `generate` called in between: their requests share the steps.

    Returns:
      An iterator over what the request gains. It raises BusyError while
      another thread uses this LLM, and can be read on after that.

    Raises:
      InvalidRequestError: it can't be served.
    """
    return runs_lib.Run(
      self._runs, self._requests([prompt], sampling, adapter), 'stream'
    )
