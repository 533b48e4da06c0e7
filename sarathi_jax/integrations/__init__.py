# SPDX-License-Identifier: Apache-2.0
"""The engine as other programs want it; each of them is in a file of its own.

None is imported by the rest of the package, nor needed by it.
"""
