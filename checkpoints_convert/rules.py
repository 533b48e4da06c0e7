# SPDX-License-Identifier: Apache-2.0
"""Matches the tensors of a checkpoint to the parameters of a model.

A closed world: a tensor that no rule names, a parameter that no tensor fills,
and a shape that is not the model's are errors, each by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from checkpoints_convert import safetensors_reader
from checkpoints_convert import transforms
from sarathi_jax import errors
from sarathi_jax.models import parallel
from sarathi_jax.models import spec
from sarathi_jax.models import tree

_MOST = 5  # names that a message has


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
  """Maps the tensors of one name to parameters.

  Attributes:
    tensor: the tensor's name, with {layer} and {expert} for numbers.
    leaf: the parameter's path, with {layer}; None if the tensor is known and
      not needed.
    transpose: whether [out, in] becomes [in, out].
    select: which rows; None for all. The rules of one tensor share its rows
      among them.
    column: (which, of how many): each so-many-th of the last axis, if not all.
      The rules of one tensor share these among them.
    is_stack: whether the tensor is a stack of matrices, one an expert.
    is_shared: whether each rule of the tensor takes all of it.
  """

  tensor: str
  leaf: str | None
  transpose: bool = False
  select: transforms.Select | None = None
  column: tuple[int, int] | None = None
  is_stack: bool = False
  is_shared: bool = False


def linear(
  tensor: str, leaf: str, select: transforms.Select | None = None
) -> tuple[Rule, Rule]:
  """Returns the rules of a linear layer's weight and of its bias, if any."""
  return (
    Rule(f'{tensor}.weight', leaf, transpose=True, select=select),
    Rule(f'{tensor}.bias', f'{leaf}_bias', select=select),
  )


def scale_of(tensor: str) -> str:
  """Returns the name of the scales of a tensor with codes."""
  return f'{tensor}_scale'


def zero_of(tensor: str) -> str:
  """Returns the name of the zero points of a tensor with codes."""
  return f'{tensor}_zero'


def order_of(tensor: str) -> str:
  """Returns the name of the order of the columns of a tensor with codes."""
  return f'{tensor}_order'


def _of_codes(rules: Sequence[Rule]) -> Iterator[Rule]:
  """Yields the rules of what is beside codes.

  Rows of scales and zero points are rows of their matrices; the order is that
  of all rows.
  """
  for rule in rules:
    if rule.leaf is None or not rule.transpose:
      continue
    for end, name in (('scale', scale_of), ('zero', zero_of)):
      yield dataclasses.replace(
        rule, tensor=name(rule.tensor), leaf=f'{rule.leaf}.{end}'
      )
    yield Rule(order_of(rule.tensor), f'{rule.leaf}.order', is_shared=True)


def places(name: str, rules: Sequence[Rule]) -> Iterator[tuple[Rule, str]]:
  """Yields the rules of a tensor's name, and the paths that it fills."""
  for rule in rules:
    if rule.leaf and (match := _regex(rule.tensor).fullmatch(name)):
      yield rule, rule.leaf.format(**match.groupdict())


def plan(
  tensors: Mapping[str, safetensors_reader.Tensor],
  rules: Sequence[Rule],
  specs: Any,
  dtype: np.dtype,
  parallelism: parallel.Parallelism = parallel.ONE_DEVICE,
) -> Any:
  """Says where every parameter comes from.

  Args:
    tensors: all of the checkpoint, by name.
    rules: the family's.
    specs: a tree of ParamSpec, dicts and lists.
    dtype: of the parameters, but for those that have their own.
    parallelism: chunks end where parts of such devices do.

  Returns:
    A tree of Leaf, shaped as `specs`.

  Raises:
    CheckpointError: a tensor without a rule or without a place in the model,
      a parameter without a tensor, or a wrong shape; by name.
  """
  wanted = tree.named_leaves(specs)
  rules = (*rules, *_of_codes(rules))
  parts = _match(tensors, rules, wanted)
  missing = [_missing(path, rules) for path in wanted if path not in parts]
  if missing:
    raise errors.CheckpointError(
      f'the checkpoint lacks {_some(missing)}, which the model needs.'
    )
  return tree.with_leaves(
    specs,
    {
      path: _leaf(path, parts[path], leaf, dtype, parallelism)
      for path, leaf in wanted.items()
    },
  )


_Parts = dict[str, dict[int | None, transforms.Part]]


