"""Images that a classifier tells of: to look at it before a student learns, and to measure what the student became."""

import argparse
import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datafree import checkpoint
from datafree.hooks import BatchNormHooks
from datafree.pool import ImagePool, read_raw
from datafree.run import run_folder
from datafree.session import Session
from datafree.synthesis import METHODS, Fast

UNSEEN = 1000
GENERATORS = {"DAFL_train.py": "dafl", "DFAD_cifar.py": "generator_a"}


def maker_of(s: Session, n: int, g_steps: int, **settings: float) -> Fast:
    """What makes n images a round in g_steps updates, as Fast-Datafree does, but without a student."""
    method = METHODS["fast_meta"]
    recipe = {**method.recipe, **method.adjust("", "", g_steps), **method.fixed, **settings}
    recipe |= dict(adv=0.0, synthesis_batch_size=n, g_steps=g_steps, as_published=False)
    recipe["bn"] *= bool(BatchNormHooks(s.teacher).layers)
    generator = s.generator(recipe["generator"], recipe["nz"], ngf=recipe["ngf"])
    shape = (s.data.channels, s.data.img_size, s.data.img_size)
    pool, chosen = ImagePool(shape, s.runtime.device, "unsaved"), {k: recipe[k] for k in Fast.settings}
    return Fast(s.teacher, None, generator, s.transform, shape, s.data.num_classes, s.runtime, pool, **chosen)


def class_images(s: Session, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some images of each class, of up to 40 classes, fewer of large images.

    Returns:
        The images (N, C, H, W) in 0..1, their classes (N,), and what the teacher's softmax gives these (N,).
    """
    n = max(8, min(40, 2**18 // s.data.img_size**2))
    classes = torch.linspace(0, s.data.num_classes - 1, min(n, s.data.num_classes)).round().long()
    targets = classes.repeat(math.ceil(n / len(classes)))[:n]
    maker = maker_of(s, n, steps, bn=1.0, oh=1.0)
    with tqdm(total=steps, desc="images of each class", leave=False, disable=None) as bar:
        maker.invert(maker.latents(), targets.to(s.runtime.device), False, lambda loss: bar.update())
    with torch.no_grad():
        confidence = s.teacher(s.transform(maker.pool.near)).float().softmax(1).cpu()
    return maker.pictures(n), targets, confidence.gather(1, targets[:, None])[:, 0]


def alone(s: Session, n: int) -> tuple[Tensor, Tensor]:
    """n images uint8 (N, C, H, W) of a generator that learns to make them, and UNSEEN others of it."""
    batch = max(1, n // 4)
    maker, rounds = maker_of(s, batch, 5), 16  # of which the last four are kept
    with tqdm(total=rounds * 5 * batch, unit=" images", desc="images", leave=False, disable=None) as bar:
        for _ in range(rounds):
            maker.synthesize(False, lambda loss: bar.update(batch))
    return maker.pool.near[-n:], draw(s, maker.generator, UNSEEN)


def of_run(s: Session, args: argparse.Namespace, n: int) -> tuple[Tensor, Tensor]:
    """n images uint8 (N, C, H, W) like those that a run's student learnt from, the last of its pool if it has one.

    Args:
        args: of the run, which has a generator.

    Returns:
        These, and UNSEEN fresh ones of the generator.
    """
    folder, pooled = run_folder(args), args.script == "datafree_kd.py"
    name = args.generator if pooled else GENERATORS[args.script]
    generator = s.generator(name, args.nz, ngf=getattr(args, "ngf", 64))
    states = checkpoint.read(folder / "last.pt", s.runtime.device)["run"]["states"]
    generator.load_state_dict(states["synthesizer"]["generator"] if pooled else states["generator"])
    unseen = draw(s, generator, UNSEEN, pooled)
    if not (folder / "pool.u8").is_file():
        return draw(s, generator, n, pooled, seed=2), unseen
    shape = (s.data.channels, s.data.img_size, s.data.img_size)
    return read_raw(folder / "pool.u8", shape)[-n:].to(s.runtime.device), unseen


@torch.no_grad()
def draw(s: Session, generator: nn.Module, n: int, in_pixels: bool = True, seed: int = 1) -> Tensor:
    """n images uint8 (N, C, H, W) of a generator.

    Args:
        in_pixels: it gives pixels in 0..1, by its batch's statistics as datafree_kd.py's do; else normalised images.
    """
    z = generator.train(in_pixels).latents(n, generator=torch.Generator().manual_seed(seed)).to(s.runtime.device)
    with s.runtime.eagerly():
        x = torch.cat([generator(part).float() for part in z.split(250)])
    return ((x if in_pixels else s.transform.denormalize(x)).clamp(0, 1) * 255).round().byte()
