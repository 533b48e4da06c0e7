# SPDX-License-Identifier: Apache-2.0
"""A request's way from its call to the engine's thread and back."""
