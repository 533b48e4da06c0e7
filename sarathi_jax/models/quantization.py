# SPDX-License-Identifier: Apache-2.0
"""How matrices of weights are kept in few bits. Standard library only: no JAX.

A quantized matrix [in, out] is codes [in, out] and scales [groups, out]: a
column's codes of a group of rows are multiplied by the scale that the column
has for them. Scales of columns have one group, of all rows; those of a matrix
are the same in each column; and those of blocks of 128 x 128 are the same in
128 columns. So whatever is cut, repeated or put together by columns has its
scales with it.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import fnmatch
from typing import Any, NamedTuple

from sarathi_jax import config as config_lib
from sarathi_jax.models import fields as fields_lib


class Codes(NamedTuple):
  """A way to write numbers.

  Attributes:
    dtype: of an array of them.
    num_bytes: of a number.
    most: the largest number.
  """

  dtype: str
  num_bytes: float
  most: float


CODES: Mapping[str, Codes] = {
  'int8': Codes('int8', 1, 127.0),
  'fp8': Codes('float8_e4m3fn', 1, 448.0),
}
SCALE = 'float32'  # A 16-bit scale is one of these; none loses a bit.
_SCALE_BYTES = 4

# Not quantized, where nobody says what is: they are small, and what they choose
# changes all that follows.
ROUTERS = 'layers.*.moe.router', 'layers.*.moe.shared_gate'

_GROUP = config_lib.or_none(
  fields_lib.SIZE, f'{fields_lib.SIZE[1]}, or null for all rows'
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
  """Which of a model's matrices are quantized, and how.

  All that rows are multiplied by may be: linear layers, experts, the output
  matrix. Embeddings never are, nor norms and biases.

  Attributes:
    codes: one of `CODES`.
    group: rows of a group; the last group of a matrix may have fewer. None: all
      rows are one.
    kept: patterns (fnmatch) of the names of matrices that are not quantized,
      such as 'lm_head' or 'layers.*.moe.router'.
  """

  codes: str
  group: int | None = None
  kept: tuple[str, ...] = ROUTERS

  def __post_init__(self) -> None:
    config_lib.check_fields(
      self, {'codes': config_lib.one_of(tuple(CODES)), 'group': _GROUP}
    )
    config_lib.check(
      isinstance(self.kept, (list, tuple))
      and all(isinstance(name, str) for name in self.kept),
      'quantization.kept',
      self.kept,
      'must be names of matrices',
    )
    object.__setattr__(self, 'kept', tuple(self.kept))

  @property
  def dtype(self) -> str:
    return CODES[self.codes].dtype

  def covers(self, name: str) -> bool:
    """Says whether the matrix of a name is quantized."""
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.kept)

  def num_groups(self, rows: int) -> int:
    """Returns the groups of a matrix with so many rows."""
    return 1 if self.group is None else -(-rows // self.group)

  def number_bytes(self, rows: int) -> float:
    """Returns the bytes of each number, with its part of the scales.

    Args:
      rows: of the matrix.
    """
    scales = _SCALE_BYTES * self.num_groups(rows) / rows
    return CODES[self.codes].num_bytes + scales

  @classmethod
  def from_dict(
    cls, fields: Mapping[str, Any], what: str = 'quantization'
  ) -> Quantization:
    """Reads what `dataclasses.asdict` wrote; refuses unknown fields."""
    made: Quantization = fields_lib.from_dict(cls, fields, what)
    return made
