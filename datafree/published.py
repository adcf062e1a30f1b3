"""The papers' numbers, looked up in results/paper_tables.csv: none is typed into a script."""

import csv
from pathlib import Path

TABLES = Path(__file__).resolve().parent.parent / "results" / "paper_tables.csv"

# What the papers call the networks and data sets of this collection.
NETWORKS = {
    "lenet5": ("LeNet-5",),
    "lenet5_half": ("LeNet-5-HALF",),
    "hintonnet": ("HintonNet (2x1200 MLP)",),
    "hintonnet_half": ("2x800 MLP",),
    "alexnet": ("AlexNet",),
    "alexnet_half": ("AlexNet-half",),
    "resnet18": ("ResNet-18 (cifar)", "ResNet-18"),
    "resnet34": ("ResNet-34 (cifar)", "ResNet-34"),
    "resnet18_imagenet": ("ResNet-18",),
    "resnet34_imagenet": ("ResNet-34",),
    "deeplabv3_resnet50": ("DeepLabv3-ResNet-50 (ImageNet)",),
    "deeplabv3_mobilenet": ("DeepLabv3-MobileNetv2",),
    "resnet50_imagenet": ("ResNet-50",),
    "mobilenetv2": ("MobileNetv2",),
    "vgg11": ("VGG-11",),
    "wrn16_1": ("WRN16-1",),
    "wrn16_2": ("WRN16-2",),
    "wrn40_1": ("WRN40-1",),
    "wrn40_2": ("WRN40-2",),
}
DATASETS = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "celeba": "CelebA",
    "caltech101": "Caltech101",
    "camvid": "CamVid",
    "nyuv2": "NYUv2",
    "imagenet": "ImageNet",
}
SCRATCH = ("Student scratch", "Student", "Scratch")


def published(dataset, methods, teacher=None, student=None):
    """The published cells of a data set and networks, by registry name.

    Args:
        methods: the tables' names of the method, e.g. ("DAFL",).
        teacher, student: registry names, or None for any.

    Returns:
        a list of {"source", "table", "method", "value"} without repetitions, in the tables' order.
    """
    with TABLES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = []
    for row in rows:
        if (
            row["dataset"] == DATASETS.get(dataset)
            and row["method"] in methods
            and (teacher is None or row["teacher"] in NETWORKS.get(teacher, ()))
            and (student is None or row["student"] in NETWORKS.get(student, ()))
            and row["value"].replace(".", "", 1).isdigit()
        ):
            cell = {
                "source": row["source"],
                "table": row["table"],
                "method": row["method"],
                "value": float(row["value"]),
            }
            if cell not in cells:
                cells.append(cell)
    return cells


def published_classifier(dataset, model):
    """The published accuracies of `model` trained on the data: as teacher, else as student."""
    return published(dataset, ("Teacher",), teacher=model) or published(dataset, SCRATCH, student=model)


def describe(cells):
    """'98.91 (DAFL Table 1: Teacher), 98.90 (DFAD Table 2: Teacher)', or 'none'."""

    def text(cell):
        digits = 2 if cell["value"] > 1 else 3  # mIoU is published as a share
        return f"{cell['value']:.{digits}f} ({cell['source']} {cell['table']}: {cell['method']})"

    return ", ".join(text(cell) for cell in cells) or "none"
