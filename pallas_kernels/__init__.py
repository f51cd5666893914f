"""Kernels for DeepSeek-V3 in JAX. Every op takes `implementation=None` (the best here) or a name of
`op.implementations()`."""

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.fp8 import grouped_matmul_fp8
from pallas_kernels.grouped_matmul.scales import quantise_blocks, quantise_rows, quantise_tiles
from pallas_kernels.mla_decode import make_plan, mla_decode
from pallas_kernels.swiglu import swiglu, swiglu_gradients

__all__ = ['flash_attention', 'grouped_matmul', 'grouped_matmul_fp8', 'make_plan', 'mla_decode', 'quantise_blocks',
           'quantise_rows', 'quantise_tiles', 'swiglu', 'swiglu_gradients']
