"""LSTM: reads Python's language reference, 32 characters a step, and carries its state from one step to the next."""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import pytrain

LENGTH = 513  # characters of a piece


class Reader(pytrain.Module):
    tbptt_steps = 32

    def __init__(self, width=128):
        super().__init__()
        self.save_hyperparameters()
        self.symbols = nn.Embedding(128, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, codes, hiddens=None):
        outputs, hiddens = self.lstm(self.symbols(codes), hiddens)
        return self.head(outputs), hiddens

    def training_step(self, batch, batch_idx, hiddens):
        codes, following = batch
        logits, hiddens = self(codes, hiddens)
        loss = functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        return {"loss": loss, "hiddens": hiddens}

    def validation_step(self, batch, batch_idx):  # gets whole pieces
        return self.training_step(batch, batch_idx, None)["loss"]

    def configure_optimizers(self):
        return pytrain.optim.AdamW(self.parameters(), lr=4e-3)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=600)
    steps = parser.parse_args(argv).max_steps
    pytrain.seed_everything(0)
    text = "\n".join(topics.values()).encode("ascii", "replace")
    pieces = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    pairs = torch.utils.data.TensorDataset(pieces[:, :-1], pieces[:, 1:])
    train, held_out = torch.utils.data.random_split(pairs, [0.95, 0.05])
    module, held_out = Reader(), DataLoader(held_out, 64)
    trainer = pytrain.Trainer(max_steps=steps, gradient_clip_val=1.0, default_root_dir="runs/lstm")
    before = trainer.validate(module, held_out)[0]["val_loss"]
    trainer.fit(module, DataLoader(train, 16, shuffle=True, drop_last=True))
    after = trainer.validate(module, held_out)[0]["val_loss"]
    print(f"nats a character of held-out text: {before:.2f} untrained, {after:.2f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
