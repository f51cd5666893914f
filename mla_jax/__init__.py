"""mla_jax: DeepSeek-V3 in JAX. The public face; every name is imported when it is first asked for, so that importing
one module of the package does not load them all."""

import importlib

_HOMES = {
    'LanguageModel': 'mla_jax.language_model',
    'Transformer': 'mla_jax.model.transformer',
    **dict.fromkeys(('Config', 'ConfigError', 'DataConfig', 'MeshConfig', 'ModelConfig', 'OptimizerConfig',
                     'RopeScaling', 'TrainingConfig'), 'mla_jax.config'),
}
__all__ = list(_HOMES)


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
  return value


def __dir__():
  return sorted({*globals(), *_HOMES})
