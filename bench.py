"""Times steps of DAFL, DFAD and Fast-Datafree in the published way and in ours, in turn in one run.

    python bench.py                     # DAFL: LeNet-5, MNIST size, batch 512, float32; --setting dfad_mnist: DFAD
    python bench.py --setting cifar10   # DAFL: ResNet-34 -> ResNet-18, batch 256; also dfad_cifar, fast_resnet
    python bench.py --setting fast_wrn  # fast_meta: WRN-40-2 -> WRN-16-1, batch 256; fast_wrn16: WRN-16-2 -> WRN-16-1
    python bench.py --setting teacher   # teacher training, WRN-40-2, batch 256
    python bench.py --setting camvid    # DFAD, DeepLabv3 ResNet-50 -> MobileNet, 128 pixels, batch 64
    python bench.py --ranks 1 2         # instead: ours by one and by two processes, see bench_ranks.py

The published way is float32, NCHW, eager, with upsampling and convolution apart and the C library's own treatment of
freed memory; a teacher's images are read by four worker processes through PIL; for fast_meta, synthetic images are also
written as PNG files and read back in this way, and the hooks on the teacher's BatchNorm layers stay in student steps
too. On a GPU its convolutions are in TF32, PyTorch's default. The published scripts are slower still: their logging,
their tests and their own data loaders are left out. Ours is what the script does on this device. A round of synthesis
is Fast-2: two updates make a batch, which goes to the pool; images of a round, as of the six steps of a DFAD iteration,
count once.

Both run the same functions on the same networks, each in a process of its own, so that neither uses the other's memory;
their blocks of steps alternate, so that a machine whose speed drifts drifts for both. (The published way's readers go
on until eight batches wait, while ours runs: where there are any, the ratio is rather too small.) Reported are the
medians over the blocks, and of the ratio also the smallest and the largest. The share of the peak is the arithmetic
that the convolutions and matrix products of that way really do, over what a large matrix product or a large convolution
reaches in the same precision, whichever is faster. Peak memory is the process's (on a GPU: PyTorch's).
"""

import datafree.interrupt  # noqa: F401

import json
import resource
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

import bench_ranks
import DAFL_train
import datafree_kd
import DFAD_camvid_deeplab
import DFAD_cifar
import DFAD_mnist
import teacher_train
from data import SOURCES, TensorSplit
from datafree import checkpoint, distributed
from datafree.answers import Answers
from datafree.augment import Transform
from datafree.cli import DEVICE, Parser, batch, cli, count, number
from datafree.fold import fold_batch_norm
from datafree.hooks import features_of
from datafree.losses import activation_loss, information_entropy_loss, kd_loss, one_hot_loss
from datafree.pool import ImagePool
from datafree.runtime import Runtime, device_name, keep_memory, make_optimizer, setup
from datafree.session import Session
from datafree.synthesis import Fast
from models import get_generator, get_model, get_segmenter, set_folded

POOL = 10240  # images in the pool of fast_meta: a run's has 256 to 56,320
REMEMBERED = 0.68  # of what a student of Fast-Datafree meets, over 55 epochs as over 220: by drawing the numbers
LATER = f"student step, {REMEMBERED:.0%} seen before"
WAYS = ("published", "ours")


