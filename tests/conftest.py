"""Strict numerics for every test: what is silent in use is an error here."""

import atexit
import os
import shutil
import tempfile

# Two virtual devices, so that what depends on sharding is met on any machine. Set
# before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Border maps are kept in the user's cache: not those of tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="unet-jax-tests-")

import jax
import numpy as np
import pytest

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# Compiled anew in this process, whatever a command that it calls would keep.
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of fixed seed."""
    return np.random.default_rng(0)
