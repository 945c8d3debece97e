"""A backend of Gaussians for tests of the loop (`backend.name: toy.gauss`): no real model."""
