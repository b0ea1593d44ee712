"""Trains a vision transformer on scikit-learn's handwritten digits, in FP8 and in float32.

    python examples/vision_digits.py [--epochs N]

scikit-learn ships the 1,797 images of 8 x 8 pixels: nothing is downloaded. Prints the accuracy on the fifth that is not trained on.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

BATCH = 32


def main() -> None:
    arguments = parse_arguments()
    images, labels = digits()
    for name in ("float32", "te_fp8"):
        model = small_vit()
        if name == "te_fp8":
            model.compile(backend="te_fp8")
        train(model, images[360:], labels[360:], arguments.epochs)
        print(f"{name}: accuracy {accuracy(model, images[:360], labels[:360]):.3f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    return parser.parse_args()


def digits() -> tuple[Tensor, Tensor]:
    """Images f32 [1797, 1, 8, 8] in [-1, 1], and their digits int64 [1797], in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1)
    return images / 8 - 1, torch.tensor(data.target)[order]


def small_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def train(model: ViTForImageClassification, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            if len(rows) == BATCH:  # one batch size, so one graph
                model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(pixel_values=images).logits.argmax(-1) == labels).float().mean())


if __name__ == "__main__":
    main()