def _match(
  tensors: Mapping[str, safetensors_reader.Tensor],
  rules: Sequence[Rule],
  wanted: Mapping[str, Any],
) -> _Parts:
  patterns: dict[str, list[Rule]] = {}
  for rule in rules:
    patterns.setdefault(rule.tensor, []).append(rule)
  compiled = [(_regex(pattern), group) for pattern, group in patterns.items()]
  parts: _Parts = {}
  unknown = []
  for name, tensor in tensors.items():
    hits = [
      (m, group) for regex, group in compiled if (m := regex.fullmatch(name))
    ]
    assert len(hits) <= 1, f'{name} matches several rules'
    placed = bool(hits) and _place(tensor, *hits[0], wanted, parts)
    if not placed:
      unknown.append(name)
  if unknown:
    raise errors.CheckpointError(
      f'the checkpoint holds {_some(unknown)}, for which this model has no use.'
    )
  return parts


def _place(
  tensor: safetensors_reader.Tensor,
  match: re.Match[str],
  group: Sequence[Rule],
  wanted: Mapping[str, Any],
  parts: _Parts,
) -> bool:
  """Adds the tensor to `parts`; False if the model has no such parameter."""
  numbers = match.groupdict()
  expert = int(numbers['expert']) if 'expert' in numbers else None
  used = 0
  for rule in group:
    if rule.leaf is None:
      return True
    path = rule.leaf.format(**numbers)
    if path not in wanted:
      path = f'{path}.values'  # if it is quantized
    if path not in wanted:
      return False
    pieces = {expert: tensor}
    if rule.is_stack:
      pieces = _items(tensor, wanted[path].shape[0])
    slots = parts.setdefault(path, {})
    for key, piece in pieces.items():
      part = transforms.Part(piece, rule.transpose, rule.select, rule.column)
      _check_rank(piece, part)
      if slots.keys() & {key, None} or (key is None and slots):
        other = slots.get(key) or next(iter(slots.values()))
        raise errors.CheckpointError(
          f'{path}: both {other.tensor.name} and {tensor.name} fill it.'
        )
      slots[key] = part
      used += math.prod(part.shape)
  size = math.prod(tensor.shape[1:])
  if not group[0].is_shared and used != tensor.shape[0] * size:
    raise errors.CheckpointError(
      f'{tensor.name}: has {tensor.shape[0]} rows, of which the model uses '
      f'{used // size}.'
    )
  return True


def _items(
  tensor: safetensors_reader.Tensor, num: int
) -> dict[int | None, safetensors_reader.Tensor]:
  """Returns the matrices of a stack, one an expert."""
  if len(tensor.shape) != 3 or tensor.shape[0] != num or 0 in tensor.shape:
    raise errors.CheckpointError(
      f'{tensor.name}: shape {tensor.shape} is no stack of matrices of '
      f'{num} experts.'
    )
  return {i: tensor.item(i) for i in range(num)}


def _check_rank(
  tensor: safetensors_reader.Tensor, part: transforms.Part
) -> None:
  rank = 2 if part.transpose else len(tensor.shape)
  if len(tensor.shape) != max(rank, 1) or 0 in tensor.shape:
    raise errors.CheckpointError(
      f'{tensor.name}: shape {tensor.shape} does not fit this model.'
    )


def _leaf(
  path: str,
  slots: Mapping[int | None, transforms.Part],
  wanted: spec.ParamSpec,
  dtype: np.dtype,
  parallelism: parallel.Parallelism,
) -> transforms.Leaf:
  stacked = None not in slots
  count = wanted.shape[0] if stacked else 1
  keys: Iterable[int | None] = range(count) if stacked else (None,)
  absent = [key for key in keys if key not in slots]
  if absent or len(slots) != count:
    raise errors.CheckpointError(
      f'{path}: the checkpoint has parts {sorted(slots, key=str)}, the model '
      f'wants {count} of them.'
    )
  parts = tuple(slots[key] for key in keys)
  expected = wanted.shape[1:] if stacked else wanted.shape
  for part in parts:
    if part.shape != expected:
      raise errors.CheckpointError(
        f'{part.tensor.name}: shape {part.tensor.shape} makes {path} '
        f'{part.shape}; the model wants {expected}.'
      )
  axis = transforms.chunked_axis(wanted.shape, parts[0], stacked)
  return transforms.Leaf(
    path,
    wanted.shape,
    np.dtype(wanted.dtype or dtype),
    parts,
    stacked,
    parallelism.part_len(wanted.axes[axis], wanted.shape[axis]),
  )


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
  escaped = re.escape(pattern)
  # More digits are of no model, and none that Python reads.
  return re.compile(re.sub(r'\\\{(\w+)\\\}', r'(?P<\1>[0-9]{1,9})', escaped))


def _missing(path: str, rules: Sequence[Rule]) -> str:
  """Returns the name of a tensor that would fill the path."""
  path = path.removesuffix('.values')
  for rule in rules:
    if rule.leaf and (m := _regex(rule.leaf).fullmatch(path)):
      return rule.tensor.format(**{'expert': 0, **m.groupdict()})
  return path


def _some(names: Sequence[str]) -> str:
  more = f' and {len(names) - _MOST} more' if len(names) > _MOST else ''
  return ', '.join(names[:_MOST]) + more
