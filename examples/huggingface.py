"""Hugging Face: a tiny Llama of transformers, from its configuration, learns paragraphs of different lengths."""

import argparse
from pydoc_data.topics import topics

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import pytrain

PAD = 0


def collate(paragraphs, longest=128):
    """A batch as transformers' tokenizers give it, of bytes; labels of -100 do not count."""
    rows = [torch.tensor(list(paragraph.encode()[:longest])) for paragraph in paragraphs]
    codes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = codes != PAD
    return {"input_ids": codes, "attention_mask": mask.long(), "labels": codes.masked_fill(~mask, -100)}


class Llama(pytrain.Module):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=PAD,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch, batch_idx):
        tokens = (batch["labels"][:, 1:] != -100).sum()
        loss = self.model(**batch).loss
        return {"loss": loss, "weight": tokens}  # a step's gradient is the mean over its tokens, not over its batches

    def validation_step(self, batch, batch_idx):
        output = self.training_step(batch, batch_idx)
        self.log("val_loss", output["loss"], batch_size=int(output["weight"]))

    def configure_optimizers(self):
        return pytrain.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=120)
    steps = parser.parse_args(argv).max_steps
    pytrain.seed_everything(0)
    paragraphs = [part for text in topics.values() for part in text.split("\n\n") if len(part) > 20]
    train = DataLoader([part for i, part in enumerate(paragraphs) if i % 20], 16, shuffle=True, collate_fn=collate)
    held_out = DataLoader(paragraphs[::20], 64, collate_fn=collate)
    module = Llama()
    trainer = pytrain.Trainer(
        max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=1.0, default_root_dir="runs/huggingface"
    )
    before = trainer.validate(module, held_out)[0]["val_loss"]
    trainer.fit(module, train)
    after = trainer.validate(module, held_out)[0]["val_loss"]
    print(f"nats a byte of held-out paragraphs: {before:.2f} untrained, {after:.2f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
