# SPDX-License-Identifier: Apache-2.0
"""Knows no message of the server: asks it for them, and calls. PORT."""

from __future__ import annotations

import json
import sys

from google.protobuf import descriptor_pool
from google.protobuf import json_format
from google.protobuf import message_factory
import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database


def main() -> None:
  with grpc.insecure_channel(f'127.0.0.1:{sys.argv[1]}') as channel:
    database = (
      proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(
        channel
      )
    )
    pool = descriptor_pool.DescriptorPool(database)
    health = health_pb2_grpc.HealthStub(channel)
    services = sorted(database.get_services())
    statuses = {
      name: health.Check(health_pb2.HealthCheckRequest(service=name)).status
      for name in ('', *services)
      if not name.startswith('grpc.')
    }
    method = pool.FindServiceByName('sarathi.v1.Sarathi').methods_by_name[
      'Generate'
    ]
    request = json_format.ParseDict(
      {'token_ids': {'ids': [1, 2]}, 'sampling': {'max_tokens': 3}},
      message_factory.GetMessageClass(method.input_type)(),
    )
    call = channel.unary_stream(
      '/sarathi.v1.Sarathi/Generate',
      request_serializer=lambda message: message.SerializeToString(),
      response_deserializer=message_factory.GetMessageClass(
        method.output_type
      ).FromString,
    )
    tokens = [t for r in call(request, timeout=20) for t in r.token_ids]
  print(
    json.dumps({'services': services, 'statuses': statuses, 'tokens': tokens})
  )


main()
