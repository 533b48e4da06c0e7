# SPDX-License-Identifier: Apache-2.0
"""The text that the quickstart model learns: Python's own documentation.

It comes with every CPython, so nothing is downloaded, and its licence (PSF)
allows this use: the language reference (`pydoc_data.topics`) and docstrings of
the standard library, read from its source files without importing them. Each
reference topic, without its code, is a document to continue. The beginning of
each docstring is the answer to a question, so that the model can chat a little.

Another release of Python has slightly different documentation. The same release
gives the same documents in the same order.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
import hashlib
import importlib
import inspect
import itertools
import pathlib
import re
import sysconfig
from typing import NamedTuple

END = '<|end|>'  # ends a document and an answer; also what starts one
USER = '<|user|>'
ASSISTANT = '<|assistant|>'
SPECIAL_TOKENS = (END, USER, ASSISTANT)

# One transcript a line: question, answer, question ...
CHAT_TEMPLATE = (
  '{% for message in messages %}'
  "{% if message['role'] == 'assistant' %}"
  "{{ '" + ASSISTANT + "' + message['content'] + '" + END + "' }}"
  "{% elif message['role'] == 'user' %}"
  "{{ '" + USER + "' + message['content'] }}"
  "{% else %}{{ raise_exception('only the roles user and assistant exist') }}"
  '{% endif %}{% endfor %}'
  "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)

# Folders and modules of the standard library that explain little: tests,
# programs, and those that Python 3.13 no longer has.
_SKIPPED = frozenset(
  (
    '__phello__',
    'aifc.py',
    'antigravity.py',
    'asynchat.py',
    'asyncore.py',
    'audioop.py',
    'cgi.py',
    'cgitb.py',
    'chunk.py',
    'crypt.py',
    'ctypes',
    'curses',
    'dbm',
    'distutils',
    'encodings',
    'ensurepip',
    'idlelib',
    'imghdr.py',
    'imp.py',
    'lib-dynload',
    'lib2to3',
    'mailcap.py',
    'msilib',
    'nntplib.py',
    'nturl2path.py',
    'pipes.py',
    'pydoc_data',
    'site-packages',
    'smtpd.py',
    'sndhdr.py',
    'sre_compile.py',
    'sre_constants.py',
    'sre_parse.py',
    'sunau.py',
    'telnetlib.py',
    'test',
    'tests',
    'this.py',
    'tkinter',
    'turtledemo',
    'uu.py',
    'xdrlib.py',
  )
)

# Modules that are compiled into the interpreter, without a source file to read.
_COMPILED = ('builtins', 'itertools', 'math', 'time')
_BUILTIN_TYPES = (
  'bytes',
  'dict',
  'float',
  'int',
  'list',
  'set',
  'str',
  'tuple',
)

_ASCII = {
  0x2018: "'",
  0x2019: "'",
  0x201C: '"',
  0x201D: '"',
  0x2013: '-',
  0x2014: '--',
  0x2026: '...',
}
_UNDERLINE = re.compile(r'([*=~^"-])\1{3,}')
# Lengths in characters: a small model gets fluent on little text, read often.
_MAX_TOPIC = 4000
_MAX_ANSWER = 200
_HELD_OUT = 25  # one document in so many is not trained on


class Document(NamedTuple):
  """One complete text to learn.

  Attributes:
    name: 'topic:for' or 'textwrap.fill'.
    text: without the special token that ends it.
  """

  name: str
  text: str


def documents(limit: int | None = None) -> list[Document]:
  """Returns all documents, the language reference first; at most `limit`."""
  return list(itertools.islice(itertools.chain(_topics(), _answers()), limit))


def split(docs: Sequence[Document]) -> tuple[list[Document], list[Document]]:
  """Splits documents into those to train on, and those to measure on.

  Holds out docstrings, chosen by name. Topics overlap each other, so holding
  one out would measure memory.
  """

  def held_out(doc: Document) -> bool:
    digest = hashlib.sha256(doc.name.encode()).digest()
    return not doc.name.startswith('topic:') and digest[0] % _HELD_OUT == 0

  return (
    [doc for doc in docs if not held_out(doc)],
    [doc for doc in docs if held_out(doc)],
  )


def sentence_starts(body: str) -> list[int]:
  """Returns the offsets where a text, its paragraphs and sentences begin."""
  return [
    0,
    *(match.end() for match in re.finditer(r'\n\n|[.:!?] (?=[A-Z])', body)),
  ]


def words(docs: Sequence[Document]) -> frozenset[str]:
  """Returns every word of the documents, in lower case."""
  return frozenset(word for doc in docs for word in find_words(doc.text))


def find_words(text: str) -> list[str]:
  """Returns the runs of two or more letters of a text, in lower case."""
  return [word.lower() for word in re.findall(r'[^\W\d_]{2,}', text)]


def _topics() -> Iterator[Document]:
  from pydoc_data import topics  # half a megabyte: only when wanted

  seen: set[str] = set()
  docs = []
  # Long topics contain short ones, which are better to have whole.
  for name, body in sorted(
    topics.topics.items(), key=lambda item: (len(item[1]), item[0])
  ):
    # The title goes: prompts don't begin with one.
    paragraphs = list(_unseen(_paragraphs(body), seen))[1:]
    text = _cut(_without_code(paragraphs), _MAX_TOPIC)
    if len(text) > 200:
      docs.append(Document(f'topic:{name}', text))
  yield from sorted(docs)


def _unseen(paragraphs: Sequence[str], seen: set[str]) -> Iterator[str]:
  """Yields the paragraphs that are not in `seen`, and adds them to it.

  Short ones (headings, code) may be equal by chance; they stay with the
  paragraph before them.
  """
  keep = True
  for paragraph in paragraphs:
    if len(paragraph) > 80:
      keep = paragraph not in seen
      seen.add(paragraph)
    if keep:
      yield paragraph


def _without_code(paragraphs: Iterable[str]) -> Iterator[str]:
  """Yields paragraphs without grammar and code.

  A model this small learns one kind of text better. A paragraph that announces
  code ends in a period instead, or is left out too if it is short.
  """
  before = ''
  for paragraph in paragraphs:
    is_code = paragraph.startswith(' ') or '\n' in paragraph
    if is_code and before.endswith(':'):
      before = before[:-1] + '.' if len(before) > 60 else ''
    if before:
      yield before
    before = '' if is_code else paragraph
  if before:
    yield before


def _answers() -> Iterator[Document]:
  seen: set[str] = set()
  for name, kind, docstring in _docstrings():
    answer = _shorten(_paragraphs(docstring))
    # Deeper names are of methods and the inside of packages.
    if name.count('.') > 1 or len(answer) < 20 or answer in seen:
      continue
    seen.add(answer)
    question = (
      f'What is the {name} module?'
      if kind == 'module'
      else f'What is {name}?'
      if kind == 'class'
      else f'What does {name} do?'
    )
    yield Document(name, f'{USER}{question}{ASSISTANT}{answer}')


def _shorten(paragraphs: Iterable[str]) -> str:
  """Returns the leading paragraphs that explain, or the first's sentences."""
  prose = list(
    itertools.takewhile(
      lambda p: re.match(r'[A-Z]', p) and p[-1] in '.:!?)', paragraphs
    )
  )
  text = _cut(prose, _MAX_ANSWER)
  if prose and not text:
    ends = [start - 1 for start in sentence_starts(prose[0])[1:]]
    text = prose[0][: max((e for e in ends if e <= _MAX_ANSWER), default=0)]
  # What a final colon announces was cut off.
  return '' if text.endswith(':') else text


