"""Every test runs with 64-bit numbers allowed and on eight virtual CPU devices.

Most of the suite's time goes to compiling small programs: LLVM is asked not to optimise them, and
in the quick tests XLA (in JAX 0.10, which can choose) to write fused loops by its older emitter.
XLA's own passes, which decide on FLOPs and memory, run as ever.
"""

import gc
import os
import signal

import jax
import pytest


def pytest_configure(config):
    """The flags, which JAX reads when it first computes."""
    flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    # The older emitter gets a gradient of a Flax network wrong, which an exhaustive test found.
    is_quick = config.option.markexpr == "not exhaustive"
    if is_quick and jax.__version_info__ < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    # A shell lets what a script runs in the background ignore Ctrl-C, which tests press.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_is_not_looked_through_again():
    """Tests of what is kept collect garbage, and checks for leaks look through all objects."""
    gc.collect()
    gc.freeze()
