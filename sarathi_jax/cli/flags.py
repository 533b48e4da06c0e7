# SPDX-License-Identifier: Apache-2.0
"""The flags that all mains share: they make an `EngineConfig`. No JAX."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from absl import flags

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler
from sarathi_jax.cli import deployment
from sarathi_jax.text import reply_formats

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # They are of the main that asks for them.

# Field of EngineConfig -> (kind of flag, help). If a flag is not given, the
# value is that of --config, else the default.
_ENGINE_FLAGS: dict[str, tuple[Any, str]] = {
  'policy': (
    flags.DEFINE_string,
    'Scheduling policy: sarathi, vllm, orca or faster_transformer.',
  ),
  'token_budget': (
    flags.DEFINE_integer,
    'The most tokens that a step computes.',
  ),
  'max_num_seqs': (
    flags.DEFINE_integer,
    'The most sequences that run at once.',
  ),
  'max_adjusted_seqs': (
    flags.DEFINE_integer,
    'The most sequences at once with penalties, biases, tokens or words that '
    'are ruled out, or a least length: each takes 8 bytes of the device for '
    'each token of the vocabulary, and more wait. Default: --max_num_seqs, as '
    'far as 256 MiB go.',
  ),
  'grammars': (
    flags.DEFINE_bool,
    'Whether outputs may follow grammars (structured outputs), which takes 4 '
    'bytes of the device for each token of the vocabulary and sequence.',
  ),
  'max_model_len': (
    flags.DEFINE_integer,
    'The most tokens of a sequence, prompt and output '
    'together. Default: what the model was made for.',
  ),
  'page_size': (flags.DEFINE_integer, 'Tokens in a page of the KV cache.'),
  'num_pages': (
    flags.DEFINE_integer,
    'Number of pages in the KV cache. Default: as many as fit.',
  ),
  'kv_cache_gib': (
    flags.DEFINE_float,
    'Size of the KV cache, GiB. Default: what is free on a GPU, 1 on a CPU.',
  ),
  'memory_utilization': (
    flags.DEFINE_float,
    "Fraction of each device's memory to use, in "
    "(0, 1], where the KV cache's size is not given.",
  ),
  'look_ahead': (
    flags.DEFINE_bool,
    'Launch each step before the tokens of the last one are fetched.',
  ),
  'short_prompt_share': (
    flags.DEFINE_float,
    "Fraction of a step's prefill tokens that a prompt "
    'leaves to shorter prompts behind it.',
  ),
  'dtype': (
    flags.DEFINE_string,
    "Dtype to serve a checkpoint's weights in: "
    f"{', '.join(config_lib.DTYPES)}. auto is the checkpoint's own, but "
    'float32 on a CPU.',
  ),
  'kv_cache_dtype': (
    flags.DEFINE_string,
    f'Dtype of the KV cache: {", ".join(config_lib.KV_CACHE_DTYPES)}.',
  ),
  'quantized_activations': (
    flags.DEFINE_string,
    'Round what matrices of fp8 multiply to fp8, too, each token by a scale of '
    f'its own: {", ".join(config_lib.QUANTIZED_ACTIVATIONS)}. It changes '
    "numbers. Default: it stays in the model's dtype.",
  ),
  'tbt_slo_ms': (
    flags.DEFINE_float,
    'Time between tokens to aim at, milliseconds: the '
    'token budget of each step follows it, up to --token_budget. Default: '
    'each step may take --token_budget.',
  ),
  'ttft_slo_ms': (
    flags.DEFINE_float,
    'Time to the first token, milliseconds, beside what '
    'computing the prompt takes, at which --tbt_slo_ms gives way. Default: '
    'twenty times --tbt_slo_ms.',
  ),
  'batch_tbt_slo_ms': (
    flags.DEFINE_float,
    'Like --tbt_slo_ms, for requests of the tier batch. '
    'Default: requests of that tier limit no step.',
  ),
  'attention': (
    flags.DEFINE_string,
    'Implementation of attention: reference, xla, llvm, pallas_triton '
    'or pallas_mosaic. Default: chosen for the device.',
  ),
  'deterministic': (
    flags.DEFINE_bool,
    "Give each request's logits the same bits whatever else runs, and whether "
    'or not the prefix cache has its beginning. Each step then computes '
    '--token_budget tokens, however few there are.',
  ),
  'expert_parallel': (
    flags.DEFINE_bool,
    'Of a mixture of experts, give each of the --tp devices whole experts, '
    'and not columns of each.',
  ),
  'prefix_cache': (
    flags.DEFINE_bool,
    'Let prompts use the KV cache of what others, or earlier ones, began with.',
  ),
  'prefix_cache_misses': (
    flags.DEFINE_bool,
    'Find nothing in the prefix cache, but do all else: to measure what it '
    'saves.',
  ),
  'cache_aware_window': (
    flags.DEFINE_integer,
    'Number of waiting requests, the first ones of a priority and client, of '
    'which the one begins next that finds the most in the prefix cache; each '
    'is passed by fewer than so many. 1: first come, first served.',
  ),
  'max_loras': (
    flags.DEFINE_integer,
    'The most LoRA adapters in a step: the device has room for so many of '
    '--max_lora_rank, and requests for others wait. Each size of step is then '
    'compiled twice, with adapters and without. Default: as many as '
    '--lora_modules names; if none, there is no room for any.',
  ),
  'max_lora_rank': (
    flags.DEFINE_integer,
    'The highest rank of a LoRA adapter. Default: that of --lora_modules, or '
    '16.',
  ),
  'max_cpu_loras': (
    flags.DEFINE_integer,
    "The most LoRA adapters in the host's memory. With one more, that goes "
    'which no request asked for the longest, but for those of --lora_modules; '
    'it is read again when one does. Default: any number.',
  ),
  'tp': (
    flags.DEFINE_integer,
    'Tensor parallelism: number of devices that share each layer. Default: 1.',
  ),
  'pp': (
    flags.DEFINE_integer,
    'Pipeline parallelism: number of stages, of --tp devices each.',
  ),
  'seed': (
    flags.DEFINE_integer,
    'Seed of the random numbers of requests that give none.',
  ),
  'tool_parser': (
    flags.DEFINE_string,
    'How the model writes calls of tools: '
    f'{", ".join(reply_formats.TOOLS)}, none, or auto: by its chat template.',
  ),
  'reasoning_parser': (
    flags.DEFINE_string,
    'How the model writes what it thinks: '
    f'{", ".join(reply_formats.REASONING)}, none, or auto: by its chat '
    'template.',
  ),
}


def define_engine_flags() -> None:
  """Defines a flag for every field of EngineConfig, and --config."""
  flags.DEFINE_string(
    'config',
    None,
    'Deployment: a Python file with get_config() -> '
    'EngineConfig, or the name of one that comes with the package; see '
    'configs/. Other flags override its fields.',
  )
  flags.DEFINE_string(
    'cache_dir',
    str(config_lib.default_cache_dir()),
    'Folder to keep compiled steps and converted Hugging Face checkpoints in; '
    'empty: keep no compiled steps.',
  )
  default = config_lib.EngineConfig()
  flags.DEFINE_bool(
    'convert',
    True,
    'Convert a Hugging Face checkpoint once, into '
    '--cache_dir. --noconvert: read its tensors slice by slice at every start, '
    'and keep no copy.',
  )
  flags.DEFINE_bool(
    'sampling_defaults',
    True,
    "Take the sampling that a checkpoint's makers "
    'recommend for requests that do not say. It is an error if parts of it are '
    'not supported.',
  )
  flags.DEFINE_bool(
    'allow_nonfinite',
    False,
    'Serve a checkpoint even if some weights are NaN '
    'or infinite. Requests whose logits they ruin end with the reason error.',
  )
  flags.DEFINE_bool(
    'distributed',
    False,
    'Run as one of several processes, one per host, that '
    'share a model. --coordinator_address, --num_processes and --process_id '
    'are detected under SLURM, Open MPI and Kubernetes if not given.',
  )
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'HOST:PORT where the first of several processes waits for the others to '
    'join it.',
  )
  flags.DEFINE_float(
    'join_timeout_s',
    None,
    'Seconds that several processes wait for each other at the start. '
    'Default: 300.',
    0.0,
  )
  flags.DEFINE_string(
    'join_key_file',
    None,
    'File with the secret by which several processes know each other, the same '
    'on each host. Default: one in ~/.cache/sarathi_jax, which is made if '
    'there is none; that suffices where hosts share home directories.',
  )
  flags.DEFINE_integer(
    'num_processes',
    None,
    'Number of processes that share the model, one per host.',
    1,
  )
  flags.DEFINE_integer(
    'process_id',
    None,
    'Number of this process among those that share the '
    'model, from 0. Process 0 schedules and serves.',
    0,
  )
  for name, (define, text) in _ENGINE_FLAGS.items():
    value = getattr(default, name)
    define(name, None, text if value is None else f'{text} Default: {value}.')


def loading_from_flags() -> dict[str, Any]:
  """Returns how to open a checkpoint: arguments of `LLM.from_checkpoint`."""
  return {
    name: FLAGS[name].value
    for name in ('cache_dir', 'convert', 'sampling_defaults', 'allow_nonfinite')
  }


def define_adapter_flags() -> None:
  """Defines the flag that names adapters, for who serves them."""
  flags.DEFINE_list(
    'lora_modules',
    [],
    'LoRA adapters to serve beside the model, NAME=PATH,NAME=PATH: folders or '
    'hub ids of PEFT. Requests ask for them by name.',
  )


def adapters_from_flags() -> dict[str, str]:
  """Returns the adapters to serve: name -> folder or hub id.

  Raises:
    ConfigError: --lora_modules can't be read, or several hosts are to serve,
      which are not told how much room to make.
  """
  adapters: dict[str, str] = {}
  for text in FLAGS.lora_modules:
    name, sign, path = text.partition('=')
    config_lib.check(
      bool(name and sign and path) and name not in adapters,
      'lora_modules',
      text,
      'must be NAME=PATH, of names that differ',
    )
    adapters[name] = path
  config_lib.check(
    not adapters or FLAGS.max_loras or processes_from_flags() is None,
    'max_loras',
    FLAGS.max_loras,
    'must be said, and max_lora_rank, where several hosts serve adapters',
  )
  return adapters


def define_fields(**defaults: Any) -> None:
  """Defines the flags of some fields of EngineConfig, with these defaults."""
  for name, default in defaults.items():
    define, text = _ENGINE_FLAGS[name]
    define(name, default, text)


def processes_from_flags() -> dict[str, Any] | None:
  """Returns arguments of `runner.hosts.start`; None for a single process.

  Raises:
    ConfigError: the flags contradict each other.
  """
  names = ('coordinator_address', 'num_processes', 'process_id')
  given: dict[str, Any] = {name: FLAGS[name].value for name in names}
  more: dict[str, Any] = {
    name: FLAGS[name].value
    for name in ('join_timeout_s', 'join_key_file')
    if FLAGS[name].value is not None
  }
  if not FLAGS.distributed and given == dict.fromkeys(names):
    for name, value in more.items():
      config_lib.check(
        False,
        name,
        value,
        'is for several processes; say coordinator_address or distributed',
      )
    return None
  process, count = given['process_id'], given['num_processes']
  config_lib.check(
    process is None or count is None or process < count,
    'process_id',
    process,
    f'must be below num_processes={count}',
  )
  timeout_s = more.get('join_timeout_s', 1.0)
  config_lib.check(
    math.isfinite(timeout_s) and timeout_s > 0,
    'join_timeout_s',
    timeout_s,
    'must be seconds > 0',
  )
  return given | more


def engine_config_from_flags() -> config_lib.EngineConfig:
  """Returns the configuration that the flags ask for.

  Raises:
    ConfigError: it can't work, or --config can't be read. What depends on
      the model is checked when that is loaded.
  """
  config = (
    deployment.read(FLAGS.config).config
    if FLAGS.config
    else (config_lib.EngineConfig())
  )
  given: dict[str, Any] = {
    name: FLAGS[name].value
    for name in _ENGINE_FLAGS
    if FLAGS[name].value is not None
  }
  if config.compilation_cache_dir == config_lib.AUTO:
    given['compilation_cache_dir'] = (
      str(pathlib.Path(FLAGS.cache_dir).expanduser() / 'compiled')
      if FLAGS.cache_dir
      else None
    )
  config = dataclasses.replace(config, **given)
  scheduler.policy_class(config.policy)
  return config
