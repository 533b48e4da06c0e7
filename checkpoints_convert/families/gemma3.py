# SPDX-License-Identifier: Apache-2.0
"""Gemma-3 that takes images, too: the text part is Gemma-3's text."""

from __future__ import annotations

from checkpoints_convert.families import gemma3_text

read_config = gemma3_text.read_config
rules = gemma3_text.rules
