# SPDX-License-Identifier: Apache-2.0
"""A tiny language model that comes with the engine, and how it was trained.

`MODEL` is its folder, a Hugging Face checkpoint; `scripts/serve` serves it.
`train` makes such a folder, and samples through the engine while it trains: it
is an example of the engine inside a JAX program.

`HELD_OUT` is a text that it did not see, to measure perplexity by: docstrings
of CPython 3.11.7 that were held out, or are of names too deep to be learned.
Their licence is the PSF's, too.
"""

import pathlib

MODEL = pathlib.Path(__file__).parent / 'model'
HELD_OUT = pathlib.Path(__file__).parent / 'held_out.txt'
