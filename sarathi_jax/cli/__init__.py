# SPDX-License-Identifier: Apache-2.0
"""What the commands share: flags, deployment files, prompts, summaries."""
