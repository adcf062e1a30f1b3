"""Scores of a classifier."""

import torch


@torch.no_grad()
def test_accuracy(model, data, transform, runtime):
    """Top-1 accuracy in percent of `model`, in eval mode, on the test split of `data`.

    Args:
        data: with test.batches(n, device=...), giving uint8 images (N, C, H, W) and labels (N,).
        transform: images -> network input.
    """
    training = model.training
    model.eval()
    correct, total = 0, 0
    for x, y in data.test.batches(1000, device=runtime.device):
        with runtime.autocast():
            logits = model(transform(x))
        correct = correct + (logits.argmax(1) == y).sum()
        total += len(y)
    model.train(training)
    return 100 * int(correct) / total
