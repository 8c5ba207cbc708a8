"""GAN: one network draws digits, another tells them from scikit-learn's; two optimizers, stepped by hand, in fp16."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import pytrain


def judged(logits, real):
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))


class GAN(pytrain.Module):
    automatic_optimization = False

    def __init__(self, noise=16, width=128):
        super().__init__()
        self.save_hyperparameters()
        self.generator = nn.Sequential(
            *(nn.Linear(noise, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, 64), nn.Sigmoid()),
        )
        self.critic = nn.Sequential(nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(width, 1))

    def forward(self, noise):
        return self.generator(noise)

    def training_step(self, images, batch_idx):
        generator, critic = self.optimizers()
        drawn = self(torch.randn(len(images), self.hparams.noise, device=self.device))

        critic.zero_grad()
        critic_loss = judged(self.critic(images), 0.9) + judged(self.critic(drawn.detach()), 0.0)
        self.manual_backward(critic_loss)
        critic.step()

        self.toggle_optimizer(generator)
        generator.zero_grad()
        generator_loss = judged(self.critic(drawn), 1.0)
        self.manual_backward(generator_loss)
        generator.step()
        self.untoggle_optimizer(generator)
        self.log_dict({"critic_loss": critic_loss, "generator_loss": generator_loss}, prog_bar=True)

    def configure_optimizers(self):
        adam = {"lr": 1e-3, "betas": (0.5, 0.999)}
        return [pytrain.optim.Adam(net.parameters(), **adam) for net in (self.generator, self.critic)]


def distance(a, b):
    """The Frechet distance of two sets of images, each taken for a normal distribution of its pixels."""
    spreads = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * spreads)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-epochs", type=int, default=40)
    parser.add_argument("--precision", default="fp16-mixed")
    options = parser.parse_args(argv)
    pytrain.seed_everything(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    module, noise = GAN(), torch.randn(1797, 16)
    trainer = pytrain.Trainer(**vars(options), default_root_dir="runs/gan")
    before = distance(images, module.eval()(noise).detach())
    trainer.fit(module, DataLoader(images, 64, shuffle=True, drop_last=True))
    after = distance(images, module.eval()(noise).detach())
    print(f"distance of drawn digits from real ones: {before:.1f} untrained, {after:.1f} trained")
    return before, after


if __name__ == "__main__":
    main()
