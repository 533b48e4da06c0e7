# SPDX-License-Identifier: Apache-2.0
"""What documents link to is there: files, and headings of their own."""

from __future__ import annotations

import pathlib
import re

import pytest

from tests import source_tree

DOCUMENTS = (
  'README.md',
  'CHANGELOG.md',
  'CONTRIBUTING.md',
  'sarathi_jax/ARCHITECTURE.md',
)


@pytest.mark.parametrize('name', DOCUMENTS)
def test_each_link_leads_somewhere(name: str) -> None:
  path = source_tree.ROOT / name
  assert not _broken(path.read_text(), path.parent)


def test_what_leads_nowhere_is_found(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'there').touch()
  text = """# Weights of 8, or 4 bits!
[a](#weights-of-8-or-4-bits) [b](there) [c](https://nowhere.invalid) [d](gone)
[e](#weights-of-8-bits)
"""
  assert _broken(text, tmp_path) == ['gone', '#weights-of-8-bits']


def _broken(text: str, folder: pathlib.Path) -> list[str]:
  """Returns the links of a document that lead to nothing here."""
  headings = {
    '#' + re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
    for heading in re.findall('^#+ (.*)$', text, re.M)
  }
  return [
    link
    for link in re.findall(r'\]\(([^)\s]+)\)', text)
    if not link.startswith(('http:', 'https:'))
    and link not in headings
    and not (folder / link).is_file()
    and not (folder / link).is_dir()
  ]
