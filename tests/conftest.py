"""Every test runs with 64-bit numbers allowed and on four virtual CPU devices."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax  # after the flags, which JAX reads when it starts

jax.config.update("jax_enable_x64", True)
