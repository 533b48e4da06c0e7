# SPDX-License-Identifier: Apache-2.0
"""How much each stage of `scripts/gpu_check` measures."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import itertools

from pallas_kernels.filter_threshold import arg_specs as filter_specs
from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import throughput
from sarathi_jax.benchmarks.gpu import attention as attention_lib
from sarathi_jax.benchmarks.gpu import engine
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.simulator import workload as workload_lib

Point = engine.Point
_KERNEL_TESTS = 'tests/pallas_kernels/ragged_paged_attention'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
  """How much is measured.

  Attributes:
    model, dtype, config: what is served.
    attention: the attention's implementation.
    kernel_spec: arguments, by name in `arg_specs`, to compare it with the
      reference on.
    copy_bytes, matmul_n: sizes of a copy and a matmul that show the device's
      limits.
    tests: arguments of pytest; those that count most first.
    points: steps, decodes first.
    varied: the step that is compiled by other choices of XLA.
    sweep, rest: the attention's points, those that count most and the others.
    dense: the implementation of jax.nn's attention to compare with.
    mosaic: points for Mosaic's kernels, all of them among the sweep's.
    tuned: batches for other sizes of tiles.
    num_tried: how many sizes of tiles are tried.
    quantized: the attention's points on quantized caches.
    written: tokens whose keys and values are put into pages, and whose sums
      are normalized.
    filtered: rows and tokens of logits that are filtered.
    workload: requests for the whole engine.
    idle: decodes in which to look for the device's waiting.
    chats: requests for the capacity.
    capacity_rows: policies and budgets whose capacity is searched.
  """

  model: model_config_lib.ModelConfig
  dtype: str
  config: config_lib.EngineConfig
  attention: str
  kernel_spec: str
  copy_bytes: int
  matmul_n: int
  tests: tuple[str, ...]
  points: tuple[Point, ...]
  varied: Point
  sweep: attention_lib.Sweep
  rest: attention_lib.Sweep
  dense: str
  mosaic: attention_lib.Sweep
  tuned: attention_lib.Sweep
  num_tried: int
  quantized: tuple[attention_lib.Sweep, ...]
  written: tuple[int, ...]
  filtered: tuple[tuple[int, int], ...]
  workload: throughput.Workload
  idle: Point
  chats: workload_lib.WorkloadConfig
  capacity_rows: tuple[str, ...]


def _full() -> Size:
  first = (
    *attention_lib.decodes(
      (64, 2048), (64, 1024), (1, 32768), (8, 2048), (128, 1024), (256, 512)
    ),
    *attention_lib.prefills(
      (2048, 0), (512, 0), (512, 4096), (2048, 8192), (8192, 0)
    ),
    *attention_lib.hybrids((64, 2048, 448, 4096)),
  )
  everything = (
    *attention_lib.decodes(
      *itertools.product(
        (1, 8, 32, 64, 128, 256), (512, 1024, 2048, 8192, 32768)
      )
    ),
    *attention_lib.prefills(
      *itertools.product((128, 512, 2048, 8192), (0, 4096, 32768))
    ),
    *attention_lib.hybrids((64, 1024, 448, 0), (128, 2048, 1920, 8192)),
  )
  return Size(
    model=throughput.MODELS['mistral-7b'],
    dtype='bfloat16',
    config=config_lib.EngineConfig(
      token_budget=2048, max_num_seqs=128, max_model_len=4096, num_pages=2304
    ),
    attention='pallas_triton',
    kernel_spec='hybrid_7b',
    copy_bytes=2**31,
    matmul_n=8192,
    # Each worker takes two tests at a time, from the first on.
    tests=(
      f'{_KERNEL_TESTS}/attention_test.py',
      'tests/pallas_kernels/rotate_and_write',
      'tests/pallas_kernels/add_and_norm',
      'tests/pallas_kernels',
      '-m',
      'gpu',
      '-n',
      '4',
      '--maxschedchunk=2',
    ),
    points=(
      Point(64, 2047, 1, profiled=True),
      Point(64, 2047, 1, filtered=True),
      Point(1, 2047, 1),
      Point(128, 1023, 1),
      Point(1, 0, 512, profiled=True),
      Point(1, 0, 2048, profiled=True),
      Point(1, 2048, 512),
    ),
    varied=Point(64, 2047, 1),
    sweep=attention_lib.Sweep(
      batches=first,
      compared=(
        'decode 64 x 2048',
        'decode 8 x 2048',
        'prefill 2048 after 0',
        'prefill 512 after 0',
        'prefill 8192 after 0',
      ),
    ),
    rest=attention_lib.Sweep(
      batches=tuple(batch for batch in everything if batch not in first)
    ),
    dense='cudnn',
    # Decodes are the other kernel's: what the launch more costs them.
    mosaic=attention_lib.Sweep(
      batches=(
        *attention_lib.prefills(
          (2048, 0), (512, 0), (512, 4096), (2048, 8192), (8192, 0)
        ),
        *attention_lib.decodes((64, 2048)),
        *attention_lib.hybrids((64, 2048, 448, 4096))[::2],
      )
    ),
    tuned=attention_lib.Sweep(
      pool_tokens=2**20,
      batches=(
        *attention_lib.decodes((64, 2048)),
        *attention_lib.prefills((2048, 4096)),
        attention_lib.hybrids((64, 2048, 448, 4096))[0],
      ),
    ),
    num_tried=5,
    quantized=tuple(
      attention_lib.Sweep(
        kv_dtype=kept,
        pool_tokens=2**20,
        batches=(
          *attention_lib.decodes(
            *itertools.product((1, 64, 256), (2048, 32768))
          ),
          *attention_lib.prefills((2048, 0), (2048, 8192)),
        ),
      )
      for kept in ('int8', 'float8_e4m3fn')
    ),
    written=(64, 512, 2048),
    filtered=(*filter_specs.SHAPES, (1, 152064)),
    workload=throughput.Workload(
      num_requests=256, prompt_lens=(32, 128, 512), output_lens=(16, 64, 128)
    ),
    idle=Point(64, 2047, 1),
    chats=workload_lib.WorkloadConfig(num_requests=96),
    capacity_rows=('vllm', 'sarathi 512', 'sarathi 2048', 'auto'),
  )


def _tiny() -> Size:
  """Makes a size to try the script: all stages, on any machine, in minutes."""
  small = attention_lib.Sweep(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    dtype='float32',
    page_size=16,
    pool_tokens=512,
    calls=1,
    batches=(),
  )
  lone = attention_lib.Sweep(
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    dtype='float32',
    page_size=32,
    pool_tokens=256,
    calls=1,
    batches=attention_lib.decodes((1, 32)),
  )
  return Size(
    model=model_config_lib.LlamaConfig(
      vocab_size=256,
      hidden_size=64,
      intermediate_size=96,
      num_layers=1,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      max_position_embeddings=256,
    ),
    dtype='float32',
    config=config_lib.EngineConfig(
      token_budget=32,
      max_num_seqs=8,
      max_model_len=256,
      num_pages=64,
      max_adjusted_seqs=0,
      grammars=False,
    ),
    attention='xla',  # Interpreted, the kernel takes a minute.
    kernel_spec='mixed',
    copy_bytes=2**20,
    matmul_n=128,
    tests=('tests/pallas_kernels/gpu_targets_test.py', '-n', '2'),
    points=(
      Point(4, 63, 1, profiled=True),
      Point(4, 63, 1, filtered=True),
      Point(1, 0, 32),
    ),
    varied=Point(4, 63, 1),
    sweep=dataclasses.replace(
      small,
      compared=('decode 4 x 64', 'prefill 32 after 0'),
      batches=(
        *attention_lib.decodes((4, 64)),
        *attention_lib.prefills((32, 0), (32, 64)),
        *attention_lib.hybrids((4, 64, 16, 16)),
      ),
    ),
    rest=dataclasses.replace(small, batches=attention_lib.decodes((1, 64))),
    dense='xla',
    mosaic=attention_lib.Sweep(
      num_heads=2,
      num_kv_heads=1,
      head_dim=64,
      page_size=16,
      pool_tokens=256,
      calls=1,
      batches=attention_lib.prefills((32, 0)),
    ),
    tuned=lone,
    num_tried=2,
    quantized=(
      dataclasses.replace(
        small, kv_dtype='int8', batches=attention_lib.decodes((4, 64))
      ),
    ),
    written=(4,),
    filtered=((2, 40),),
    workload=throughput.Workload(
      num_requests=4, prompt_lens=(8, 64), output_lens=(4, 8)
    ),
    idle=Point(4, 63, 1),
    chats=workload_lib.WorkloadConfig(num_requests=4, length_scale=0.01),
    capacity_rows=('vllm', 'sarathi'),
  )


SIZES: Mapping[str, Size] = {'full': _full(), 'tiny': _tiny()}
