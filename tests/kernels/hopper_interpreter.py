"""Pallas' interpreter of GPU kernels, taught what our Hopper kernels use and it lacks (jax 0.11.2): storing into a
wgmma accumulator, `pl.run_state` over accumulators, wgmma with its left operand in registers, and from inline assembly
our zero and our vote. It runs the programs of a grid one after the other, so a program that waits for another by a
semaphore raises."""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic_gpu

MULTIPROCESSORS = 2  # so that a program has several tiles


def refuse_stores_past_the_end(monkeypatch):
  """From here on the interpreter raises where a copy to GMEM along one dimension passes the end of a row.

  TMA's tensor copies stop there, and so do the interpreter's of every kind; but where the place is contiguous and has
  no tiled layout, Mosaic stores by a plain bulk copy, which goes on into the next row.
  """
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
  from jax._src.state import indexing

  def guarded(store=gpu_callbacks.copy_smem_to_gmem, **arguments):
    for indexer in arguments['dst_transforms']:
      if isinstance(indexer, indexing.NDIndexer):
        ends = [(int(i.start) + i.size, n) for i, n in zip(indexer.indices, indexer.shape, strict=True)
                if isinstance(i, indexing.Slice)]
        if len(ends) == 1 and ends[0][0] > ends[0][1]:
          raise IndexError('a bulk copy up to {} of an axis of {}: it would not stop there'.format(*ends[0]))
    return store(**arguments)

  monkeypatch.setattr(gpu_callbacks, 'copy_smem_to_gmem', gpu_callbacks.fail_on_exception(guarded))


