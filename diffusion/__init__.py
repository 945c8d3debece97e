"""The flow-matching image backend, on diffusers."""

import logging

# diffusers imports xformers wherever it is installed, and xformers comments on its own build.
# Whether its kernels work is tried (``diffusion.attention``), not read.
logging.getLogger("xformers").setLevel(logging.ERROR)
