"""The Gaussians of ``toy.gauss``, which may start where another run ended."""
