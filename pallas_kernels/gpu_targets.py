# SPDX-License-Identifier: Apache-2.0
"""Facts of the GPUs that kernels are compiled and tuned for. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

REGISTERS = 65536  # of 32 bits, of a multiprocessor; a block may have all
WARP = 32  # threads
# Of a multiprocessor: each issues an instruction of a warp in a clock.
SCHEDULERS = 4
_MAX_REGISTERS = 255  # of a thread
_REGISTER_UNIT = 256  # in which a warp is given registers
_SHARED_UNIT = 128  # in which a block is given shared memory
_SYSTEM_SHARED = 1024  # bytes of shared memory that CUDA takes for a block
_CUDA = '12.9.0'  # of the driver and the runtime: XLA's graphs depend on it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuTarget:
  """One kind of GPU, from NVIDIA's documents.

  Attributes:
    device_kind: as jax.Device has it.
    compute_capability: (major, minor).
    multiprocessors: SMs.
    lanes: float32 operations a clock and multiprocessor, an FMA as one.
    shared_memory: bytes, of a multiprocessor.
    threads_per_multiprocessor: the most.
    blocks_per_multiprocessor: the most.
    memory_bytes: of the device.
    bandwidth: bytes a second, of its memory.
    l2_bytes: of its cache.
    clock_ghz: the highest.
    matmul_flops: a second, of dense bfloat16 on the tensor cores.
    fp8_flops: the same of e4m3; None: they have no instruction for it.
  """

  device_kind: str
  compute_capability: tuple[int, int]
  multiprocessors: int
  lanes: int
  shared_memory: int
  threads_per_multiprocessor: int
  blocks_per_multiprocessor: int
  memory_bytes: int
  bandwidth: int
  l2_bytes: int
  clock_ghz: float
  matmul_flops: float
  fp8_flops: float | None = None

  @property
  def shared_memory_per_block(self) -> int:
    """The most bytes of shared memory that a block may ask for."""
    return self.shared_memory - _SYSTEM_SHARED

  def blocks_that_fit(
    self, threads: int, registers: int, shared_memory: int
  ) -> int:
    """Returns the number of blocks (CTAs) that a multiprocessor runs at once.

    Args:
      threads: of a block.
      registers: of a thread.
      shared_memory: bytes, of a block.
    """
    warps = -(-threads // WARP)
    warp_registers = _round_up(max(registers, 1) * WARP, _REGISTER_UNIT)
    shared = _round_up(shared_memory + _SYSTEM_SHARED, _SHARED_UNIT)
    if (
      shared_memory > self.shared_memory_per_block or registers > _MAX_REGISTERS
    ):
      return 0
    return min(
      self.blocks_per_multiprocessor,
      self.threads_per_multiprocessor // (warps * WARP),
      # Each scheduler has its part of the registers.
      REGISTERS // SCHEDULERS // warp_registers * SCHEDULERS // warps,
      self.shared_memory // shared,
    )

  def text_proto(self) -> str:
    """Returns XLA's stream_executor.GpuTargetConfigProto, as text."""
    major, minor = self.compute_capability
    # Hopper's own instructions (wgmma, TMA) are not of later GPUs.
    feature = ' feature_extension: ACCELERATED_FEATURES' if major >= 9 else ''
    return f'''\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: {WARP}
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory}
  threads_per_core_limit: {self.threads_per_multiprocessor}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
  driver_version: "{_CUDA}"
  runtime_version: "{_CUDA}"
  registers_per_core_limit: {REGISTERS}
  registers_per_block_limit: {REGISTERS}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.device_kind}"
'''


TARGETS: Mapping[str, GpuTarget] = {
  'a100': GpuTarget(
    device_kind='NVIDIA A100-SXM4-80GB',
    compute_capability=(8, 0),
    multiprocessors=108,
    lanes=64,
    shared_memory=167936,
    threads_per_multiprocessor=2048,
    blocks_per_multiprocessor=32,
    memory_bytes=85_100_068_864,
    bandwidth=2_039_040_000_000,
    l2_bytes=41_943_040,
    clock_ghz=1.41,
    matmul_flops=312e12,
  ),
  'a40': GpuTarget(
    device_kind='NVIDIA A40',
    compute_capability=(8, 6),
    multiprocessors=84,
    lanes=128,
    shared_memory=102400,
    threads_per_multiprocessor=1536,
    blocks_per_multiprocessor=16,
    memory_bytes=47_800_000_000,
    bandwidth=696_000_000_000,
    l2_bytes=6_291_456,
    clock_ghz=1.74,
    matmul_flops=149.7e12,
  ),
  'h100': GpuTarget(
    device_kind='NVIDIA H100 80GB HBM3',
    compute_capability=(9, 0),
    multiprocessors=132,
    lanes=128,
    shared_memory=233472,
    threads_per_multiprocessor=2048,
    blocks_per_multiprocessor=32,
    memory_bytes=84_942_979_072,
    bandwidth=3_352_320_000_000,
    l2_bytes=52_428_800,
    clock_ghz=1.98,
    matmul_flops=989.4e12,
    fp8_flops=1978.9e12,
  ),
}


# The beginning of jax.Device.device_kind -> the target.
_KINDS: Mapping[str, str] = {
  'NVIDIA A100': 'a100',
  'NVIDIA A40': 'a40',
  'NVIDIA H100': 'h100',
  'NVIDIA H200': 'h100',
}
# H100 and H200 of these kinds are slower than SXM's, by varying amounts.
_SLOWER = ('H100 PCIe', 'NVL')
# The target whose multiprocessors have the same room, by compute capability:
# 164 KiB of shared memory, 228 KiB, or 100 KiB and fewer threads.
_ALIKE: Mapping[str, str] = {
  '8.0': 'a100',
  '8.7': 'a100',  # A100, A800, A30; Orin
  '9.0': 'h100',  # H100, H200, H800, H20, GH200
  '10.0': 'h100',
  '10.3': 'h100',
  '11.0': 'h100',  # B200, B300, Thor
  '8.6': 'a40',
  '8.9': 'a40',  # A40, A10; L40S, L4
  '12.0': 'a40',
  '12.1': 'a40',
}  # RTX PRO 6000, Spark
_MOST_MODEST = 'a40'


def alike(compute_capability: str) -> str:
  """Returns the target whose tile sizes fit a GPU, too.

  Args:
    compute_capability: as jax.Device has it: '9.0', or '9.0a'.

  Returns:
    The target's name; for a GPU that is not known, that of the smallest.
  """
  return _ALIKE.get(compute_capability.rstrip('af'), _MOST_MODEST)


def name_of(device_kind: str) -> str | None:
  """Returns the name of the target that a device is; None if in no table."""
  return next(
    (name for begin, name in _KINDS.items() if device_kind.startswith(begin)),
    None,
  )


def matmul_flops(device_kind: str) -> float | None:
  """Returns a device's operations a second, in matmuls of dense bfloat16.

  Returns None if they are not known: for other devices than the targets', and
  for slower ones of the same kind.
  """
  name = name_of(device_kind)
  if name is None or device_kind.endswith(_SLOWER):
    return None
  return TARGETS[name].matmul_flops


def get(name: str) -> GpuTarget:
  """Returns the target of this name.

  Raises:
    ValueError: there is none.
  """
  if name not in TARGETS:
    raise ValueError(f'device={name!r}: must be one of {", ".join(TARGETS)}.')
  return TARGETS[name]


def _round_up(n: int, unit: int) -> int:
  return -(-n // unit) * unit
