# SPDX-License-Identifier: Apache-2.0
"""Turns tensors of the Open Inference Protocol into plain values, and back.

A tensor's elements lie in its typed `contents`, or all tensors' in
`raw_input_contents`, little-endian, where each of BYTES has its length before
it in four bytes. Standard library only, beside the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import itertools
import math
import struct
from typing import Any

from sarathi_jax import errors
from sarathi_jax.server import open_inference_pb2 as pb
from sarathi_jax.server.guard import limits as limits_lib

# Datatype -> (field of `contents`, format of struct).
_TYPES = {
  'BOOL': ('bool_contents', '?'),
  'INT8': ('int_contents', 'b'),
  'INT16': ('int_contents', 'h'),
  'INT32': ('int_contents', 'i'),
  'INT64': ('int64_contents', 'q'),
  'UINT8': ('uint_contents', 'B'),
  'UINT16': ('uint_contents', 'H'),
  'UINT32': ('uint_contents', 'I'),
  'UINT64': ('uint64_contents', 'Q'),
  'FP32': ('fp32_contents', 'f'),
  'FP64': ('fp64_contents', 'd'),
  'BYTES': ('bytes_contents', ''),
}


def _check(ok: bool, name: str, problem: str) -> None:
  if not ok:
    raise errors.InvalidRequestError(f'inputs: {errors.shown(name)} {problem}.')


def read_inputs(
  request: pb.ModelInferRequest,
  limits: limits_lib.Limits | None = None,
  check_size: Callable[[str, int], None] = lambda name, size: None,
) -> dict[str, list[Any]]:
  """Reads the elements of each input, flat: BYTES as bytes, others as numbers.

  Args:
    request: has the inputs.
    limits: bound their dimensions; None for no bound.
    check_size: told an input's name and the elements that it is about to have;
      may refuse them.

  Raises:
    InvalidRequestError: a tensor is not what it says it is.
  """
  limits = limits or limits_lib.Limits()
  raw = list(request.raw_input_contents)
  if raw and len(raw) != len(request.inputs):
    raise errors.InvalidRequestError(
      f'raw_input_contents: {len(raw)} for {len(request.inputs)} inputs; '
      'must be as many.'
    )
  inputs: dict[str, list[Any]] = {}
  for i, tensor in enumerate(request.inputs):
    _check(tensor.name not in inputs, tensor.name, 'is there twice')
    _check(
      tensor.datatype in _TYPES,
      tensor.name,
      f'has the datatype {errors.shown(tensor.datatype)}; known are '
      f'{", ".join(_TYPES)}',
    )
    # Before anything is made of it.
    limits.check('max_dims', len(tensor.shape), f'inputs: {tensor.name[:99]}')
    _check(
      all(n >= 0 for n in tensor.shape),
      tensor.name,
      f'has the shape {list(tensor.shape)}; sizes must be >= 0',
    )
    field, form = _TYPES[tensor.datatype]
    if raw:
      values = _read_raw(tensor.name, form, raw[i], check_size)
    else:
      others = [
        f.name for f, _ in tensor.contents.ListFields() if f.name != field
      ]
      _check(
        not others,
        tensor.name,
        f'of datatype {tensor.datatype} has {others[0] if others else ""}'
        f'; must have {field}',
      )
      check_size(tensor.name, len(getattr(tensor.contents, field)))
      values = list(getattr(tensor.contents, field))
    _check(
      math.prod(tensor.shape) == len(values),
      tensor.name,
      f'has {len(values)} elements for the shape {list(tensor.shape)}',
    )
    inputs[tensor.name] = values
  return inputs


def _read_raw(
  name: str, form: str, data: bytes, check_size: Callable[[str, int], None]
) -> list[Any]:
  if form:
    size = struct.calcsize(form)
    _check(
      len(data) % size == 0,
      name,
      f'has {len(data)} bytes; must be a multiple of {size}',
    )
    check_size(name, len(data) // size)
    return list(struct.unpack(f'<{len(data) // size}{form}', data))
  values: list[Any] = []
  start = 0
  while start < len(data):
    check_size(name, len(values) + 1)
    _check(start + 4 <= len(data), name, 'is cut off in a length')
    stop = start + 4 + int.from_bytes(data[start : start + 4], 'little')
    _check(stop <= len(data), name, 'is cut off in an element')
    values.append(data[start + 4 : stop])
    start = stop
  return values


def parameter_value(parameter: pb.InferParameter) -> Any:
  """Returns the plain value of a request's parameter; None if it has none."""
  choice = parameter.WhichOneof('parameter_choice')
  return None if choice is None else getattr(parameter, choice)


def add_output(
  response: pb.ModelInferResponse,
  name: str,
  datatype: str,
  values: Sequence[Any],
) -> None:
  """Adds an output in raw form, as Triton's clients expect.

  Args:
    response: what it is added to.
    name, datatype: of the output.
    values: numbers or bytes; or rows of numbers, of one length.
  """
  shape = [len(values)]
  if values and isinstance(values[0], tuple):
    shape.append(len(values[0]))
    values = list(itertools.chain.from_iterable(values))
  response.outputs.add(name=name, datatype=datatype, shape=shape)
  form = _TYPES[datatype][1]
  response.raw_output_contents.append(
    struct.pack(f'<{len(values)}{form}', *values)
    if form
    else b''.join(len(v).to_bytes(4, 'little') + v for v in values)
  )
