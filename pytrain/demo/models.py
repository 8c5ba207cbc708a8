"""The demo's models: a small convolutional network and a small GPT. Neither draws random numbers in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytrain.demo.data import SYMBOLS, decode, encode

MEAN, SPREAD = 0.3, 0.36  # of the pixels of both image sets, about, where white is 1


class ConvNet(nn.Sequential):
    """Two convolutions and two linear layers for small grey images.

    All of it is smooth: at the kinks of ReLU and max pooling one rounding could send two runs different ways.

    Args:
        side: height and width of the images in pixels, a multiple of 4.
        white: the largest pixel value.
        hidden: width of the hidden linear layer.

    Shape: (n, side, side), any real dtype, to (n, 10).
    """

    def __init__(self, *, side: int, white: int, hidden: int) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (side // 4) ** 2, hidden),
            nn.GELU(),
            nn.Linear(hidden, 10),
        )
        self.white = white

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten classes."""
        scaled = (images.unsqueeze(1).float() / self.white - MEAN) / SPREAD
        logits: Tensor = super().forward(scaled)  # type: ignore[no-untyped-call]
        return logits


class Block(nn.Module):
    """One pre-norm transformer block: causal attention with rotary positions, then a two-layer network.

    Shape: (n, time, width) to the same; rotation (2, time, width / heads / 2).
    Source: Vaswani et al. 2017 (arXiv:1706.03762); Su et al. 2021 (arXiv:2104.09864).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Return x with what attention and the network add to it."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        added: Tensor = self.mlp(self.norm_mlp(x))
        return x + added


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + half]) by its position's angle.

    Shape: x (..., time, 2 * half); rotation (2, time, half): cosines and sines.
    """
    (cos, sin), (first, second) = rotation, x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class CharGPT(nn.Module):
    """A GPT over the characters in SYMBOLS; 0.94 million parameters as the demo builds it.

    Args:
        width: of the residual stream, a multiple of 2 * heads.
        heads: attention heads.
        layers: blocks.
        context: the longest input, in characters.

    Shape: (n, time), int64, time <= context, to (n, time, symbols).
    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
    """

    rotation: Tensor

    def __init__(self, *, width: int = 192, heads: int = 6, layers: int = 2, context: int = 64) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(len(SYMBOLS), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(SYMBOLS), bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.04)
        half = width // heads // 2
        angles = torch.arange(context).unsqueeze(1) * 1000.0 ** (-torch.arange(half) / half)
        self.register_buffer("rotation", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return the logits of the symbol that follows each one."""
        x = self.embedding(symbols)
        for block in self.blocks:
            x = block(x, self.rotation[:, : symbols.shape[1]])
        logits: Tensor = self.head(self.norm(x))
        return logits


@torch.no_grad()
def write(model: CharGPT, prompt: str, *, length: int, seed: int, temperature: float = 0.7) -> str:
    """Return the prompt and what the model writes after it.

    Args:
        model: a trained CharGPT.
        prompt: at least one character.
        length: characters to add, >= 1.
        seed: of the drawing; the global random state is left alone.
        temperature: below 1 the likely characters are drawn more often, > 0.
    """
    generator = torch.Generator().manual_seed(seed)
    symbols = encode(prompt)
    for _ in range(length):
        logits = model(symbols[-model.context :].unsqueeze(0))[0, -1]
        drawn = torch.multinomial(functional.softmax(logits / temperature, dim=0), 1, generator=generator)
        symbols = torch.cat((symbols, drawn))
    return decode(symbols)
