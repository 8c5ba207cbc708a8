"""Character GPT: a small causal transformer learns the text of Python's language reference, and writes some."""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional

import pytrain

TEXT = "\n".join(topics.values()).encode("ascii", "replace").decode()
SYMBOLS = sorted(set(TEXT))
CONTEXT = 64


def batches(text, size=32):
    """Shuffled windows of the text, with the symbol that follows each."""
    codes = torch.tensor([SYMBOLS.index(symbol) for symbol in text])
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return torch.utils.data.DataLoader(windows, size, shuffle=True, drop_last=True)


class GPT(pytrain.Module):
    def __init__(self, width=64, layers=2, heads=4):
        super().__init__()
        self.save_hyperparameters()
        self.symbols = nn.Embedding(len(SYMBOLS), width)
        self.places = nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(SYMBOLS))

    def forward(self, codes):
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        x = self.symbols(codes) + self.places.weight[:length]
        return self.head(self.blocks(x, mask, is_causal=True))

    def training_step(self, batch, batch_idx):
        logits = self(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)  # what is returned is logged as val_loss

    def configure_optimizers(self):
        return pytrain.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)

    @torch.no_grad()
    def write(self, start, length=120):
        codes = torch.tensor([[SYMBOLS.index(symbol) for symbol in start]])
        for _ in range(length):
            chances = self(codes[:, -CONTEXT:])[:, -1].div(0.7).softmax(-1)
            codes = torch.cat((codes, torch.multinomial(chances, 1)), dim=1)
        return "".join(SYMBOLS[code] for code in codes[0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=400)
    steps = parser.parse_args(argv).max_steps
    pytrain.seed_everything(0)
    module, train, held_out = GPT(), batches(TEXT[:-20_000]), batches(TEXT[-20_000:])
    trainer = pytrain.Trainer(max_steps=steps, gradient_clip_val=1.0, default_root_dir="runs/character_gpt")
    before = trainer.validate(module, held_out)[0]["val_loss"]
    trainer.fit(module, train)
    after = trainer.validate(module, held_out)[0]["val_loss"]
    print(module.eval().write("The statement "))
    print(f"nats a character of held-out text: {before:.2f} untrained, {after:.2f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
