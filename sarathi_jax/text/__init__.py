# SPDX-License-Identifier: Apache-2.0
"""Turns text into tokens and back: tokenizers, chats. Loads no JAX."""
