# SPDX-License-Identifier: Apache-2.0
"""Names the leaves of a tree of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from sarathi_jax.models import quantized


def joined(name: str, path: Any) -> str:
  """Returns the name of a leaf at a path, of JAX's keys, below a name."""
  below = jax.tree_util.keystr(path, simple=True, separator='.')
  return f'{name}.{below}' if name and below else name or below


def as_dicts(tree: Any) -> Any:
  """Returns a tree of dicts and lists alone; names stay the same."""
  if isinstance(tree, quantized.Quantized):
    return tree.arrays()
  if isinstance(tree, dict):
    return {name: as_dicts(inner) for name, inner in tree.items()}
  return [as_dicts(inner) for inner in tree] if isinstance(tree, list) else tree


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """Returns a tree with other leaves, by their names."""
  return jax.tree.unflatten(
    jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
  )


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves by their names, such as 'layers.3.attn.q'.

  They are in the order of `jax.tree.leaves`.
  """
  return {
    joined('', path): leaf for path, leaf in jax.tree.leaves_with_path(tree)
  }
