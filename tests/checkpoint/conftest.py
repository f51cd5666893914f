"""Directories that several files of tests read."""


import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mla_jax.checkpoint import hugging_face
from tests.checkpoint.small import WIDE, random_model, stored_tensors


@pytest.fixture(scope='session')
def fp8_folder(tmp_path_factory):
  """FP8 as the releases have it, made without our quantiser: random bytes and random scales, some of them in another
  file than their weight."""
  folder = tmp_path_factory.mktemp('fp8')
  params, buffers = random_model(WIDE, ml_dtypes.bfloat16)
  buffers = jax.tree.map(lambda b: b.astype(np.float32), buffers)
  hugging_face.save(folder / 'hf', WIDE, params, buffers, fp8='float32')
  tensors, random = stored_tensors(folder / 'hf'), np.random.default_rng(1)
  for name in [n for n in tensors if n.endswith('_scale_inv')]:
    q = random.integers(0, 255, tensors[name.removesuffix('_scale_inv')].shape).astype(np.uint8)
    q = np.where(q % 128 == 127, 126, q).astype(np.uint8)  # no NaN
    q[0::128, 0::128] = 126  # 448: the release scales a block's largest to it
    tensors[name.removesuffix('_scale_inv')] = q.view(ml_dtypes.float8_e4m3fn)
    tensors[name] = np.exp(random.uniform(-9, -6, tensors[name].shape)).astype(np.float32)
  (folder / 'hf/model.safetensors').unlink()
  late = {n: tensors.pop(n) for n in list(tensors) if n.endswith('v_b_proj.weight_scale_inv')}
  save_file(tensors, folder / 'hf/a.safetensors')
  save_file(late, folder / 'hf/b.safetensors')
  return folder / 'hf'