@contextlib.contextmanager
def interpreter(monkeypatch):
  """Inside it Hopper kernels run on the CPU: memory starts as NaN, deadlocks raise, races are looked for.

  Yields a function that says whether a race was found.
  """
  from jax._src import callback
  from jax._src.pallas import primitives as pallas_primitives
  from jax._src.pallas.mosaic_gpu import primitives
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, jaxpr_interpret, shared_memory
  from jax._src.state import discharge, types
  from jax._src.state import primitives as state

  def store(token, mesh_location, thread, key, value, source_info):
    """Into an accumulator: registers, so nothing that could race."""
    memory, key = gpu_callbacks._get_shared_memory(), gpu_callbacks.HostAllocationKey.from_array(key)
    info = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    memory.store_buffer_content(key, memory.access(key, ()), np.asarray(value), thread, logging_info=info)
    return token

  class Interpreter(jaxpr_interpret.JaxprInterpreter):

    def _store(self, eqn, token, accumulator, value):
      return callback.io_callback(
        functools.partial(store, source_info=eqn.source_info), gpu_callbacks.TOKEN_SHAPE_DTYPE, token,
        self.mesh_location, self.thread, accumulator, value)

    def _interpret_swap_p(self, eqn, token, get_invals):
      reference, value, *indices = get_invals()
      if eqn.primitive is primitives.wgmma_accumulator_store_p:
        return self._store(eqn, token, reference, value), value
      return gpu_callbacks.call_swap(
        token=token, result_shape_and_dtype=eqn.outvars[0].aval, mesh_location=self.mesh_location, thread=self.thread,
        allocation_key_as_array=reference, transforms=jax.tree.unflatten(eqn.params['tree'], indices), val=value,
        mask=None, source_info=eqn.source_info)

    def _interpret_wgmma_ref_p(self, eqn, token, get_invals):
      total, a = (v.aval for v in eqn.invars[:2])
      if isinstance(a, types.AbstractRef):
        return super()._interpret_wgmma_ref_p(eqn, token, get_invals)
      accumulator, a, b, *indices = get_invals()
      here = {'token': token, 'mesh_location': self.mesh_location, 'thread': self.thread}
      token, b = gpu_callbacks.call_get(
        **here, result_shape_and_dtype=jax.ShapeDtypeStruct((a.shape[1], total.shape[1]), a.dtype),
        allocation_key_as_array=b, transforms=jax.tree.unflatten(eqn.params['b_transforms_tree'], indices),
        source_info=eqn.source_info)
      read = functools.partial(gpu_callbacks.wgmma_accumulator_deref, source_info=eqn.source_info)
      token, old = callback.io_callback(
        read, (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(total.shape, total.dtype)),
        **{**here, 'token': token}, acc_allocation_key_as_array=accumulator, wait_n=None)
      new = old + jnp.dot(a, b, preferred_element_type=jnp.float32)
      return self._store(eqn, token, accumulator, new), []

    def _interpret_barrier_arrive_p(self, eqn, token, get_invals):
      # A buffer that a thread has read may be loaded anew once it arrived: the interpreter asks for a fence between the
      # two ways to memory first, which no kernel in the field has and the hardware's order of a load and what follows
      # it makes unnecessary.
      token = callback.io_callback(gpu_callbacks.commit_smem, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token,
                                   mesh_location=self.mesh_location, thread=self.thread)
      return super()._interpret_barrier_arrive_p(eqn, token, get_invals)

    def _interpret_inline_mgpu_p(self, eqn, token, get_invals):
      if eqn.primitive is discharge.run_state_p:
        return self._run_state(eqn, token, get_invals())
      if eqn.primitive is pallas_primitives.get_global_p:
        return token, jnp.int32(0)  # nobody asks for the semaphores
      if eqn.primitive in semaphores:
        token = callback.io_callback(no_semaphores, gpu_callbacks.TOKEN_SHAPE_DTYPE, token)
        return token, []
      name = eqn.params['mgpu_fn'].__name__
      assert name in ('opaque', 'vote'), eqn
      # A vote of the warpgroup's rows and not of a warp's: what depends on it may be done for more rows than must.
      return token, [jnp.any(get_invals()[0] > 0).astype(jnp.int32) if name == 'vote' else jnp.int32(0)]

    def _run_state(self, eqn, token, invals):
      """Values become registers and come back when all products are done; references go in as they are."""
      here = {'mesh_location': self.mesh_location, 'thread': self.thread}
      values = [not isinstance(v.aval, types.AbstractRef) for v in eqn.invars]
      keys = list(invals)
      for i, value in enumerate(invals):
        if values[i]:
          token, request = gpu_callbacks.call_make_allocation_request_array(
            token=token, compute_unit=self.thread, initial_ref_count=1,
            memory_space_id=shared_memory.get_memory_space_idx(mosaic_gpu.plgpu.MemorySpace.REGS))
          token, keys[i] = gpu_callbacks.call_allocate_buffer(
            token=token, **here, allocation_request_as_array=request, value=value, source_info=eqn.source_info)
      token, _ = self.interpret(eqn.params['jaxpr'], token, *keys)
      read = functools.partial(gpu_callbacks.wgmma_accumulator_deref, source_info=eqn.source_info)
      for i, v in enumerate(eqn.outvars):
        if values[i]:
          key = keys[i]
          token, keys[i] = callback.io_callback(
            read, (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)), token=token,
            **here, acc_allocation_key_as_array=key, wait_n=None)
          token = gpu_callbacks.call_deallocate_buffer(
            token=token, **here, allocation_key_as_array=key, source_info=eqn.source_info)
      return token, keys

  semaphores = pallas_primitives.semaphore_signal_p, pallas_primitives.semaphore_wait_p

  def no_semaphores(_):
    raise NotImplementedError('programs run one after the other here and this one waits for another')

  class AnyOf:

    def __init__(self, *primitives):
      self.primitives = primitives

    def __eq__(self, primitive):
      return primitive in self.primitives

  def deallocate(barrier, original=shared_memory.Barrier.deallocate):
    """Without asking whether all was waited for: buffers are released after the last load too, to nobody."""
    with barrier.cv:
      if barrier.ref_count == 1:
        barrier.last_observed_phase_by_thread.clear()
      original(barrier)

  stores = AnyOf(state.swap_p, primitives.wgmma_accumulator_store_p)
  others = AnyOf(primitives.inline_mgpu_p, discharge.run_state_p, pallas_primitives.get_global_p, *semaphores)
  for name, module, taught in (('state_primitives', state, {'swap_p': stores}),
                               ('gpu_primitives', primitives, {'inline_mgpu_p': others})):
    monkeypatch.setattr(jaxpr_interpret, name, SimpleNamespace(**{**vars(module), **taught}))
  monkeypatch.setattr(jaxpr_interpret, 'JaxprInterpreter', Interpreter)
  monkeypatch.setattr(shared_memory.Barrier, 'deallocate', deallocate)
  monkeypatch.setattr(mosaic_gpu, 'multiprocessors', lambda *_: MULTIPROCESSORS)
  refuse_stores_past_the_end(monkeypatch)
  gpu_callbacks.reset_gpu_interpret_mode_state()
  try:
    with mosaic_gpu.interpreter():
      yield lambda: interpret_pallas_call.get_races().races_found
  finally:
    gpu_callbacks.reset_gpu_interpret_mode_state()
