"""One program a question: python -m benchmarks.NAME."""
