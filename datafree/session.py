"""What every script does around its algorithm: device, test images, networks, teacher, run, record."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor, nn

from data import SOURCES, get_dataset, get_segmentation
from datafree import checkpoint, metrics
from datafree.augment import Transform
from datafree.errors import UsageError
from datafree.fold import fold_batch_norm
from datafree.run import Run, column_of, finished, run_folder
from datafree.runtime import setup
from datafree.teachers import find_teacher, load_teacher, weights_of
from models import get_generator, get_model, get_segmenter


class Session:
    """A script's networks on a device, and its run.

        s = Session(args)
        if s.result:                                    # --evaluate_only, or a finished run resumed
            return s.result
        for epoch in s.epochs(iterations, student=s.student, ...):
            s.record(train_epoch(...))
        return s.finish(...)

    Attributes:
        runtime, data, transform: device and precision; the data set; images to what the networks take.
        student: the network that is trained. teacher: frozen, in eval mode; None if `taught` is False.
        card, teacher_card: what checkpoints say of the two.
        unseen: () -> batches of normalised images that the student has not seen; for --dataset none; a
            generator's, unless a script knows better.

    Args:
        args: of `cli.Parser.complete`. published: the papers' cells of this run, see `papers.published`.
        train: whether the training images are needed, too.
        taught: whether there is a teacher. segmentation: whether the networks label pixels.

    Raises:
        UsageError, DataError: one line that names the cure.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        published: Sequence[dict] = (),
        train: bool = False,
        taught: bool = True,
        segmentation: bool = False,
        area: float | None = None,
    ):
        self.args, self.segmentation, self.published = args, segmentation, list(published)
        self.unseen: Callable[[], Iterable[Tensor]] | None = None
        self.result = None if args.evaluate_only else finished(args)
        if self.result:
            return
        self.runtime = setup(args)
        path, content, card = None, {}, {}
        if taught and not args.evaluate_only:
            path = find_teacher(args, "teacher_train_seg.py" if segmentation else "teacher_train.py")
            content = checkpoint.read(path)
        elif args.evaluate_only:
            path = weights_of(args.ckpt) if args.ckpt else run_folder(args) / "best.pt"
            if not path.exists():
                raise UsageError(f"{path} does not exist: give the flags of the run, or its weights as --ckpt FILE")
            content = checkpoint.read(path)
        card = checkpoint.card_of(args, content)
        self.data = self._open_data(card, train and not args.evaluate_only)
        self.score = "mIoU" if segmentation else "Acc@1" if self.data.test is not None else "agreement"
        name = args.student if "student" in args else args.model
        self.student = self._build(name, self.data.num_classes, self.data.channels)
        self.teacher, self.teacher_card, self.teacher_record = None, card, None
        if taught and not args.evaluate_only:
            loaded = load_teacher(args, path, content, self._build, self.data)
            self.teacher, self.teacher_card, self.teacher_record = loaded
            self.runtime.place(self.teacher)
            args.teacher_sha256 = self.teacher_record["sha256"]  # a run goes on with the same one only
        elif args.evaluate_only:
            checkpoint.load_weights(self.student, content, path, name)
        self.runtime.place(self.student)
        self.transform = Transform.of(self.data, card, area)
        self.card = checkpoint.card(name, self.data, self.transform, run=args.run_name)
        if args.evaluate_only:
            percent, _ = self.evaluate(self.student)
            print(f"[Eval] {path} {self.score}={percent:.2f}{self._error_text(percent)}")
            self.result = {"weights": str(path), column_of(self.score): percent}

    def _build(self, name: str, num_classes: int, channels: int) -> nn.Module:
        return get_segmenter(name, num_classes) if self.segmentation else get_model(name, num_classes, channels)

    def _open_data(self, card: dict, train: bool):
        args = self.args
        if self.segmentation:
            return get_segmentation(args.dataset, args.data_root, args.mean, args.std, train).to(self.runtime.device)
        # What is not known of these two, the teacher's file says.
        known = card if args.dataset in ("none", "folder") else {}
        channels, num_classes = (args.channels, args.num_classes) if "channels" in args else (None, None)
        size, channels = args.img_size or known.get("img_size"), channels or known.get("channels")
        if args.dataset == "none":
            num_classes = num_classes or card.get("num_classes")
        data = get_dataset(args.dataset, args.data_root, size, channels, args.mean, args.std, args.attribute,
                           train=train, num_classes=num_classes).to(self.runtime.device)  # fmt: skip
        if args.dataset == "none" and (source := SOURCES.get(card.get("dataset"))):
            data = replace(data, padding=data.img_size // 8 if source.crop else 0, flip=source.flip)
        if data.mean is None and "mean" not in card or data.std is None and "std" not in card:
            raise UsageError(
                f"the statistics of {args.dataset} are not known, as the teacher's file does not say them: "
                "give --mean and --std, one value per channel"
            )
        return data

    @cached_property
    def folded_teacher(self) -> nn.Module:
        """The teacher with each BatchNorm that follows a convolution inside it: faster, the same logits."""
        return fold_batch_norm(self.teacher)

    @cached_property
    def run(self) -> Run:
        """The run's folder, opened when it is first asked for."""
        return Run(self.args, self.runtime, self.score)

    def generator(self, name: str, nz: int, img_size: int | None = None, ngf: int = 64) -> nn.Module:
        """A generator of images as the teacher takes them. Raises UsageError where the size does not fit."""
        try:
            generator = get_generator(name, nz, img_size or self.data.img_size, self.data.channels, ngf)
        except ValueError as error:
            raise UsageError(f"{error}: choose another --img_size or --generator") from error
        self.runtime.place(generator)
        self.unseen = lambda: (self.sample(generator, generator.latents(250, self.runtime.device)) for _ in range(4))
        return generator

    @torch.no_grad()
    def sample(self, generator: nn.Module, z: Tensor) -> Tensor:
        """Images (N, C, H, W) of the latents z by the generator's running statistics, as it makes them."""
        training = generator.training
        generator.eval()
        with self.runtime.autocast():
            x = generator(z)
        generator.train(training)
        return x.float()

    def start(self, **states) -> int:
        """Begin the run or take it up again; returns the epoch to start with. `states`: see `Run.start`."""
        start = self.run.start(**states)
        if self.published:
            cells = ", ".join(f"{c['value']} ({c['cell']}: {c['source']}, {c['table']})" for c in self.published)
            self.run.log(f"published: {cells}")
        if self.teacher is None:
            return start
        self.teacher_score = None
        if self.score == "agreement":
            self.run.log(
                "no test images: the score is the agreement with the teacher on images that the "
                "student has not seen, which is no accuracy"
            )
        else:
            self.teacher_score, _ = self.evaluate(self.teacher)
        shown = (
            "" if self.teacher_score is None else f": {self.teacher_score:.2f} %{self._error_text(self.teacher_score)}"
        )
        self.run.log(
            f"teacher {self.args.teacher}{shown} ({self.teacher_record['file']}); student {self.args.student}; "
            f"{self.runtime.precision} on {self.runtime.device}"
        )
        return start

    def epochs(
        self, iterations: int | list[int], batch_size: int, n_epochs: int | None = None, done: int = 0, **states
    ) -> Iterator[int]:
        """The epochs that are left, from 0, with a progress bar; starts the run unless `start` did.

        Args:
            iterations: of an epoch, or of each one. batch_size: images of an iteration.
            n_epochs: how many (default: args.n_epochs). done: iterations of the first one that are done.
        """
        if states:
            self.start(**states)
        n = n_epochs or self.args.n_epochs
        self.run.progress([iterations] * n if isinstance(iterations, int) else iterations, batch_size, done)
        self.n_epochs = n
        for epoch in range(self.run.next_epoch, n):
            self.epoch = epoch
            yield epoch

    def record(self, losses: dict, pictures: Callable[[], Tensor] | None = None, **more) -> None:
        """Test the student and keep the epoch; every --sample_every epochs, and at the end, a grid of pictures."""
        percent, scores = self.evaluate(self.student)
        number = self.epoch + 1
        if pictures and (every := self.args.sample_every) and (number % every == 0 or number == self.n_epochs):
            self.run.images(f"epoch{number:04}", pictures())
        self.run.end_epoch(self.epoch, percent, losses, self.student, self.card, **scores, **more)

    def evaluate(self, network: nn.Module) -> tuple[float, dict]:
        """The test score in percent of a network, in eval mode, and further scores by name."""
        if self.score == "agreement":
            if self.unseen is None:  # --evaluate_only
                raise UsageError("--evaluate_only needs test images: name a --dataset that has some")
            return metrics.agreement(network, self.teacher, self.unseen(), self.runtime), {}
        measure = metrics.segmentation_scores if self.segmentation else metrics.classification_scores
        scores = measure(network, self.data, self.transform, self.runtime)
        return scores.pop(self.score), scores

    def _standard_error(self, percent: float) -> float | None:
        return None if self.score != "Acc@1" else sqrt(percent * (100 - percent) / len(self.data.test))

    def _error_text(self, percent: float) -> str:
        error = self._standard_error(percent)
        return "" if error is None else f" (standard error {error:.2f})"

    def finish(self, **facts) -> dict:
        """Close the run and write its record, whose content is returned. `facts`: what the script adds."""
        data, run = self.data, self.run
        about = {
            "dataset": data.name,
            "fingerprint": data.fingerprint,
            "test_images": len(data.test) if data.test is not None else 0,
            "standard_error": self._standard_error(run.percent),
            "published": self.published,
        }
        if self.teacher is not None:
            about |= {
                "teacher": self.args.teacher,
                "student": self.args.student,
                "teacher_accuracy": self.teacher_score,
                "teacher_weights": self.teacher_record,
            }
        columns = [k for k in run.rows[-1] if k.startswith(("iou_", "pixel_", "mean_acc", "frequency", "Acc@5"))]
        if columns:
            about["last_scores"] = {
                k: float(run.rows[-1][k]) if run.rows[-1][k] not in ("", None) else None for k in columns
            }
        return run.finish(**(about | facts))
