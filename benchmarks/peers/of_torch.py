"""The models in PyTorch, eager or by torch.compile."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from peers import GPT, LEARNING_RATE, Training


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


class BasicBlock(nn.Module):
    def __init__(self, features: int, out: int, stride: int):
        super().__init__()
        conv = functools.partial(nn.Conv2d, bias=False)
        self.conv1 = conv(features, out, 3, stride, 1)
        self.conv2 = conv(out, out, 3, 1, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride != 1 or features != out:
            project = conv(features, out, 1, stride)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    features = 64
    for i, out in enumerate((64, 128, 256, 512)):
        for stride in (1 if i == 0 else 2, 1):
            layers.append(BasicBlock(features, out, stride))
            features = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(h.transpose(1, 2).reshape(batch, length, width))
        # GPT-2's gelu is by tanh, the ViT's exact.
        h = F.gelu(self.up(self.norm2(x)), approximate="tanh" if self.causal else "none")
        return x + self.down(h)


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 192))
        self.positions = nn.Parameter(0.02 * torch.randn(65, 192))
        self.blocks = nn.Sequential(*(Block(192, 3, False) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, 192), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


class GPT2(nn.Module):
    def __init__(self, blocks: int, width: int, heads: int, length: int, vocabulary: int = 256):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.embed(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.norm(self.blocks(x)) @ self.embed.weight.T


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(256, 256), nn.LSTM(256, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 256)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0])


def training(model: str, *, compiled: bool = False, **sizes: int) -> Training:
    torch.manual_seed(0)
    make = {"lenet": lenet, "resnet": resnet, "vit": ViT, "lstm": LSTM}
    made = GPT2(**(GPT | sizes)) if model == "gpt" else make[model]()
    network = torch.compile(made) if compiled else made
    optimizer = torch.optim.Adam(made.parameters(), LEARNING_RATE)

    def step(state, x, y):
        optimizer.zero_grad(set_to_none=True)
        logits = network(x)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
        loss.backward()
        optimizer.step()
        return state

    def inputs(x, y):
        if x.ndim == 4:
            x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
        return torch.from_numpy(x), torch.from_numpy(y).long()

    parameters = sum(p.numel() for p in made.parameters())
    return Training(step, None, parameters, inputs)
