"""Run by test_kept_fp8.py in a process with eight simulated devices: kept FP8 weights on meshes (data x fsdp x expert)
against the arrays they stand for. Prints a JSON line a mesh."""

import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mla_jax.axes import make_mesh
from mla_jax.checkpoint import hugging_face
from mla_jax.config import MeshConfig
from mla_jax.model.transformer import abstract
from tests.checkpoint.small import stored_tensors
from tests.checkpoint.test_kept_fp8 import FAMILIES, write


def main():
  config = FAMILIES['v3']
  graph, tokens_BT = abstract(config).graph, np.arange(96).reshape(8, 12) % config.vocab_size
  with tempfile.TemporaryDirectory() as folder:
    source = write(Path(folder) / 'hf', config)
    for sizes in ((2, 2, 2), (1, 8, 1)):
      mesh, out = make_mesh(MeshConfig(*sizes)), []
      for fp8 in ('dequantise', 'keep'):
        _, *trees = hugging_face.load(source, place=mesh, fp8=fp8)
        with jax.set_mesh(mesh):
          out.append(np.asarray(jax.jit(lambda *trees: nnx.merge(graph, *trees)(tokens_BT)[0])(*trees)))
      wi = trees[0]['moe_blocks']['ffn']['wi_ED2F']
      saved = Path(folder) / str(sizes)
      hugging_face.save(saved, config, *trees)
      files = stored_tensors(source), stored_tensors(saved)
      print(json.dumps(dict(
          mesh=sizes, same_logits=np.array_equal(*out), wi_ED2F=wi.bits.addressable_shards[0].data.shape,
          scales=wi.scales.addressable_shards[0].data.shape,
          same_files=files[0].keys() == files[1].keys() and all(
              np.array_equal(*(f[name].view(np.uint8) for f in files)) for name in files[0]))), flush=True)


if __name__ == '__main__':
  main()
