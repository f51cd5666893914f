"""Axis letters, the device mesh, and the one table that maps the first to the second.

Every array's name ends in its letters, and every weight declares them:

  B batch          T query position   S key position   D model width      N heads        G key-value heads
  Q query latent   C key-value latent K no-position    R rope width       H = K + R      V value width
  J = C + R        F hidden width     E experts        X experts a token  L layers       W vocabulary
  P cache pages    M rows (tokens x chosen experts)    U = T + 1          Z = 2 D        2 gate and up
  r c rows and columns of the grid of blocks of an FP8 matrix (model/fp8.py)
"""

import math

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mla_jax.config import ConfigError, MeshConfig

MESH_AXES = ('data', 'fsdp', 'expert')
TABLE = {
    'B': ('data', 'fsdp', 'expert'),  # outside the experts, the expert axis is one more data axis
    'E': ('expert',),
    'D': ('fsdp',),
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """A mesh over all devices. Raises ConfigError where the sizes don't multiply to their number."""
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  asked = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes, strict=True))
  if -1 in sizes:
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known:
      raise ConfigError(f'mesh ({asked}) needs a multiple of {known} devices, but there are {len(devices)}; '
                        'change --config.mesh.*')
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise ConfigError(f'mesh ({asked}) has {math.prod(sizes)} places, but there are {len(devices)} devices; '
                      'change --config.mesh.* or set one axis to -1')
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def spec(letters: str, shape: tuple[int, ...], mesh, without: str = '') -> PartitionSpec:
  """'WD' -> PartitionSpec(None, 'fsdp'). The leftmost letter wins a mesh axis; leading axes without a letter
  (stacked layers) stay whole; mesh axes whose sizes don't divide a dimension are left out for it, last first."""
  taken, out = {without}, [None] * (len(shape) - len(letters))
  for letter, size in zip(letters, shape[len(out):], strict=True):
    names = [name for name in TABLE.get(letter, ()) if mesh.shape.get(name, 1) > 1 and name not in taken]
    while names and size % math.prod(mesh.shape[name] for name in names):
      names.pop()
    taken.update(names)
    out.append(names[0] if len(names) == 1 else tuple(names) or None)
  return PartitionSpec(*out)


def undivided(letters: str, shape: tuple[int, ...], mesh) -> list[str]:
  """The dimensions that `spec` could not divide as the table asks, said for a person."""
  out = []
  for letter, size in zip(letters, shape[len(shape) - len(letters):], strict=True):
    ways = math.prod(mesh.shape.get(name, 1) for name in TABLE.get(letter, ()))
    if size % ways:
      out.append(f'{letter}={size} is not divisible by {ways}')
  return out


def current_mesh():
  """The mesh of `jax.set_mesh`, or None outside one and where one device holds everything."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def shard(x, letters: str):
  """Lays an activation out by its letters; does nothing without a mesh."""
  mesh = current_mesh()
  return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(letters, x.shape, mesh))


def per_device(function, operands, letters, out):
  """function(*operands), where each device computes its part: kernels are not divided by the compiler.

  letters: of each operand. out: letters and shape of the result. Without a mesh this is the plain call.
  """
  mesh = current_mesh()
  if mesh is None:
    return function(*operands)
  specs = tuple(PartitionSpec() if x is None else spec(named, x.shape, mesh)
                for named, x in zip(letters, operands, strict=True))
  return jax.shard_map(function, in_specs=specs, out_specs=spec(*out, mesh), check_vma=True)(*operands)


def gather(w, letters: str):
  """A weight as the computation wants it: whole along fsdp, split along expert. Saying so, one layer at a time, is
  what makes the compiler move weights and leave activations where they are; the gradient goes back the same way."""
  mesh = current_mesh()
  if mesh is None or mesh.shape['fsdp'] == 1:
    return w
  return jax.lax.with_sharding_constraint(w, spec(letters, w.shape, mesh, without='fsdp'))


def is_variable(x) -> bool:
  return isinstance(x, nnx.Variable)


def letters_of(variables):
  """The tree of letters that a tree of abstract nnx Variables declares."""
  return jax.tree.map(lambda v: v.axes, variables, is_leaf=is_variable)


def shardings(variables, mesh):
  """The tree of NamedShardings for a tree of abstract nnx Variables."""
  return jax.tree.map(lambda v: NamedSharding(mesh, spec(v.axes, v.shape, mesh)), variables, is_leaf=is_variable)
