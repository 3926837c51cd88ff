"""Benchmarks: `python -m benchmarks.fusions`, `python -m benchmarks.pipelines`."""
