"""What accelerator.py times, in PyTorch on a GPU: eager, and by torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from peers import of_torch


def _gpt2(tiny: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network, and a batch of texts."""
    sizes = (2, 16, 2, 16, 50) if tiny else (12, 768, 12, 1024, 50257)
    net = of_torch.GPT2(*sizes).cuda()
    tokens = torch.randint(0, 10, (2 if tiny else 8, sizes[3]), device="cuda")
    return net, tokens


def gpt2(tiny: bool, compiled: bool) -> Callable:
    net, tokens = _gpt2(tiny)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-4, weight_decay=1e-4, fused=True)

    def loss(net):
        logits = net(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

    return _step(net, loss, optimizer, compiled)


def resnet50(tiny: bool, compiled: bool) -> Callable:
    import torchvision

    net = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    side, images = (32, 2) if tiny else (224, 64)
    x = torch.randn(images, 3, side, side, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (images,), device="cuda")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, fused=True)
    return _step(net, lambda net: F.cross_entropy(net(x).float(), labels), optimizer, compiled)


def norms(tiny: bool, compiled: bool) -> Callable:
    """torch.func's vmap of grad."""
    net, tokens = _gpt2(tiny)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params, tokens):
        logits = torch.func.functional_call(net, params, (tokens[None],))
        return F.cross_entropy(logits[0], tokens)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))

    def of_batch():
        gradients = each(params, tokens)
        return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()

    return torch.compile(of_batch) if compiled else of_batch


def attention(tiny: bool, compiled: bool) -> Callable:
    length, heads, features = (64, 2, 8) if tiny else (8192, 16, 64)
    shape = 1, heads, length, features
    make = lambda: torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = make(), make(), make()

    def gradients():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(y.float().sum(), (q, k, v))

    return torch.compile(gradients) if compiled else gradients


def _step(net, loss: Callable, optimizer, compiled: bool) -> Callable:
    called = torch.compile(net) if compiled else net

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(called)
        value.backward()
        optimizer.step()

    return step


def seconds(name: str, tiny: bool, compiled: bool, calls: int) -> tuple[float, float]:
    """The least time of a call, and the most bytes that were in use beside those before it."""
    torch.set_float32_matmul_precision("high")
    function = globals()[name](tiny, compiled)
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    least = float("inf")
    for _ in range(calls):
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() - before
    del function
    torch.cuda.empty_cache()
    return least, memory
