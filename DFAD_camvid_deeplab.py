"""DFAD on CamVid (Fang et al. 2019), Data-Free Adversarial Distillation, Table 3: mIoU 0.535.

    python teacher_train_seg.py --dataset camvid
    python DFAD_camvid_deeplab.py --scheduler --save_img 10

The algorithm is in DFAD_cifar.py, but here the generator plays in log space:

    k times:  min_S  E_z |T(G(z)) - S(G(z))|                  the student imitates,
    once:     max_G  log(1 + E_z |T(G(z)) - S(G(z))|)         the generator looks for more,

means over batch, classes and pixels. A test is on the whole test images (short side 256). Published
settings, the defaults:
{presets}
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Mapping, Sequence

import DFAD_cifar
import papers
from datafree.cli import PICTURES, Parser, cli, describe_presets, number
from datafree.plots import side_by_side
from datafree.session import Session
from models import SEGMENTERS

PRESET = dict(dataset="camvid", teacher="deeplabv3_resnet50", student="deeplabv3_mobilenet", batch_size=64,
              n_epochs=300, epoch_itrs=50, k=5, lr_S=0.1, lr_G=1e-3, optimizer_G="adam", weight_decay=5e-4, nz=256,
              milestones=[1 / 3, 2 / 3], gamma=0.1, img_size=128)  # fmt: skip


def parse_args(
    argv: Sequence | None = None, script: str = __file__, docstring: str = __doc__, preset: Mapping = PRESET
) -> Namespace:
    """The command line; DFAD_nyu_deeplab.py gives its own file, docstring and preset."""
    p = Parser(script, docstring.format(presets=describe_presets({preset["dataset"]: preset})), paper="dfad")
    p.set_defaults(dataset=preset["dataset"])
    p.add_networks(SEGMENTERS)
    p.add_recipe(**DFAD_cifar.RECIPE)
    p.add(*DFAD_cifar.FLAGS)
    p.add_argument("--img_size", type=number(int, 16), help="side of the generated images (default: see above)")
    text = "at the end write N test images (all without a number) beside ground truth, teacher's and student's classes"
    p.add_argument("--save_img", type=number(int, 0), nargs="?", const=10**9, default=0, metavar="N", help=text)
    p.add(PICTURES)
    p.add_run()
    return p.complete(p.parse_args(argv), preset)


def main(args: Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    s = Session(args, papers.published(args), segmentation=True)
    if s.result:
        return s.result
    images = DFAD_cifar.train(s, s.generator("generator_b", args.nz, args.img_size), shown=16, log_space=True)
    if args.save_img:
        networks = {"teacher": s.folded_teacher, "student": s.student}
        side_by_side(s.run.folder / "samples", networks, s.data, s.transform, s.runtime, args.save_img)
    return s.finish(method="DFAD", generated_images=images)


if __name__ == "__main__":
    cli(main, parse_args)