# Of every benchmark: names, help, and what else argparse is told.
FLAGS = ("--json", "write the figures there too", dict(metavar="FILE")), *DEVICE


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line."""
    p = Parser(__file__, __doc__)
    p.add_argument("--setting", choices=SETTINGS, default="mnist", help="(default: %(default)s)")
    p.add_argument("--batch_size", type=batch, help="(default: 512 for LeNet-5, 64 for CamVid, else 256)")
    p.add_argument("--steps", type=count, default=4, help="of a block; of rounds one (default: %(default)s)")
    p.add_argument("--repeats", type=number(int, 2), default=5, help="blocks of each way (default: %(default)s)")
    text = "compare ours by so many processes of a thread (or GPU) each with one process"
    p.add_argument("--ranks", type=number(int, 1, 64), nargs="+", metavar="N", help=text)
    p.add(*FLAGS)
    args = p.parse_args(argv)
    args.batch_size = args.batch_size or (512 if args.setting.endswith("mnist") else BATCHES.get(args.setting, 256))
    args.precision = args.precision or (DAFL_train.PRESETS["mnist"]["precision"] if args.setting == "mnist" else None)
    if wrong := [n for n in args.ranks or () if args.batch_size % n or args.batch_size < 2 * n]:
        p.error(f"--batch_size {args.batch_size} cannot be shared by {wrong[0]} processes: choose a multiple of it")
    return args


class Way:
    """The networks and optimisers of one way; to the scripts' functions it is a session.

    Args:
        name: "published" or "ours". args: of the command line. runtime: of ours. script, flags: whose settings it has.
    """

    network = "dafl"  # the generator
    size, classes, get_model = 32, 10, staticmethod(get_model)  # of images and networks
    step = Session.step

    def answers(self, x: Tensor, _: None) -> Tensor:
        """The teacher's logits, asked each time."""
        return self.folded_teacher(x)

    def __init__(self, name: str, args: Namespace, runtime: Runtime, script: ModuleType, *flags: object):
        self.ours = name == "ours"
        if runtime.device.type == "cpu":
            keep_memory(self.ours)
        self.runtime = runtime if self.ours else Runtime(runtime.device, "fp32")
        torch.backends.cudnn.allow_tf32 = not self.ours  # PyTorch's default
        self.device, self.batch_size = runtime.device, args.batch_size
        self.args = script.parse_args([*flags, "--batch_size", args.batch_size])
        self.run = SimpleNamespace(tick=lambda loss: None)
        torch.manual_seed(0)
        self.channels = SOURCES[self.args.dataset].channels if self.args.dataset in SOURCES else 3
        self.layout = torch.channels_last if self.ours else torch.contiguous_format
        self.student = self._place(getattr(self.args, "student", None) or self.args.model)
        if "teacher" in self.args:
            generator = get_generator(self.network, self.args.nz, self.size, self.channels)
            distributed.synchronize(generator)
            self.generator = set_folded(generator, self.ours).to(self.device, memory_format=self.layout)
            self.teacher = self._place(self.args.teacher).eval().requires_grad_(False)
            self.folded_teacher = fold_batch_norm(self.teacher) if self.ours else self.teacher
            for network in {self.teacher, self.folded_teacher}:
                distributed.join(network)
            for network in {self.folded_teacher, self.generator} - {self.teacher}:
                self.runtime.compile(network)
        distributed.join(self.student)
        self.runtime.compile(self.student)

    def _place(self, name: str) -> nn.Module:
        network = self.get_model(name, self.classes, self.channels)
        return network.to(self.device, memory_format=self.layout)


class DaflWay(Way):
    """DAFL."""

    def __init__(self, name: str, args: Namespace, runtime: Runtime):
        super().__init__(name, args, runtime, DAFL_train, "--dataset", args.setting)
        self.optimizer_G = make_optimizer("adam", self.generator.parameters(), 1e-3)
        self.optimizer_S = make_optimizer("adam", self.student.parameters(), 1e-3)
        x = distributed.share(torch.randn(self.batch_size, self.channels, 32, 32, device=self.device))
        self.x = x.contiguous(memory_format=self.layout)

    def latents(self) -> Tensor:
        return distributed.share(self.generator.latents(self.batch_size, device=self.device))

    def generator_step(self) -> None:
        """Generator and teacher: L_G alone."""
        with self.runtime.autocast(), features_of(self.teacher) as t_features:
            t_logits = self.teacher(self.generator(self.latents()))
        loss = (
            one_hot_loss(t_logits)
            + 0.1 * distributed.mean(activation_loss(t_features[0]))
            + 5 * information_entropy_loss(t_logits)
        )
        self.step(loss, self.optimizer_G)

    def student_step(self) -> None:
        """Teacher and student on images that are there: L_KD alone."""
        with self.runtime.autocast():
            with torch.no_grad():
                t_logits = self.teacher(self.x)
            s_logits = self.student(self.x)
        self.step(kd_loss(s_logits, t_logits), self.optimizer_S)

    def whole_step(self) -> None:
        """An iteration of DAFL_train.py."""
        networks = self.generator, self.teacher, self.student
        optimizers = self.optimizer_G, self.optimizer_S
        DAFL_train.distill_step(self.latents(), *networks, *optimizers, self.args, self.runtime.autocast)

    steps = {"generator + teacher": generator_step, "student": student_step, "whole DAFL step": whole_step}