def _cut(paragraphs: Iterable[str], most: int) -> str:
  """Joins leading paragraphs that together have at most `most` characters."""
  kept: list[str] = []
  for paragraph in paragraphs:
    if sum(map(len, kept)) + len(paragraph) > most:
      break
    kept.append(paragraph)
  return '\n\n'.join(kept)


def _docstrings() -> Iterator[tuple[str, str, str]]:
  """Yields (qualified name, kind, docstring) of what is public.

  A kind is 'module', 'class' or 'function'.
  """
  yield from _compiled_docstrings()
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root).parts
    if _SKIPPED & set(parts) or any(
      part.startswith('_') and part != '__init__.py' for part in parts
    ):
      continue
    module = '.'.join(parts).removesuffix('.py').removesuffix('.__init__')
    try:
      tree = ast.parse(path.read_text(encoding='utf-8'))
    except (SyntaxError, UnicodeDecodeError):
      continue  # Files that are there to be wrong.
    yield from _of(tree, module, 'module')


def _compiled_docstrings() -> Iterator[tuple[str, str, str]]:
  for module_name in _COMPILED:
    module = importlib.import_module(module_name)
    prefix = '' if module_name == 'builtins' else f'{module_name}.'
    for name, value in sorted(vars(module).items()):
      # `site` adds helpers for the prompt, which are neither of these.
      if name.startswith('_') or not (
        inspect.isclass(value) or inspect.isbuiltin(value)
      ):
        continue
      kind = 'class' if inspect.isclass(value) else 'function'
      yield f'{prefix}{name}', kind, value.__doc__ or ''
      if value.__name__ in _BUILTIN_TYPES and not prefix:
        for method, function in sorted(vars(value).items()):
          if not method.startswith('_'):
            yield f'{name}.{method}', 'function', function.__doc__ or ''


