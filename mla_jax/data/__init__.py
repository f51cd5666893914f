"""Text to batches: `sources` (documents), `tokenizer` (text and ids), `pipeline` (packed rows, through Grain)."""
