"""Scripts in float64 at a tiny size, in one process or in several that torchrun starts:   ranks.py OUT [CASE ...]

OUT has data and teachers (`prepare`); each case's run goes to OUT/<number of processes>/<case>.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import DAFL_train
import datafree_kd
import datafree_kd_imagenet
import DFAD_camvid_deeplab
import DFAD_cifar
import DFND_train
import models
import teacher_train
import vanilla_kd
import ZSKT_train
from datafree import checkpoint, distributed, run
from datafree.cli import cli
from datafree.synthesis import METHODS
from models import SEGMENTERS, get_model

SMALL = "--nz 4 --ngf 2"
KD = "--ep_steps 1 --kd_steps 1 --n_epochs 1 --batch_size 12 --synthesis_batch_size 12"
MORE = {  # for a method that draws or weighs more than usual
    "deepinv": "--g_steps 3 --tv 0.1 --l2 0.1",
    "cmi": "--g_steps 3 --bank_size 40 --n_neg 5",
    "fast": "--g_steps 3",
    "fast_meta": "--g_steps 3",
    "nayer": "--g_steps 3 --g_loops 2",
}
GAME = "--n_epochs 1 --epoch_itrs 2 --k 2 --batch_size 12 --nz 4"
CASES = {
    "teacher_train": (teacher_train, "--model resnet8 --n_epochs 1 --batch_size 12 --recipe dafl"),
    "vanilla_kd": (vanilla_kd, "--n_epochs 1 --batch_size 12 --alpha 0.9 --beta 0.1"),
    "noise": (vanilla_kd, "--n_epochs 1 --batch_size 12 --transfer_set noise"),
    "DAFL_train": (DAFL_train, "--n_epochs 1 --iterations 3 --batch_size 12 --nz 4"),
    "DAFL_train_folded": (DAFL_train, "--n_epochs 1 --iterations 3 --batch_size 12 --nz 1"),
    "DFAD_cifar": (DFAD_cifar, GAME),
    "DFAD_camvid_deeplab": (
        DFAD_camvid_deeplab,
        f"{GAME} --img_size 32 --teacher tiny_seg --student tiny_seg --save_img 1",
    ),
    "ZSKT_train": (ZSKT_train, GAME),
    "DFND_train": (DFND_train, "--wild {out}/wild --num_select 24 --n_epochs 1 --batch_size 12"),
    **{
        name: (
            datafree_kd,
            f"--method {name} --warmup 0 {KD} {SMALL if 'nz' in method.recipe else ''} {MORE.get(name, '')}",
        )
        for name, method in METHODS.items()
    },
    "reptile": (datafree_kd, f"--method fast_meta --warmup 0 {KD} {SMALL} --g_steps 3 --is_maml 0"),
    "imagenet": (datafree_kd_imagenet, f"{KD} {SMALL} --g_steps 2 --phase1_rounds 1 --z_rounds 4"),
}


class TinySegmenter(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Conv2d(4, num_classes, 1)

    def forward(self, x, return_features=False):
        return self.head(self.bn(self.conv(x)).relu())


def prepare(out: Path) -> None:
    """Pictures of three classes, wild ones, street scenes, and untrained teachers."""
    rng, classes = np.random.default_rng(0), ("a", "b", "c")
    sizes = [("data/train", 8), ("data/test", 3), ("wild", 14)]
    for folder, n in sizes:
        for name in classes:
            for i in range(n):
                path = out / folder / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    for part in ("train", "test"):
        for kind, shape in ((part, (40, 48, 3)), (f"{part}annot", (40, 48))):
            for i in range(3):
                path = out / "data" / "CamVid" / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 11 if "annot" in kind else 256, shape, dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    about = dict(class_names=list(classes), num_classes=3, channels=3, img_size=16, mean=[0.5] * 3, std=[0.25] * 3)
    for name, model, metadata in (
        ("resnet8", get_model("resnet8", 3, 3), about | dict(accuracy=50.0)),
        ("tiny_seg", TinySegmenter(11), {}),
    ):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):  # of a network that has learnt something
                nn.init.uniform_(m.running_var, 0.5, 2)
                nn.init.normal_(m.running_mean, 0, 0.3)
        checkpoint.save({"state_dict": model.state_dict(), "metadata": metadata}, out / f"{name}.pt")


def flags(name: str, out: Path) -> list[str]:
    """A case's command line."""
    script, text = CASES[name]
    segmentation = script is DFAD_camvid_deeplab
    common = f"--out {out}/{distributed.SIZE}/{name} --data_root {out}/data --precision fp32 --device cpu"
    common += f" --checkpoints {out}/checkpoints --seed 3"
    if not segmentation:
        common += " --dataset folder --img_size 16 --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25"
        common += "" if script is teacher_train else " --teacher resnet8 --student resnet8"
    if script is not teacher_train:
        common += f" --teacher_ckpt {out}/{'tiny_seg' if segmentation else 'resnet8'}.pt"
    return [*text.format(out=out).split(), *common.split()]


def main(out: Path, names: list[str]) -> None:
    models.register("tiny_seg", TinySegmenter, SEGMENTERS)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # images and logits as well
    # A bias before a BatchNorm has no gradient but rounding, which Adam would blow up to whole steps.
    torch.optim.Adam = partial(torch.optim.Adam, eps=1e-3)
    randperm = torch.randperm
    run.plot_accuracy = lambda *_: None
    for name in names or CASES:
        script = CASES[name][0]
        # Each rank passes over its own images of a pool: the order differs by intention.
        ordered = script in (datafree_kd, datafree_kd_imagenet)
        torch.randperm = (lambda n, **where: torch.arange(n, **where)) if ordered else randperm
        script.main(script.parse_args(flags(name, out)))


if __name__ == "__main__":
    cli(lambda argv: main(Path(argv[0]), argv[1:]), lambda: sys.argv[1:])
