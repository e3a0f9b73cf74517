"""Benchmarks of dpfast's ops: `python -m benchmarks --device cpu|cuda`."""
