"""Scores of classifiers and of segmentation networks."""

import math

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


@torch.no_grad()
def segmentation_scores(model, data, transform, runtime):
    """Percentages by name of `model`, in eval mode, on the whole images of the test split.

    Returns:
        {"mIoU", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "iou_<class>" ...};
        a class that occurs nowhere has None.
    """
    training = model.training
    model.eval()
    confusion = Confusion(data.num_classes, runtime.device)
    for x, y in data.test.whole(runtime.device):
        with runtime.autocast():
            logits = model(transform(x))
        confusion.add(logits.argmax(1), y)
    model.train(training)
    scores = confusion.scores()
    classes = dict(zip(data.class_names, scores.pop("class_iou"), strict=True))
    scores = {"mIoU": scores.pop("mean_iou")} | scores
    scores |= {f"iou_{name}": value for name, value in classes.items()}
    return {name: None if math.isnan(value) else 100 * value for name, value in scores.items()}


def mean_iou(model, data, transform, runtime):
    """The mIoU of `segmentation_scores`, in percent."""
    return segmentation_scores(model, data, transform, runtime)["mIoU"]


class Confusion:
    """Confusion matrix of a segmentation and the scores that follow from it.

    Args:
        num_classes: labels outside 0..num_classes - 1, as 255 for void, are left out.
    """

    def __init__(self, num_classes, device="cpu"):
        self.n = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predictions, labels):
        """Count pixels: class numbers of any, but the same, shape. Rows are true classes."""
        counted = (labels >= 0) & (labels < self.n)
        # What is not counted goes to a cell of its own: a mask's size would make the host wait.
        cells = torch.where(counted, self.n * labels.long() + predictions, self.n**2).flatten()
        counts = torch.zeros(self.n**2 + 1, dtype=torch.int64, device=cells.device)
        counts.index_add_(0, cells, torch.ones_like(cells))
        self.matrix += counts[:-1].view(self.n, self.n)

    def scores(self):
        """Fractions by name; class_iou is a list, NaN for a class that occurs nowhere.

        mean_iou leaves out such classes (one that is predicted but never true counts as 0), and
        mean_accuracy those without a true pixel.
        """
        matrix = self.matrix.double().cpu()
        hits, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        iou = hits / (true + predicted - hits)
        share = true / true.sum()
        return {
            "pixel_accuracy": (hits.sum() / true.sum()).item(),
            "mean_accuracy": (hits / true).nanmean().item(),
            "mean_iou": iou.nanmean().item(),
            "frequency_weighted_iou": (share * iou)[true > 0].sum().item(),
            "class_iou": iou.tolist(),
        }
