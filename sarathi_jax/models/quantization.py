# SPDX-License-Identifier: Apache-2.0
"""How matrices of weights are kept in few bits. Standard library only: no JAX.

A quantized matrix [in, out] is codes [in, out] and scales [groups, out]: a
column's codes of a group of rows are multiplied by the scale that the column
has for them. Scales of columns have one group, of all rows; those of a matrix
are the same in each column; and those of blocks of 128 x 128 are the same in
128 columns. So whatever is cut, repeated or put together by columns has its
scales with it.

Codes of 4 bits lie two in a byte, in blocks of 32 rows: byte i of 16 has row i
in its low half, and row 16 + i in its high one. So a block's rows are two spans
that lie together, as a kernel takes them, and devices can share whole blocks.
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
    bits: of a number: 8, or 4 of which two are in a byte.
    most: the largest number that a matrix is rounded to.
    scale: dtype of scales: 'float32', of which a 16-bit scale is one, or
      'uint8', which stands for 2 ** (scale - 127).
  """

  dtype: str
  bits: int
  most: float
  scale: str = 'float32'

  @property
  def scale_bytes(self) -> int:
    return {'float32': 4, 'uint8': 1}[self.scale]

  def rows_of(self, rows: int) -> int:
    """Returns the rows of an array of codes, for so many of a matrix."""
    return rows if self.bits == 8 else BLOCK // 2 * -(-rows // BLOCK)


BLOCK = 32  # rows whose codes of 4 bits are packed together
CODES: Mapping[str, Codes] = {
  'int8': Codes('int8', 8, 127.0),
  'fp8': Codes('float8_e4m3fn', 8, 448.0),
  # Of 0 to 15, which are -8 to 7; or less a zero point.
  'int4': Codes('uint8', 4, 7.0),
  # E2M1 of OCP's Microscaling Formats: a sign and three bits of `E2M1`.
  'mxfp4': Codes('uint8', 4, 6.0, 'uint8'),
}
E2M1 = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0
INT4_ZERO = 8  # the code of 0, where there are no zero points

# Not quantized, where nobody says what is: they are small, and what they choose
# changes all that follows.
ROUTERS = 'layers.*.moe.router', 'layers.*.moe.shared_gate'
# Where a matrix is rounded to 4 bits: what else stays, as it does in what is
# published so, and the rows of a group.
_KEPT_OF_4_BITS = 'lm_head', *ROUTERS
_GROUPS_OF_4_BITS: Mapping[str, int] = {'int4': 128, 'mxfp4': 32}

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
      rows are one. Of codes of 4 bits, a multiple of 32; of mxfp4, 32.
    zeros: whether groups of int4 have zero points, too, [groups, out]: codes
      that stand for 0.
    reordered: whether each matrix has its rows in an order of its own, which
      the numbers that it multiplies are brought into (GPTQ's `desc_act`).
    kept: patterns (fnmatch) of the names of matrices that are not quantized,
      such as 'lm_head' or 'layers.*.moe.router'.
    activations: the codes that rows are rounded to before these matrices
      multiply them, each by a scale of its own, as it comes; None: they stay in
      the model's dtype. A deployment says it.
  """

  codes: str
  group: int | None = None
  zeros: bool = False
  reordered: bool = False
  kept: tuple[str, ...] = ROUTERS
  activations: str | None = None

  def __post_init__(self) -> None:
    config_lib.check_fields(
      self,
      {
        'codes': config_lib.one_of(tuple(CODES)),
        'group': _GROUP,
        'zeros': config_lib.FLAG,
        'reordered': config_lib.FLAG,
        'activations': config_lib.or_none(
          config_lib.one_of(config_lib.QUANTIZED_ACTIVATIONS)
        ),
      },
    )
    config_lib.check(
      self.kind.bits == 8 or self.group is None or self.group % BLOCK == 0,
      'quantization.group',
      self.group,
      f'must be a multiple of {BLOCK} with {self.codes}, or null for all rows',
    )
    config_lib.check(
      self.codes != 'mxfp4' or self.group == BLOCK,
      'quantization.group',
      self.group,
      f'must be {BLOCK} with mxfp4',
    )
    config_lib.check(
      not self.zeros or self.codes == 'int4',
      'quantization.zeros',
      self.zeros,
      'only int4 has zero points',
    )
    config_lib.check(
      isinstance(self.kept, (list, tuple))
      and all(isinstance(name, str) for name in self.kept),
      'quantization.kept',
      self.kept,
      'must be names of matrices',
    )
    config_lib.check(
      self.activations is None or self.multiplies(self.activations),
      'quantization.activations',
      self.activations,
      'needs the same codes, with a scale for each output (group=None)',
    )
    object.__setattr__(self, 'kept', tuple(self.kept))

  @classmethod
  def rounding_to(cls, codes: str, group: int | None = None) -> Quantization:
    """Returns how a matrix is rounded to codes, if nothing else is said.

    Args:
      codes: one of `CODES`.
      group: rows of a group; None: what is usual with such codes.
    """
    if CODES[codes].bits == 8:
      return cls(codes=codes, group=group)
    return cls(
      codes=codes,
      group=group or _GROUPS_OF_4_BITS[codes],
      kept=_KEPT_OF_4_BITS,
    )

  @property
  def kind(self) -> Codes:
    return CODES[self.codes]

  @property
  def rows_together(self) -> int:
    """The rows of which devices have all or none, if they share rows."""
    block = 1 if self.kind.bits == 8 else BLOCK
    return max(block, self.group or 1)

  def multiplies(self, activations: str) -> bool:
    """Says whether rows of such codes can be multiplied by these."""
    return self.codes == activations and self.group is None

  def covers(self, name: str) -> bool:
    """Says whether the matrix of a name is quantized."""
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.kept)

  def num_groups(self, rows: int) -> int:
    """Returns the groups of a matrix with so many rows."""
    return 1 if self.group is None else -(-rows // self.group)

  def number_bytes(self, rows: int) -> float:
    """Returns the bytes of each number, with its part of scales and zeros.

    The order of rows, which is a column's worth, is not counted.

    Args:
      rows: of the matrix.
    """
    of_group = self.kind.scale_bytes + self.zeros
    columns = self.kind.rows_of(rows) + of_group * self.num_groups(rows)
    return columns / rows

  @classmethod
  def from_dict(
    cls, fields: Mapping[str, Any], what: str = 'quantization'
  ) -> Quantization:
    """Reads what `dataclasses.asdict` wrote; refuses unknown fields."""
    made: Quantization = fields_lib.from_dict(cls, fields, what)
    return made
