# SPDX-License-Identifier: Apache-2.0
"""Grammars of what requests ask their outputs to be, by llguidance. No JAX.

`compiler` makes a grammar of what a request asks for, once, before the request
is queued; `matcher` follows one output through it, and says which tokens may
come next. `texts` writes grammars as llguidance reads them.
"""