class DfadWay(Way):
    """DFAD."""

    network, log_space = "generator_a", False

    def __init__(self, name: str, args: Namespace, runtime: Runtime):
        script = dict(dfad_mnist=DFAD_mnist, camvid=DFAD_camvid_deeplab).get(args.setting, DFAD_cifar)
        super().__init__(name, args, runtime, script, "--epoch_itrs", 1)
        self.optimizer_S = make_optimizer("sgd", self.student.parameters(), self.args.lr_S, 5e-4)
        self.optimizer_G = make_optimizer("adam", self.generator.parameters(), self.args.lr_G)

    def iteration(self) -> None:
        """Five student steps and one of the generator."""
        DFAD_cifar.train_epoch(0, self, self.generator, self.optimizer_S, self.optimizer_G, self.log_space)

    steps = {"DFAD iteration": iteration}


class CamvidWay(DfadWay):
    """DFAD of segmentation networks."""

    network, log_space, size, classes = "generator_b", True, 128, 11

    @staticmethod
    def get_model(name: str, classes: int, channels: int) -> nn.Module:
        return get_segmenter(name, classes)


class TeacherWay(Way):
    """Teacher training on as many images as the pool of fast_meta has."""

    def __init__(self, name: str, args: Namespace, runtime: Runtime):
        super().__init__(name, args, runtime, teacher_train, "--dataset", "cifar10", "--model", "wrn40_2")
        source, images = SOURCES["cifar10"], torch.randint(256, (POOL, 3, 32, 32), dtype=torch.uint8)
        self.transform = Transform(source.mean, source.std, padding=4, flip=True)
        self.optimizer = make_optimizer("sgd", self.student.parameters(), 0.1, 5e-4)
        labels = torch.randint(10, (POOL,))
        if self.ours:
            self.split = TensorSplit(images, labels).to(self.device)
        else:
            self.pool = PngPool(self.transform)
            self.pool.add(images / 255)
            self.transform = lambda x, train: x
        self.batches = self.forever()

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.ours:
            for x, _ in self.pool.sample(self.batch_size, self.device):
                yield x, torch.randint(10, (len(x),), device=self.device)
        while True:
            yield from self.split.batches(self.batch_size, True, True, self.device, distributed.share)

    def training_step(self) -> None:
        """A batch of images, and an update."""
        teacher_train.train_epoch(self, self.optimizer, [next(self.batches)])

    steps = {"training step": training_step}


