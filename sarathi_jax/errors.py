# SPDX-License-Identifier: Apache-2.0
"""Every error that sarathi_jax raises on purpose.

  SarathiError
  ├── InvalidRequestError   the request is wrong: gRPC INVALID_ARGUMENT
  │   ├── UnsupportedError  the request is right, but asks what we don't do
  │   ├── ForbiddenError    its caller may not: gRPC PERMISSION_DENIED
  │   └── NotFoundError     it names what is not here: gRPC NOT_FOUND
  ├── BusyError             another thread uses it
  ├── CapacityError         too much at once: gRPC RESOURCE_EXHAUSTED
  ├── DeadlineError         can't be done in time: gRPC DEADLINE_EXCEEDED
  ├── StepError             its step failed, others go on: gRPC INTERNAL
  ├── ConfigError           the engine's configuration or model is wrong
  │   └── CheckpointError   a checkpoint is missing, damaged or unknown
  └── EngineDeadError       the engine stopped; nothing more will be served

A message names the field, the value it got, and the rule.
"""


class SarathiError(Exception):
  """The root of the errors below."""


class InvalidRequestError(SarathiError, ValueError):
  """A request that can never be served as it stands."""


class UnsupportedError(InvalidRequestError):
  """A request for something that this engine does not do."""


class ForbiddenError(InvalidRequestError):
  """A request for what its caller may not ask for."""


class NotFoundError(InvalidRequestError):
  """A request that names a model, or another thing, that is not here."""


class BusyError(SarathiError, RuntimeError):
  """A call while another thread uses what takes one at a time."""


class CapacityError(SarathiError):
  """A request that there is no room for at the moment.

  Args:
    message: what is full.
    retry_after_s: when it may be worth to try again, seconds; by default a
      guess.
  """

  def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
    super().__init__(message)
    self.retry_after_s = retry_after_s


class DeadlineError(SarathiError):
  """A request that can't be served before its deadline."""


class StepError(SarathiError):
  """A request whose step failed; its cause is `__cause__`."""


class ConfigError(SarathiError, ValueError):
  """A configuration that can't work, found before anything is loaded."""


class CheckpointError(ConfigError):
  """A checkpoint that can't be loaded or converted."""


class EngineDeadError(SarathiError):
  """The engine has stopped after a fault; its cause is `__cause__`."""


def describe(error: BaseException) -> str:
  """What went wrong, in words: some errors have none."""
  if isinstance(error, SarathiError):
    return str(error) or type(error).__name__
  return f'{type(error).__name__}: {error}'.removesuffix(': ')
