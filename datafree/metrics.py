"""Scores of classifiers and of segmentation networks."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from data import Dataset
from data.segmentation import Segmentation
from datafree.distributed import apart, part, total, turns
from datafree.runtime import Runtime

AGREEMENT = """no test images: the score is the agreement with the teacher, beyond chance, on images that the student \
has not seen, which is no accuracy"""
# How the names of the scores begin that stand beside the one that counts.
FURTHER = ("Acc@5", "iou_", "pixel_", "mean_acc", "frequency")
EVALUATION_PIXELS = 2**25  # values of a test batch at the most: 1000 images of 32 x 32, 222 of 224 x 224


def size_of_test_batches(data: Dataset) -> int:
    """How many test images one pass takes."""
    return max(1, min(1000, EVALUATION_PIXELS // (data.channels * data.img_size**2)))


@torch.no_grad()
def classification_scores(model: nn.Module, data: Dataset, transform: Callable, runtime: Runtime) -> dict[str, float]:
    """Percentages of `model`, in eval mode, on the test split of `data`.

    A batch that does not fit into a GPU's memory is halved. `transform`: uint8 images (N, C, H, W) -> network input.

    Returns:
        {"Acc@1"}, with more than ten classes {"Acc@1", "Acc@5"}.
    """
    training = model.training
    model.eval()
    n = size_of_test_batches(data)
    while True:
        try:
            hits = torch.zeros(2, dtype=torch.int64, device=runtime.device)
            for x, y in data.test.batches(n, device=runtime.device, share=part):
                with apart(), runtime.autocast():
                    logits = model(transform(x))
                top = logits.topk(min(5, data.num_classes), 1).indices == y[:, None]
                hits += torch.stack([(logits.argmax(1) == y).sum(), top.any(1).sum()])
            break
        except torch.OutOfMemoryError:
            if n == 1:
                raise
            n //= 2
    model.train(training)
    first, fifth = (100 * n / len(data.test) for n in total(hits).cpu().tolist())
    return {"Acc@1": first} | ({"Acc@5": fifth} if data.num_classes > 10 else {})


@torch.no_grad()
def agreement(student: nn.Module, teacher: nn.Module, batches: Iterable[Tensor], runtime: Runtime) -> float:
    """The share, in percent, of normalised images (N, C, H, W) that both put into the same class."""
    training = student.training
    student.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=runtime.device)
    for x in batches:
        with apart(), runtime.autocast():
            same = student(x).argmax(1) == teacher(x).argmax(1)
        counts += torch.stack([same.sum(), torch.ones_like(same).sum()])
    student.train(training)
    same, seen = total(counts).cpu().tolist()
    return 100 * same / seen


@torch.no_grad()
def agreement_beyond_chance(
    student: nn.Module, teacher: nn.Module, num_classes: int, batches: Iterable[Tensor], runtime: Runtime
) -> float:
    """Cohen's kappa of what both call normalised images (N, C, H, W), in percent, at least 0.

    The share on which they agree says nothing where a generator has died: of one image, over and over, it is 0 or 1.
    Kappa = (share - chance) / (1 - chance), chance being the share by their frequencies of classes alone; where both
    name one class only, 0.
    """
    training = student.training
    student.eval()
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=runtime.device)  # teacher's, student's, both
    for x in batches:
        with apart(), runtime.autocast():
            t, s = teacher(x).argmax(1), student(x).argmax(1)
        ones = torch.ones_like(t)
        for count, classes, of in ((counts[0], t, ones), (counts[1], s, ones), (counts[2], t, (t == s).long())):
            count.index_add_(0, classes, of)
    student.train(training)
    counts = total(counts).cpu().double()
    shares = counts / counts[0].sum()
    share, chance = float(shares[2].sum()), float(shares[0] @ shares[1])
    return 100 * max(0.0, (share - chance) / (1 - chance)) if chance < 1 else 0.0


@torch.no_grad()
def segmentation_scores(
    model: nn.Module, data: Segmentation, transform: Callable, runtime: Runtime
) -> dict[str, float | None]:
    """Percentages by name of `model`, in eval mode, on the whole images of the test split.

    Returns:
        {"mIoU", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "iou_<class>" ...};
        a class that occurs nowhere has None.
    """
    training = model.training
    model.eval()
    confusion = Confusion(data.num_classes, runtime.device)
    for x, y in turns(data.test.whole(runtime.device, 8)):
        with apart(), runtime.autocast():
            logits = model(transform(x))
        confusion.add(logits.argmax(1), y)
    model.train(training)
    total(confusion.matrix)
    scores = confusion.scores()
    classes = dict(zip(data.class_names, scores.pop("class_iou"), strict=True))
    scores = {"mIoU": scores.pop("mean_iou")} | scores | {f"iou_{name}": value for name, value in classes.items()}
    return {name: None if math.isnan(value) else 100 * value for name, value in scores.items()}


def standard_error(score: str, percent: float, data: Dataset | Segmentation) -> float | None:
    """The standard error, in percentage points, that so many test images leave in an accuracy; None of other scores."""
    return math.sqrt(percent * (100 - percent) / len(data.test)) if score == "Acc@1" else None


def error_text(score: str, percent: float, data: Dataset | Segmentation) -> str:
    """The standard error in brackets, for people; empty where there is none."""
    error = standard_error(score, percent, data)
    return "" if error is None else f" (standard error {error:.2f})"


class Confusion:
    """Confusion matrix of a segmentation and its scores; labels outside 0..num_classes - 1, as void's, are left out."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.n = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Count pixels: class numbers of any, but the same, shape. Rows are true classes."""
        counted = (labels >= 0) & (labels < self.n)
        # What is not counted goes to a cell of its own: a mask's size would make the host wait.
        cells = torch.where(counted, self.n * labels.long() + predictions, self.n**2).flatten()
        counts = torch.zeros(self.n**2 + 1, dtype=torch.int64, device=cells.device)
        counts.index_add_(0, cells, torch.ones_like(cells))
        self.matrix += counts[:-1].view(self.n, self.n)

    def scores(self) -> dict[str, float | list[float]]:
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