def _of(node: ast.AST, name: str, kind: str) -> Iterator[tuple[str, str, str]]:
  assert isinstance(
    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  )
  docstring = ast.get_docstring(node)
  if docstring:
    yield name, kind, docstring
  if kind == 'function':
    return
  for child in node.body:
    if isinstance(
      child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    ) and not child.name.startswith('_'):
      child_kind = 'class' if isinstance(child, ast.ClassDef) else 'function'
      yield from _of(child, f'{name}.{child.name}', child_kind)


def _paragraphs(text: str) -> list[str]:
  """Splits a text into paragraphs; joins lines of prose, and not of code."""
  text = text.translate(_ASCII)
  blocks = re.split(r'\n[ \t]*\n', text.expandtabs())
  return [p for p in map(_paragraph, blocks) if p]


def _paragraph(block: str) -> str:
  lines = [line.rstrip() for line in block.strip('\n').split('\n')]
  # A heading is underlined, and sometimes overlined.
  lines = [line for line in lines if not _UNDERLINE.fullmatch(line)]
  if not lines or not all(map(str.isascii, lines)):
    return ''
  text = ' '.join(line.strip() for line in lines)
  return _plain(text) if _is_prose(lines, text) else '\n'.join(lines)


def _is_prose(lines: Sequence[str], text: str) -> bool:
  """Says whether lines are prose: sentences, a heading or a list's item."""
  indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
  body = re.sub(r'^([*-]|\d+\.) ', '', text)
  letters = sum(c.isalpha() or c in " ,.'" for c in body)
  sentence = re.match(r'["\'(*`]*[A-Z]', body) and body[-1] in '.:!?)'
  return (
    len(indents) <= 1
    and '>>>' not in text
    and '::=' not in text
    and letters > 0.85 * len(body)
    and bool(sentence or not lines[0].startswith(' '))
  )


def _plain(prose: str) -> str:
  """Removes the marks around literals and emphasis, which nobody types."""
  prose = re.sub(r'(\w-) (?=[a-z])', r'\1', prose)  # was at a line's end
  prose = re.sub(r' {2,}', ' ', prose)
  prose = re.sub(r'``([^`]+)``', r'\1', prose)
  prose = re.sub(r'[`"]([^`"]{1,60})[`"\']', r'\1', prose)
  return re.sub(r'(?<![\w*])\*([A-Za-z][\w ./-]*)\*(?![\w*])', r'\1', prose)
