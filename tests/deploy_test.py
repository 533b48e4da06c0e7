# SPDX-License-Identifier: Apache-2.0
"""What is under configs/deploy is what Kubernetes and a shell accept."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sarathi_jax.cli import deployment
from sarathi_jax.server.protocols import health
from tests import source_tree

FOLDER = source_tree.ROOT / 'configs' / 'deploy'


def documents() -> list[dict[str, Any]]:
  return list(yaml.safe_load_all((FOLDER / 'kubernetes_lws.yaml').read_text()))


def validate(document: dict[str, Any]) -> None:
  kubernetes_validate.validate(
    document, kubernetes_validate.latest_version(), strict=True
  )


def pod(template: dict[str, Any]) -> dict[str, Any]:
  return {
    'apiVersion': 'v1',
    'kind': 'Pod',
    'spec': template['spec'],
    'metadata': {'name': 'x', **template['metadata']},
  }


def test_pods_and_services_are_valid():
  """LeaderWorkerSet's own schema is in its controller alone."""
  workers, service = documents()
  template = workers['spec']['leaderWorkerTemplate']
  for part in ('leaderTemplate', 'workerTemplate'):
    validate(pod(template[part]))
  validate(service)
  labels = template['leaderTemplate']['metadata']['labels']
  assert service['spec']['selector'] == labels
  (container,) = template['leaderTemplate']['spec']['containers']
  assert {p['name'] for p in container['ports']} == {
    p['targetPort'] for p in service['spec']['ports']
  }


def test_probes_ask_what_the_server_knows():
  """To be ready is to serve; to be alive is less, so loading ends nobody."""
  template = documents()[0]['spec']['leaderWorkerTemplate']['leaderTemplate']
  (container,) = template['spec']['containers']
  ports = {p['name']: p['containerPort'] for p in container['ports']}
  assert (
    f'--port={ports["grpc"]} --http_port={ports["http"]}'
    in (container['args'][0])
  )
  port = ports['grpc']
  asked = {
    kind: container[f'{kind}Probe']['grpc']
    for kind in ('readiness', 'startup', 'liveness')
  }
  assert asked['readiness'] == {'port': port}
  assert (
    asked['startup']
    == asked['liveness']
    == {'port': port, 'service': health.LIVENESS}
  )


def test_a_wrong_field_is_found():
  """The negative control."""
  template = documents()[0]['spec']['leaderWorkerTemplate']['leaderTemplate']
  template['spec']['containers'][0]['imagee'] = 'x'
  with pytest.raises(kubernetes_validate.ValidationError):
    validate(pod(template))


def test_nodes_and_gpus_are_as_many_as_the_config_asks_for():
  template = documents()[0]['spec']['leaderWorkerTemplate']
  gpus = int(
    template['workerTemplate']['spec']['containers'][0]['resources']['limits'][
      'nvidia.com/gpu'
    ]
  )
  text = (FOLDER / 'slurm.sh').read_text()
  sizes = [
    int(n) for n in re.findall(r'#SBATCH --(?:nodes|gpus-per-node)=(\d+)', text)
  ]
  for nodes, each in ((template['size'], gpus), tuple(sizes)):
    config = deployment.read(
      str(source_tree.ROOT / 'configs' / 'falcon_180b_a100_tp4_pp2.py')
    ).config
    assert nodes * each == (config.tp or 1) * config.pp
    assert each == (config.tp or 1)  # A stage a node.


def test_the_script_is_one():
  subprocess.run(['bash', '-n', FOLDER / 'slurm.sh'], check=True)


def test_pods_are_given_the_same_secret():
  template = documents()[0]['spec']['leaderWorkerTemplate']
  for part in ('leaderTemplate', 'workerTemplate'):
    spec = template[part]['spec']
    (container,) = spec['containers']
    (mount,) = [m for m in container['volumeMounts'] if m['name'] == 'join']
    assert f'--join_key_file={mount["mountPath"]}/key' in container['args'][0]
    (volume,) = [v for v in spec['volumes'] if v['name'] == 'join']
    assert volume['secret'] == {'secretName': 'falcon-180b-join'}
