"""Measurements, one question a script: run them as ``python -m benchmarks.NAME``."""
