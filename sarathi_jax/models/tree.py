# SPDX-License-Identifier: Apache-2.0
"""Names the leaves of a tree of parameters."""

from __future__ import annotations

from typing import Any

import jax


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves by their names, such as 'layers.3.attn.q'.

  They are in the order of `jax.tree.leaves`.
  """
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
