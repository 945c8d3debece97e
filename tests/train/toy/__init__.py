"""Toy parts for tests of the loop."""
