"""Tokens from a model: `sampling` (logits to a token), `speculative` (the jitted draft-verify round), `engine` (the
host's side: shapes, compilation, time)."""
