# SPDX-License-Identifier: Apache-2.0
"""What adapters of protocols share about messages."""

from __future__ import annotations

from google.protobuf import message as message_lib
from google.protobuf import unknown_fields

from sarathi_jax import errors


def refuse_unknown(message: message_lib.Message) -> None:
  """Refuses what a newer client asks for, rather than ignore it.

  Raises:
    UnsupportedError: a field that this server does not know.
  """
  unknown = unknown_fields.UnknownFieldSet(message)
  if len(unknown):
    raise errors.UnsupportedError(
      f'{message.DESCRIPTOR.full_name}: this server does not know its field '
      f'number {unknown[0].field_number}.')
  for field, value in message.ListFields():
    if field.message_type is None:
      continue
    if field.message_type.GetOptions().map_entry:
      if field.message_type.fields_by_name['value'].message_type is not None:
        for part in value.values():
          refuse_unknown(part)
      continue
    for part in value if field.is_repeated else (value,):
      refuse_unknown(part)
