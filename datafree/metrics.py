"""Scores of a classifier on a test split."""

import torch


@torch.no_grad()
def evaluate(model, batches, transform, autocast):
    """Top-1 accuracy in percent of `model` in eval mode; its mode is restored afterwards.

    Args:
        batches: iterable of (uint8 images (N, C, H, W), int64 labels (N,)) on the model's device.
        transform: images -> network input.
        autocast: a function that gives the precision's context manager.
    """
    training = model.training
    model.eval()
    correct, total = 0, 0
    for x, y in batches:
        with autocast():
            logits = model(transform(x))
        correct = correct + (logits.argmax(1) == y).sum()
        total += len(y)
    model.train(training)
    return 100 * int(correct) / total