class PngPool:
    """The published pool: PNG files, read back by worker processes through PIL."""

    def __init__(self, transform: Transform):
        self.temporary, self.count = tempfile.TemporaryDirectory(), 0  # lives as long as the pool
        self.folder = Path(self.temporary.name) / "synthetic"
        self.folder.mkdir()
        crop, flip = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
        normalize = transforms.Normalize(transform.mean, transform.std)
        self.transform = transforms.Compose([crop, flip, transforms.ToTensor(), normalize])

    def add(self, images: Tensor) -> None:
        """Write images (N, C, H, W) in 0..1."""
        for image in (images.detach().clamp(0, 1) * 255).to(torch.uint8).cpu():
            to_pil_image(image).save(self.folder / f"{self.count}.png")
            self.count += 1

    def sample(self, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """Batches without end."""
        options = dict(shuffle=True, num_workers=4, pin_memory=device.type == "cuda")
        while True:
            for x, _ in DataLoader(ImageFolder(self.temporary.name, self.transform), batch_size, **options):
                yield x.to(device), None


class FastWay(Way):
    """fast_meta."""

    network = "fast"

    def __init__(self, name: str, args: Namespace, runtime: Runtime):
        teacher, student = PAIRS[args.setting]
        flags = ("--dataset", "cifar10", "--method", "fast_meta", "--teacher", teacher, "--student", student)
        steps = ("--g_steps", 2, "--kd_steps", 1, "--synthesis_batch_size", args.batch_size)
        super().__init__(name, args, runtime, datafree_kd, *flags, *steps)
        source, shape = SOURCES["cifar10"], (3, 32, 32)
        transform = Transform(source.mean, source.std, padding=4, flip=True)
        pool = ImagePool(shape, self.device, "unsaved") if self.ours else PngPool(transform)
        pool.add(distributed.share(torch.rand(POOL, *shape)))
        settings = {k: getattr(self.args, k) for k in Fast.settings}
        networks = self.teacher, self.student, self.generator
        self.synthesizer = Fast(*networks, transform, shape, 10, self.runtime, pool, **settings)
        if self.ours:
            self.batches = self.synthesizer.sample(10**9, args.batch_size)
            n = 2 * POOL * transform.forms if remembers(runtime) else 0
            self.remembered = Answers(self.folded_teacher, 10, Path("unsaved"), n)
        else:
            self.batches = pool.sample(args.batch_size, self.device)
            for layer in self.synthesizer.hooks.layers:
                layer.register_forward_pre_hook(self.watch)
        self.optimizer = make_optimizer("sgd", self.student.parameters(), 0.1, 1e-4)

    def watch(self, layer: nn.Module, x: tuple[Tensor]) -> None:
        """The published hooks in student steps; in synthesis the synthesizer's own take the statistics."""
        if self.student.training:
            torch.var_mean(x[0], (0, 2, 3), correction=0)

    def synthesis_round(self) -> None:
        """A batch for the pool, as in mid-run: with the adversarial term."""
        self.student.eval().requires_grad_(False)
        self.synthesizer.synthesize(True, self.run.tick)

    def student_step(self) -> None:
        """A batch from the pool, teacher, student and update."""
        self.student.train().requires_grad_(True)
        datafree_kd.distill([next(self.batches)], self, self.optimizer)

    def later_step(self) -> None:
        """The same at a run's average of what the teacher has answered before."""
        if self.ours:
            self.remembered.known.bernoulli_(REMEMBERED)
            self.answers = self.remembered
        self.student_step()
        vars(self).pop("answers", None)

    steps = {"Fast-2 round": synthesis_round, "student step": student_step, LATER: later_step}


PAIRS = {"fast_wrn": ("wrn40_2", "wrn16_1"), "fast_wrn16": ("wrn16_2", "wrn16_1"),
         "fast_resnet": ("resnet34", "resnet18")}  # fmt: skip
SETTINGS = {"mnist": DaflWay, "cifar10": DaflWay, "dfad_mnist": DfadWay, "dfad_cifar": DfadWay, "camvid": CamvidWay}
SETTINGS |= dict.fromkeys(PAIRS, FastWay) | {"teacher": TeacherWay}
BATCHES = {"camvid": 64}


def remembers(runtime: Runtime) -> bool:
    """Whether datafree_kd.py in one process keeps the teacher's answers."""
    return runtime.device.type == "cpu" and not runtime.compiles


def seconds_of(function: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of a call, the mean of so many, until the device has done what it was told."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait(device)
    return (time.perf_counter() - start) / times


def peak_speed(runtime: Runtime) -> float:
    """Floating-point operations per second of a large matrix product or 3x3 convolution, the best of ten.

    On a CPU they may be different libraries': on one of AMD's, in float32, the convolution is 2.5 times as fast.
    """
    to = dict(device=runtime.device, dtype=torch.bfloat16 if runtime.precision == "bf16" else torch.float32)
    small = runtime.device.type == "cpu"
    size, n, c = (2048, 64, 512) if small else (8192, 1024, 1024)
    a, b = torch.randn(2, size, size, **to)
    x, weight = (
        torch.randn(shape, **to).to(memory_format=torch.channels_last) for shape in ((n, c, 8, 8), (c, c, 3, 3))
    )

    def best(function: Callable[[], Tensor]) -> float:
        return min(seconds_of(function, runtime.device) for _ in range(5))

    product = 2 * size**3 / best(lambda: a @ b)
    return max(product, 2 * 9 * x.numel() * c / best(lambda: F.conv2d(x, weight, padding=1)))


def start_process(name: str, args: Namespace) -> None:
    """Make the networks of one way, in its own process."""
    global way
    distributed.meet()
    way = SETTINGS[args.setting](name, args, setup(args))


def measure(kind: str, label: str | None = None, count: int = 1) -> float:
    """In the process of one way: the fastest arithmetic; of a step arithmetic, bytes sent, seconds; or memory."""
    step = way.steps.get(label)
    if kind == "peak":
        speed = peak_speed(way.runtime)
        if way.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # these are no step's
        return speed
    if kind == "work":
        with FlopCounterMode(display=False) as counter:
            step(way)
        return counter.get_total_flops()
    if kind == "bytes":
        return bench_ranks.bytes_of(lambda: step(way))
    if kind == "seconds":
        step(way)
        return seconds_of(lambda: step(way), way.device, count)
    return torch.cuda.max_memory_allocated() if way.device.type == "cuda" else memory_of(resource.RUSAGE_SELF)


def memory_of(who: int) -> int:
    """The most bytes that this process, or one of its finished children, has had."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def finish(args: Namespace, runtime: Runtime, **figures: object) -> dict[str, object]:
    """The figures, with what they were measured on; they go to --json, too."""
    where = dict(device=device_name(runtime.device), torch=torch.__version__, precision=runtime.precision)
    where |= dict(compiled=True) if runtime.compiles else {}
    if args.json:
        Path(args.json).write_text(json.dumps(where | figures, indent=1) + "\n")
    return where | figures


def main(args: Namespace) -> dict[str, object]:
    """Measure and print; returns the figures."""
    runtime = setup(args)
    if args.json:
        checkpoint.check_writable(Path(args.json).parent, "--json")
    labels = [
        label for label in SETTINGS[args.setting].steps if label != LATER or remembers(runtime) and not args.ranks
    ]
    if args.ranks:
        for figures in bench_ranks.compare(args, runtime, labels, start_process, measure):
            done = finish(args, runtime, setting=args.setting, batch_size=args.batch_size, ranks=figures)
        return done
    process = {name: ProcessPoolExecutor(1, get_context("spawn"), start_process, (name, args)) for name in WAYS}

    def ask(*question: object) -> dict[str, float]:
        return {name: process[name].submit(measure, *question).result() for name in WAYS}

    peak, figures = ask("peak"), {}
    print(
        f"{device_name(runtime.device)}, torch {torch.__version__}; {args.setting}, batch {args.batch_size}; ours in "
        f"{runtime.precision}; this machine reaches {peak['published'] / 1e9:.0f} GFLOP/s in the published way's "
        f"precision, {peak['ours'] / 1e9:.0f} in ours\n"
        f"{'':30} {'images/s':^21} {'':20} {'share of the peak':^21}\n"
        f"{'':30} {'published':>10} {'ours':>10} {'ratio (min-max)':>20} {'published':>10} {'ours':>10}"
    )
    for label in labels:
        work, question = ask("work", label), ("seconds", label, 1 if "round" in label else args.steps)
        for _ in range(2):  # the first blocks do not count
            ask(*question)
        blocks = [ask(*question) for _ in range(args.repeats)]
        middle = {name: statistics.median(block[name] for block in blocks) for name in WAYS}
        rate = {name: args.batch_size / middle[name] for name in WAYS}
        share = {name: work[name] / middle[name] / peak[name] for name in WAYS}
        ratios = [block["published"] / block["ours"] for block in blocks]
        ratio = statistics.median(ratios)
        spread = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        rates = f"{rate['published']:10.0f} {rate['ours']:10.0f}"
        print(f"{label:30} {rates} {spread:>20} {share['published']:10.0%} {share['ours']:10.0%}")
        figures[label] = {"images_per_second": rate, "ratio": ratio, "ratios": ratios, "share_of_peak": share}
    memory = ask("memory")
    for executor in process.values():
        executor.shutdown()
    print("peak memory: " + ", ".join(f"{n} {m / 2**30:.2f} GiB" for n, m in memory.items()))
    facts = dict(setting=args.setting, batch_size=args.batch_size, peak_flops=peak, peak_memory=memory)
    return finish(args, runtime, **facts, steps=figures)


if __name__ == "__main__":
    cli(main, parse_args)
