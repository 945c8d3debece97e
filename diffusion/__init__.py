"""The flow-matching image backend, on diffusers."""
