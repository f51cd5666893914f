"""Tokens from a model: `sampling` (logits to a token), `speculative` (the jitted draft-verify round), `engine` (the host
side: shapes, compilation, time)."""
