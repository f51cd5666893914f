"""Which implementation of an op runs where.

Every op owns one `Registry`, filled best first. `None` takes the best implementation that serves the platform and
logs it once; a name takes that one or raises. Nothing is imported here for its side effects and no import error is
swallowed: an implementation that needs more than this jax offers says so through `unavailable`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

_log = logging.getLogger(__name__)

KNOWN = ('reference', 'xla', 'gpu', 'tpu')


@dataclass(frozen=True)
class Implementation:
  """One way to compute an op.

  platforms: those it serves ('cpu', 'gpu', 'tpu'); None = all.
  unavailable: called at each choice, returns None, or in one clause why it cannot run now (jax too old, wrong chip).
  interpreted: whether its kernels are being interpreted now, on the CPU; it then serves 'cpu' too.
  unsuitable: called with what the op gives `choose`, returns None, or in one clause what about them it does not serve.
  """

  name: str
  kernels: Any
  platforms: tuple[str, ...] | None = None
  unavailable: Callable[[], str | None] | None = None
  interpreted: Callable[[], bool] | None = None
  unsuitable: Callable[..., str | None] | None = None

  def reason_unavailable(self, target: str) -> str | None:
    interpreted = target == 'cpu' and self.interpreted is not None and self.interpreted()
    if self.platforms is not None and target not in self.platforms and not interpreted:
      return f'it serves {", ".join(self.platforms)} and this program is for {target}'
    return self.unavailable() if self.unavailable else None

  def reason_against(self, target: str, *operands, **facts) -> str | None:
    """Why it cannot compute the op on these operands there, or None."""
    reason = self.reason_unavailable(target)
    if reason is None and self.unsuitable:
      reason = self.unsuitable(*operands, **facts)
    return reason


def platform(*operands) -> str:
  """'cpu', 'gpu' or 'tpu': what the program being traced is for.

  The ambient mesh decides, then a mesh an operand is laid out on: while compiling for a TPU that is not there,
  `jax.default_backend()` answers cpu. Without a mesh it is `jax.default_device` or the default backend.
  """
  name = device(*operands).platform
  return 'gpu' if name in ('cuda', 'rocm') else name


def device(*operands):
  """The device, as `platform` finds it: present, or a `jax.sharding.AbstractDevice` where a mesh says so."""
  meshes = [jax.sharding.get_abstract_mesh()]
  meshes += [jax.typeof(x).sharding.mesh for x in operands if x is not None]
  for mesh in meshes:
    if mesh.abstract_device is not None:
      return mesh.abstract_device
  default = jax.config.jax_default_device
  return jax.local_devices(backend=default)[0] if default is None or isinstance(default, str) else default


def divided(*operands) -> str | None:
  """Why a kernel cannot run: the compiler would have to divide the operands over a mesh. None where it need not."""
  meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in operands if x is not None)]
  for mesh in meshes:
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    axes = [f'{name}={size}' for name, size, kind in kinds
            if size > 1 and kind != jax.sharding.AxisType.Manual]
    if axes:
      return f'the compiler cannot divide it over the mesh ({", ".join(axes)}): call the op inside jax.shard_map'
  return None


class Registry:
  """The implementations of one op, best first."""

  def __init__(self, op: str, *implementations: Implementation):
    self.op = op
    self.all = implementations
    self._said = set()

  def implementations(self, target: str | None = None) -> tuple[str, ...]:
    """Names usable for `target` (default: the current platform), best first."""
    target = target or platform()
    return tuple(i.name for i in self.all if i.reason_unavailable(target) is None)

  def unavailable(self, target: str | None = None) -> dict[str, str]:
    """Name -> why it cannot be used for `target` (default: the current platform)."""
    target = target or platform()
    reasons = {i.name: i.reason_unavailable(target) for i in self.all}
    return {name: reason for name, reason in reasons.items() if reason is not None}

  def best(self, *operands, **facts) -> Implementation:
    """The implementation that None means for these operands."""
    target = platform(*operands)
    return next(i for i in self.all if i.reason_against(target, *operands, **facts) is None)

  def choose(self, name: str | None, *operands, **facts):
    """The kernels of the implementation `name`, or of the best one for the platform and operands when it is None.

    operands: arrays; facts: what else decides whether an implementation serves the call.

    Raises ValueError for a name nobody knows, NotImplementedError for one that this op lacks or that cannot run here.
    """
    target = platform(*operands)
    reasons = {i.name: i.reason_against(target, *operands, **facts) for i in self.all}
    usable = [name for name, reason in reasons.items() if reason is None]
    if name is None:
      chosen = self.best(*operands, **facts)
      better = [f'{i.name}: {reasons[i.name]}' for i in self.all[:self.all.index(chosen)]]
      said = (chosen.name, target, *better)
      if said not in self._said:
        self._said.add(said)
        _log.info('%s: %s on %s%s', self.op, chosen.name, target, f' ({"; ".join(better)})' if better else '')
      return chosen.kernels
    if name not in KNOWN:
      raise ValueError(f'{self.op}: implementation={name!r} is unknown; here it can be None, {_listed(usable)}')
    chosen = next((i for i in self.all if i.name == name), None)
    if chosen is None:
      raise NotImplementedError(
        f'{self.op}: implementation={name!r} is not written for this op; here it can be None, {_listed(usable)}')
    if reasons[name] is not None:
      raise NotImplementedError(
        f'{self.op}: implementation={name!r} cannot run: {reasons[name]}; here it can be None, {_listed(usable)}')
    return chosen.kernels

  def public(self, function):
    """Decorates the public op: it answers `op.implementations()` and `op.unavailable()`."""
    function.implementations = self.implementations
    function.unavailable = self.unavailable
    return function


def _listed(names) -> str:
  return ', '.join(repr(n) for n in names)


def refuse_empty(op, **arrays):
  """Raises ValueError for an array without elements; None passes."""
  for name, x in arrays.items():
    if x is not None and 0 in x.shape:
      raise ValueError(f'{op}: {name} {list(x.shape)} has an empty axis, so there is nothing to compute; skip the call')


def known_number(op, name, value) -> float:
  """Raises ValueError for a number that tracing does not know: kernels are compiled for it."""
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f'{op}: {name} is traced and must be known when tracing; make it a static argument')
  return float(value)


def refuse_gradients(reason, arrays):
  """The arrays; whoever differentiates what is made of them gets NotImplementedError(reason)."""
  @jax.custom_jvp
  def same(arrays):
    return arrays

  @same.defjvp
  def _(primals, tangents):
    raise NotImplementedError(reason)

  return same(arrays)


def operands(*arrays):
  """What every implementation of an op is given: jax's arrays (NumPy's cannot be indexed by what is traced), integers
  as int32 (narrower ones overflow in sums, unsigned ones in differences), varying alike (`align_varying`)."""
  def one(x):
    x = None if x is None else jnp.asarray(x)
    return x.astype(jnp.int32) if x is not None and jnp.issubdtype(x.dtype, jnp.integer) else x

  return align_varying(*map(one, arrays))


def align_varying(*operands):
  """Makes operands vary over the same manual mesh axes (`jax.shard_map` with check_vma); None passes through.

  Placed before a custom_vjp it does two things: every loop carry inside has one varying type, and a weight that is
  replicated over an axis gets its cotangent summed over that axis, since that is the transpose of `pcast`.
  """
  axes = varying_axes(*operands)
  return tuple(x if x is None else vary(x, axes) for x in operands)


def varying_axes(*operands) -> frozenset[str]:
  """Manual mesh axes over which any of the operands varies."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands if x is not None))


def vary(tree, axes):
  """The arrays of tree, varying over `axes` too: what a fresh loop carry needs to match the body under check_vma."""
  def leaf(x):
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(leaf, tree)
