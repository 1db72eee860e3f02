"""benchmarks/accelerator.py: each program is exported for GPUs and TPUs in its full size."""

from pathlib import Path

import jax
import pytest
from sweeps import exhaustive

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Of a model's size as published: parameters and AdamW's two moments.
GPT2_STATE = 3 * 124_439_808


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with jax.enable_x64(False):
        import accelerator

        yield accelerator


@exhaustive
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["gpt2", "resnet50", "norms", "attention"])
def test_each_program_is_exported(accelerator, name, platform):
    program = accelerator.OURS[name]()
    exported = jax.export.export(program.function, platforms=[platform])(*program.types)
    assert exported.platforms == (platform,)
    assert "bf16" in exported.mlir_module() or name == "norms"
    if name == "gpt2":
        assert GPT2_STATE < accelerator.size(program.types[0]) < 1.01 * GPT2_STATE


@exhaustive
def test_the_peers_do_the_same_work(accelerator):
    """In small sizes, on equal parameters: equal norms; an equal gradient of attention."""
    for name, of in {
        "norms": "vmap(jax.grad)",
        "attention": "jax.nn.dot_product_attention",
    }.items():
        ours, peer = accelerator.OURS[name](True), accelerator.PEERS[name][of](True)
        given = accelerator.filled(ours.types)
        for a, b in zip(
            jax.tree.leaves(ours.function(*given)),
            jax.tree.leaves(peer.function(*given)),
            strict=True,
        ):
            assert jax.numpy.allclose(a, b, rtol=2e-2, atol=2e-3)
