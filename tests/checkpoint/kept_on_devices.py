"""Run by test_kept_fp8.py in a process with eight simulated devices: kept FP8 weights on meshes (data x fsdp x expert)
against the arrays they stand for; on some with so few tokens that only some experts leave FP8. Prints a JSON line a
mesh."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mla_jax.axes import make_mesh
from mla_jax.checkpoint import hugging_face
from mla_jax.config import MeshConfig
from mla_jax.model import experts, fp8
from mla_jax.model.transformer import abstract
from tests.checkpoint.small import stored_tensors
from tests.checkpoint.test_kept_fp8 import FAMILIES, write


def main():
  config = dataclasses.replace(FAMILIES['v3'], n_routed_experts=16)
  graph, few = abstract(config).graph, set()

  def watched(sizes_E, rows, *weights):
    few.add(rows < len(sizes_E))
    return fp8.chosen(sizes_E, rows, *weights)

  experts.chosen = watched
  with tempfile.TemporaryDirectory() as folder:
    source = write(Path(folder) / 'hf', config)
    for sizes, length in (((2, 2, 2), 12), ((1, 8, 1), 12), ((8, 1, 1), 1), ((2, 4, 1), 1), ((4, 1, 2), 1)):
      mesh, out = make_mesh(MeshConfig(*sizes)), []
      tokens_BT = np.arange(8 * length).reshape(8, length) % config.vocab_size
      few.clear()
      for form in ('dequantise', 'keep'):
        _, *trees = hugging_face.load(source, place=mesh, fp8=form)
        with jax.set_mesh(mesh):
          out.append(np.asarray(jax.jit(lambda tokens_BT, *trees: nnx.merge(graph, *trees)(tokens_BT)[0])(
              tokens_BT, *trees)))
      wi = trees[0]['moe_blocks']['ffn']['wi_ED2F']
      saved = Path(folder) / str(sizes)
      hugging_face.save(saved, config, *trees)
      files = stored_tensors(source), stored_tensors(saved)
      print(json.dumps(dict(
          mesh=sizes, few=sorted(few), same_logits=np.array_equal(*out),
          wi_ED2F=wi.bits.addressable_shards[0].data.shape, scales=wi.scales.addressable_shards[0].data.shape,
          same_files=files[0].keys() == files[1].keys() and all(
              np.array_equal(*(f[name].view(np.uint8) for f in files)) for name in files[0]))), flush=True)


if __name__ == '__main__':
  main()
