"""Kernels for DeepSeek-V3 in JAX. Every op takes `implementation=None` (the best here) or a name of
`op.implementations()`."""

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.mla_decode import make_plan, mla_decode
from pallas_kernels.swiglu import swiglu, swiglu_gradients

__all__ = ['flash_attention', 'grouped_matmul', 'make_plan', 'mla_decode', 'swiglu', 'swiglu_gradients']
