"""Autoencoder: scikit-learn's digits as 8 numbers each (a variational one), from which new digits are drawn."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import pytrain


class Autoencoder(pytrain.Module):
    def __init__(self, size=8):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 2 * size))
        self.decoder = nn.Sequential(nn.Linear(size, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, images):
        return self.encoder(images).chunk(2, dim=-1)[0]  # the codes: means, without their spreads

    def training_step(self, images, batch_idx):
        mean, log_variance = self.encoder(images).chunk(2, dim=-1)
        codes = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = functional.binary_cross_entropy_with_logits(self.decoder(codes), images, reduction="none").sum(-1)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1) / 2
        self.log_dict({"error": error.mean(), "divergence": divergence.mean()})
        return (error + divergence).mean()

    def validation_step(self, images, batch_idx):
        self.log("val_error", functional.mse_loss(self.decode(self(images)), images))

    def configure_optimizers(self):
        return pytrain.optim.AdamW(self.parameters(), lr=3e-3)

    def decode(self, codes):
        return self.decoder(codes).sigmoid()

    @torch.no_grad()
    def sample(self, count):
        return self.decode(torch.randn(count, self.hparams.size)).view(count, 8, 8)


def picture(images):
    """Images side by side, as text."""
    shades = " .:-=+*#%@"
    rows = torch.cat([functional.pad(image, (0, 1)) for image in images], dim=1)
    return "\n".join("".join(shades[int(pixel * 9.99)] * 2 for pixel in row) for row in rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=1500)
    steps = parser.parse_args(argv).max_steps
    pytrain.seed_everything(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    train, held_out = DataLoader(images[:1500], 64, shuffle=True), DataLoader(images[1500:], 297)
    module = Autoencoder()
    trainer = pytrain.Trainer(max_steps=steps, check_val_every_n_epoch=10, default_root_dir="runs/autoencoder")
    before = trainer.validate(module, held_out)[0]["val_error"]
    trainer.fit(module, train, held_out)
    after = trainer.validate(module, held_out)[0]["val_error"]
    codes = torch.cat(trainer.predict(module, held_out))
    print(picture(module.decode(codes[:6]).detach().view(-1, 8, 8)), picture(module.sample(6)), sep="\n\n")
    print(f"{len(codes)} held-out digits, six of them as decoded, above six new ones")
    print(f"their squared error a pixel: {before:.3f} untrained, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
