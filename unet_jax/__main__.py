"""``python -m unet_jax`` is ``unet-jax``."""

import sys

from unet_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
