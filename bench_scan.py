"""Times DFND's scan of a large wild set: how many images a second, and in how much memory.

    python bench_scan.py                          # 100,000 thumbnails and LeNet-5
    python bench_scan.py --images 1000000 --json scan.json
    python bench_scan.py --teacher resnet34       # the teacher of DFND's table

Writes that many 32x32 JPEG files, 200 different ones over and over, into a zip in the system's folder for temporary
files (1.2 GB for a million), lists and scans it as DFND_train.py does, and removes it. Peak memory is the main
process's and the largest worker's; each of these counts the libraries that they share.
"""

import datafree.interrupt  # noqa: F401

import io
import resource
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import DFND_train
from bench import FLAGS, finish, memory_of
from data import SOURCES, get_wild
from datafree import checkpoint
from datafree.augment import Transform
from datafree.cli import Parser, cli, count
from datafree.errors import UsageError
from datafree.fold import fold_batch_norm
from datafree.runtime import device_name, setup
from models import MODELS, get_model


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line."""
    p = Parser(__file__, __doc__)
    p.add_argument("--images", type=count, default=100_000, help="(default: %(default)s)")
    text = f"one of {', '.join(sorted(MODELS))} (default: %(default)s)"
    p.add_argument("--teacher", choices=sorted(MODELS), default="lenet5", metavar="NAME", help=text)
    p.add(*(flag for flag in FLAGS if flag[0] != "--compile"))  # a scan is not
    p.set_defaults(compile=False)
    return p.parse_args(argv)


def write_thumbnails(path: Path, n: int, different: int = 200) -> None:
    """A zip of n smooth random colour images, 32x32 JPEG."""
    files = []
    coarse = torch.rand(different, 3, 8, 8)
    for pixels in torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1):
        buffer = io.BytesIO()
        to_pil_image(pixels).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for i in tqdm(range(n), "writing thumbnails", leave=False, disable=None):
            archive.writestr(f"wild/{i:08}.jpg", files[i % different])


def main(args: Namespace) -> dict[str, object]:
    """Measure and print; returns the figures."""
    runtime = setup(args)
    source = SOURCES["mnist" if args.teacher.startswith("lenet5") else "cifar10"]
    teacher = get_model(args.teacher, 10, source.channels).eval().requires_grad_(False)
    runtime.place(teacher)
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, source.channels, 32, 32, device=runtime.device))
    except RuntimeError as error:
        raise UsageError(f"--teacher {args.teacher} takes no images of 32x32 pixels: choose another") from error
    if args.json:
        checkpoint.check_writable(Path(args.json).parent, "--json")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wild.zip"
        write_thumbnails(path, args.images)
        before, start = memory_of(resource.RUSAGE_SELF), time.perf_counter()
        split, _ = get_wild(str(path), ".", 32, source.channels)
        listed = time.perf_counter() - start
        found = DFND_train.scan(fold_batch_norm(teacher), split, Transform(source.mean, source.std), runtime)
        scanned = time.perf_counter() - start - listed
    if found["broken"]:
        raise RuntimeError(f"{found['broken']} thumbnails could not be read")
    rate, peak, worker = len(split) / scanned, memory_of(resource.RUSAGE_SELF), memory_of(resource.RUSAGE_CHILDREN)
    gib = [f"{x / 2**30:.2f}" for x in (peak, before, worker)]
    print(
        f"{device_name(runtime.device)}: {len(split):,} images listed in {listed:.1f} s, scanned in {scanned:.0f} s, "
        f"{rate:,.0f}/s; peak memory {gib[0]} GiB ({gib[1]} before), a worker's {gib[2]}"
    )
    facts = dict(teacher=args.teacher, images=len(split), seconds_to_list=listed, seconds_to_scan=scanned)
    memory = dict(memory_before=before, peak_memory={"main": peak, "worker": worker})
    return finish(args, runtime, **facts, images_per_second=rate, **memory)


if __name__ == "__main__":
    cli(main, parse_args)
