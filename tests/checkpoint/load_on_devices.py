"""A process of a test: loads a golden checkpoint over a mesh of all processes' devices, compares what it holds with the
NumPy arrays, and prints how many bytes it read.  Arguments: process, processes, port, fsdp, expert."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'

import jax
import numpy as np

from mla_jax.axes import make_mesh
from mla_jax.checkpoint import hugging_face, published, tensor_files
from mla_jax.config import MeshConfig

FOLDER = Path(__file__).parents[1] / 'golden/v3'


def main(process: int, processes: int, port: int, fsdp: int, expert: int):
  if processes > 1:
    jax.distributed.initialize(f'localhost:{port}', processes, process)
  readers, original = [], hugging_face.Reader
  hugging_face.Reader = lambda stored: readers.append(original(stored)) or readers[-1]
  mesh = make_mesh(MeshConfig(fsdp=fsdp, expert=expert))
  expected = hugging_face.load(FOLDER)
  found = hugging_face.load(FOLDER, place=mesh)
  leaves = list(zip(jax.tree.leaves(found[1:]), jax.tree.leaves(expected[1:]), strict=True))
  right = all(np.array_equal(shard.data, whole[shard.index]) and whole.dtype == array.dtype
              for array, whole in leaves for shard in array.addressable_shards)
  split = sum(not array.is_fully_replicated for array, _ in leaves)

  if processes == 1:  # and out again, from arrays that are cut over devices
    with tempfile.TemporaryDirectory() as folder:
      hugging_face.save(f'{folder}/hf', *found)
      again = tensor_files.Reader(tensor_files.scan(Path(folder) / 'hf'))
      with again, original(tensor_files.scan(FOLDER)) as first:
        right &= all(np.array_equal(again.read(name), first.read(name)) for name in first.stored)

  stored, repeats = tensor_files.scan(FOLDER), published.repeats(found[0])
  # Devices of a process are neighbours on the mesh's last axes: processes split experts, or with fsdp=2 the rows of D.
  split_by = re.compile(r'\.experts\.|\.gate\.' if fsdp == 1 else
                        r'down_proj|o_proj|eh_proj|(put|tion)_layernorm|[eh]norm|model\.norm|head\.norm')
  out = 0
  for name, tensor in stored.items():
    if name in repeats:
      out += 2 * tensor.nbytes // processes
    else:
      out += tensor.nbytes // (processes if split_by.search(name) else 1)
  print(json.dumps(dict(read=readers[-1].bytes_read, expected=out, right=right, split=split,
                        all=sum(tensor.nbytes for tensor in stored.values()))))


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
