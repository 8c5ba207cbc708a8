"""Image classifier: a small convolutional network learns scikit-learn's scanned digits. Tested on held-out ones."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

import pytrain
from pytrain.callbacks import LearningRateMonitor


class Digits(pytrain.DataModule):
    def setup(self, stage):
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        rows = TensorDataset(images, torch.tensor(digits.target))
        self.train_rows, self.val_rows = random_split(rows, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train_rows, batch_size=64, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.val_rows, batch_size=256)


class Classifier(pytrain.Module):
    def __init__(self, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.log("val_loss", functional.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = pytrain.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=200)
    steps = parser.parse_args(argv).max_steps
    torch.manual_seed(0)
    module, data = Classifier(), Digits()
    trainer = pytrain.Trainer(max_steps=steps, default_root_dir="runs/classifier", callbacks=[LearningRateMonitor()])
    before = trainer.validate(module, datamodule=data)[0]["val_accuracy"]
    trainer.fit(module, datamodule=data)
    after = trainer.validate(module, datamodule=data)[0]["val_accuracy"]
    print(f"accuracy on held-out digits: {before:.1%} untrained, {after:.1%} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
