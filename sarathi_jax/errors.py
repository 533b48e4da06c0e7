# SPDX-License-Identifier: Apache-2.0
"""Every error that sarathi_jax raises on purpose.

  SarathiError
  ├── InvalidRequestError   the request is wrong: gRPC INVALID_ARGUMENT
  │   ├── UnsupportedError  the request is right, but asks what we don't do
  │   ├── ForbiddenError    its caller may not: gRPC PERMISSION_DENIED
  │   ├── NotFoundError     it names what is not here: gRPC NOT_FOUND
  │   └── ExpiredError      it goes on after what is lost: gRPC OUT_OF_RANGE
  ├── BusyError             another thread uses it
  ├── CapacityError         too much at once: gRPC RESOURCE_EXHAUSTED
  ├── MissedError           its reader was too slow: gRPC DATA_LOSS
  ├── DeadlineError         can't be done in time: gRPC DEADLINE_EXCEEDED
  ├── StepError             its step failed, others go on: gRPC INTERNAL
  ├── ConfigError           the engine's configuration or model is wrong
  │   └── CheckpointError   a checkpoint is missing, damaged or unknown
  └── EngineDeadError       the engine stopped; nothing more will be served

A message names the field, the value it got, and the rule. A client may send a
value of any size: a message shortens it by `shown`, and any other text of a
client by `cut`.
"""

from __future__ import annotations

import reprlib

_MOST = 100  # characters of a value, or of a part of it
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _MOST
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 10


def shown(value: object) -> str:
  """Returns the repr of a value; of a long one, of its ends, and its length."""
  text = _SHORT.repr(value)
  size = (
    len(value)
    if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset))
    else 0
  )
  return (
    f'{text} (length {size:,})'
    if size > (_MOST if isinstance(value, (str, bytes)) else 10)
    else text
  )


def cut(text: str, most: int = _MOST) -> str:
  """Returns a text; of a long one, its beginning and its length."""
  if len(text) <= most:
    return text
  return f'{text[:most]}... (length {len(text):,})'


class SarathiError(Exception):
  """The root of the errors below."""


class InvalidRequestError(SarathiError, ValueError):
  """A request that can never be served as it stands."""


class UnsupportedError(InvalidRequestError):
  """A valid request for something that this engine does not do."""


class ForbiddenError(InvalidRequestError):
  """A request for what its caller may not ask for."""


class NotFoundError(InvalidRequestError):
  """A request that names a model, or another thing, that is not here."""


class ExpiredError(InvalidRequestError):
  """A request to go on after a place that is not known, or no more."""


class BusyError(SarathiError, RuntimeError):
  """A call while another thread uses an object that admits one at a time.

  Or while it sleeps. Nothing is lost: try again later.
  """


class CapacityError(SarathiError):
  """A request that there is no room for at the moment.

  Args:
    message: what is full.
    retry_after_s: seconds after which it may be worth trying again; the
      default is a guess.
  """

  def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
    super().__init__(message)
    self.retry_after_s = retry_after_s


class MissedError(SarathiError):
  """What a reader has not yet read is no longer kept: it was too slow."""


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
  """Returns an error in words; of one without a message, its type's name."""
  if isinstance(error, SarathiError):
    return str(error) or type(error).__name__
  return f'{type(error).__name__}: {error}'.removesuffix(': ')
