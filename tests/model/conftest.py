"""The NumPy oracle lies beside the recorded files, where record.py (no jax there) imports it too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / 'golden'))
