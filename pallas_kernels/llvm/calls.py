# SPDX-License-Identifier: Apache-2.0
"""Makes functions that XLA calls of LLVM's IR (`jax.ffi`).

The layouts of structs are those of xla/ffi/api/c_api.h, whose changes are
counted there: fields are added behind these, and what was built for an older
version is called as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

import jax
import llvmlite
from llvmlite import binding
from llvmlite import ir

from pallas_kernels.llvm import emit

# Of XLA_FFI_API; XLA calls what was made for it, as for the older ones.
_VERSION = (0, 3)
# Bytes from the beginning of XLA_FFI_CallFrame.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 8, 16, 24, 72, 112
_IS_METADATA, _METADATA = 8, 24  # of XLA_FFI_Metadata_Extension
_MAJOR, _MINOR, _TRAITS = 24, 28, 32  # of XLA_FFI_Metadata
_DATA, _DIMS = 24, 40  # of XLA_FFI_Buffer
_METADATA_TYPE = 1
_DIGEST = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
  """An argument or a result.

  Attributes:
    data: its address.
    dims: its sizes, int64.
  """

  data: Any
  dims: Sequence[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
  """A call: XLA's functions and what they are to be told, and the buffers."""

  api: Any
  context: Any
  arguments: Sequence[Buffer]
  results: Sequence[Buffer]


@dataclasses.dataclass(frozen=True, slots=True)
class Processor:
  """What kernels know of this machine's processor.

  Attributes:
    registers: of vectors.
    lanes: of float32, of each.
  """

  registers: int
  lanes: int


@functools.cache
def processor() -> Processor | None:
  """Returns what this processor has; None: it is none that kernels are for."""
  features = binding.get_host_cpu_features()
  if features.get('avx512f') and features.get('avx512vl'):
    return Processor(32, 16)
  if features.get('avx2') and features.get('fma'):
    return Processor(16, 8)
  if features.get('neon'):
    return Processor(32, 4)
  return None


def write_handler(
  module: ir.Module,
  name: str,
  ranks: tuple[Sequence[int], Sequence[int]],
  body: Callable[[ir.IRBuilder, Frame], None],
) -> None:
  """Writes the function that XLA calls.

  Args:
    module: where to.
    name: of the function.
    ranks: of arguments, and of results.
    body: writes what it does.
  """
  null = ir.Constant(emit.POINTER, None)
  fn, b = emit.function(module, name, emit.POINTER, result=emit.POINTER)
  (frame,) = fn.args

  def load(base: Any, offset: int, dtype: Any = emit.POINTER) -> Any:
    address = emit.at(b, base, emit.int64(offset), emit.I8)
    return b.load(address, typ=dtype)

  def store(value: int, base: Any, offset: int) -> None:
    address = emit.at(b, base, emit.int64(offset), emit.I8)
    b.store(ir.Constant(emit.I32, value), address)

  def buffers(offset: int, ranks: Sequence[int]) -> list[Buffer]:
    found = load(frame, offset)
    made = []
    for i, rank in enumerate(ranks):
      buffer = load(found, 8 * i)
      dims = load(buffer, _DIMS)
      sizes = [load(dims, 8 * axis, emit.I64) for axis in range(rank)]
      made.append(Buffer(load(buffer, _DATA), sizes))
    return made

  extension = load(frame, _EXTENSION)
  with b.if_then(b.icmp_unsigned('!=', extension, null)):
    is_asked = b.icmp_signed(
      '==',
      load(extension, _IS_METADATA, emit.I32),
      ir.Constant(emit.I32, _METADATA_TYPE),
    )
    with b.if_then(is_asked):
      metadata = load(extension, _METADATA)
      store(_VERSION[0], metadata, _MAJOR)
      store(_VERSION[1], metadata, _MINOR)
      store(0, metadata, _TRAITS)
      b.ret(null)
  body(
    b,
    Frame(
      load(frame, _API),
      load(frame, _CONTEXT),
      buffers(_ARGUMENTS, ranks[0]),
      buffers(_RESULTS, ranks[1]),
    ),
  )
  b.ret(null)


def compile_handler(module: ir.Module, name: str) -> None:
  """Compiles a module for this processor and registers a handler of it.

  Machine code is kept where JAX keeps what it compiles, if it does.

  Args:
    module: the module, named for the target: no other has its name.
    name: of the function, and of the target.
  """
  binding.initialize_native_target()
  binding.initialize_native_asmprinter()
  processor = (
    binding.get_host_cpu_name(),
    binding.get_host_cpu_features().flatten(),
  )
  machine = binding.Target.from_default_triple().create_target_machine(
    *processor, opt=3
  )
  text = str(module)
  key = repr((llvmlite.__version__, binding.llvm_version_info, processor, text))
  code = _kept(key, lambda: _machine_code(text, machine))
  engine = binding.create_mcjit_compiler(binding.parse_assembly(''), machine)
  engine.add_object_file(binding.ObjectFileRef.from_data(code))
  engine.finalize_object()
  function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
    engine.get_function_address(name)
  )
  engine.detach()  # Its machine code is called while the process lives.
  jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform='cpu')


def _machine_code(text: str, machine: binding.TargetMachine) -> bytes:
  parsed = binding.parse_assembly(text)
  parsed.verify()
  passes = binding.create_pass_builder(
    machine, binding.create_pipeline_tuning_options(speed_level=2)
  )
  passes.getModulePassManager().run(parsed, passes)
  code: bytes = machine.emit_object(parsed)
  return code


def _kept(key: str, make: Callable[[], bytes]) -> bytes:
  """Returns what is kept under a key; makes and keeps it if nothing is."""
  folder = jax.config.values['jax_compilation_cache_dir']
  if folder is None or '://' in folder:
    return make()
  digest = hashlib.sha256(key.encode()).hexdigest()
  path = pathlib.Path(folder) / f'llvm-{digest}'
  with contextlib.suppress(OSError):
    found = path.read_bytes()
    if hashlib.sha256(found[_DIGEST:]).digest() == found[:_DIGEST]:
      return found[_DIGEST:]
  code = make()
  with contextlib.suppress(OSError):  # It may be nobody's to write.
    part = path.with_name(f'{path.name}.{os.getpid()}')
    part.write_bytes(hashlib.sha256(code).digest() + code)
    part.replace(path)
  return code
