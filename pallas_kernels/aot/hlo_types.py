# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of types, as XLA's programs write them: 'bf16[8,128]'."""

from __future__ import annotations

import math
import re

# The number in a type's name is its bits: bf16, f8e4m3fn, s4.
_ARRAY = re.compile(r'\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
_BITS_OF_PRED = 8


def array_bytes(text: str) -> list[int]:
  """Returns the bytes of each array that a type names; a tuple has several."""
  return [
    math.prod(map(int, filter(None, shape.split(','))))
    * int(bits or _BITS_OF_PRED)
    // 8
    for bits, shape in _ARRAY.findall(text)
  ]
