# SPDX-License-Identifier: Apache-2.0
"""The parts of `LLM`: an engine built, and driven by its caller."""
