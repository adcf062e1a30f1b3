"""What every script does around its algorithm: device, test images, networks, teacher, run, record."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datafree import checkpoint, metrics
from datafree.augment import Transform
from datafree.errors import UsageError
from datafree.fold import fold_batch_norm
from datafree.inputs import open_data, trial_images
from datafree.run import Run, column_of, finished
from datafree.runtime import setup
from datafree.teachers import check_network, find_teacher, load_teacher, own_weights
from models import NetworkError, defaults_of, get_generator, get_model, get_segmenter, is_program, place_of


class Session:
    """A script's networks on a device, and its run; DAFL_train.py shows how it is used.

    Attributes:
        result: the run's record if nothing is to be done: --evaluate_only, or a finished run resumed.
        runtime, data, transform: device and precision; the data set; images to what the networks take.
        student: the network that is trained. teacher: frozen, in eval mode; None if `taught` is False.
        metadata, teacher_metadata: what checkpoints say of the two.
        unseen: () -> batches of normalised images that the student has not seen; for --dataset none; a
            generator's, unless a script knows better.

    Args:
        args: of `cli.Parser.complete`. published: the papers' cells of this run, see `papers.published`.
        train: whether the training images are needed, too. taught: whether there is a teacher.
        segmentation: whether the networks label pixels. area: see `Transform`.

    Raises UsageError or DataError, in one line that names the cure.
    """

    def __init__(
        self, args: argparse.Namespace, published: Sequence[dict] = (), train: bool = False, taught: bool = True,
        segmentation: bool = False, area: float | None = None,
    ):  # fmt: skip
        self.args, self.segmentation, self.published = args, segmentation, list(published)
        self.unseen: Callable[[], Iterable[Tensor]] | None = None
        self.result = None if args.evaluate_only else finished(args)
        if self.result:
            return
        self.runtime = setup(args)
        taught = taught and not args.evaluate_only
        path = find_teacher(args, segmentation) if taught else own_weights(args) if args.evaluate_only else None
        program = taught and is_program(args.teacher)
        content = None if program else checkpoint.read(path) if path else {}
        known = checkpoint.metadata_of(content, path, args)
        if taught:
            known = {k: v for k, v in defaults_of(args.teacher).items() if getattr(args, k) is None} | known
        self.data = open_data(args, known, train and not args.evaluate_only, segmentation).to(self.runtime.device)
        args.fingerprint = self.data.fingerprint  # a run goes on with the same data and teacher only
        self.score = "mIoU" if segmentation else "Acc@1" if self.data.test is not None else "agreement"
        role = "student" if "student" in args else "model"
        name = getattr(args, role)
        self.student = self._build(name, self.data.num_classes, self.data.channels)
        self.teacher, self.teacher_metadata, self.teacher_record = None, known, None
        if taught:
            self.teacher, self.teacher_record = load_teacher(args, path, content, self._build, self.data)
            self.runtime.place(self.teacher)
            args.teacher_sha256 = self.teacher_record["sha256"]
        elif args.evaluate_only:
            checkpoint.load_weights(self.student, content, path, name)
        self.runtime.place(self.student)
        if not segmentation:
            for network, flag in ((self.student, role), (self.teacher, "teacher"))[: 1 + taught]:
                check_network(network, f"--{flag} {getattr(args, flag)}", self.data, self.runtime)
        self.transform = Transform.of(self.data, known, area)
        self.metadata = checkpoint.metadata(name, self.data, self.transform, run=args.run_name)
        if args.evaluate_only:
            percent, _ = self.evaluate(self.student)
            print(f"[Eval] {path} {self.score}={percent:.2f}{self._error_text(percent)}")
            self.result = {"weights": str(path), column_of(self.score): percent}

    def _build(self, name: str, num_classes: int, channels: int) -> nn.Module:
        try:
            return get_segmenter(name, num_classes) if self.segmentation else get_model(name, num_classes, channels)
        except NetworkError as error:
            raise UsageError(str(error)) from error

    def _trial_images(self) -> Tensor:
        return trial_images(self.data, self.runtime.device)

    @cached_property
    def folded_teacher(self) -> nn.Module:
        """The teacher with each BatchNorm that follows a convolution inside it: faster, the same logits."""
        # The registry's networks are known to fold.
        return fold_batch_norm(self.teacher, self._trial_images() if place_of(self.args.teacher) else None)

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
        if not self.segmentation and not self.teacher(self._trial_images().requires_grad_()).requires_grad:
            text = "passes no gradient on to the images, which teaches the generator: take no_grad out of its forward"
            raise UsageError(f"--teacher {self.args.teacher} {text}")
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
        start, args, self.teacher_score, shown = self.run.start(**states), self.args, None, ""
        if self.published:
            cells = ", ".join(f"{c['value']} ({c['cell']}: {c['source']}, {c['table']})" for c in self.published)
            self.run.log(f"published: {cells}")
        if self.score == "agreement":
            text = "no test images: the score is the agreement with the teacher on images that the student has "
            self.run.log(text + "not seen, which is no accuracy")
        elif self.teacher is not None:
            self.teacher_score, _ = self.evaluate(self.teacher)
            shown = f": {self.teacher_score:.2f} %{self._error_text(self.teacher_score)}"
        if self.teacher is not None:
            text = f"teacher {args.teacher}{shown} ({self.teacher_record['file']}); student {args.student}; "
            self.run.log(f"{text}{self.runtime.precision} on {self.runtime.device}")
        return start

    def epochs(self, iterations: int | list[int], batch_size: int, done: int = 0, **states) -> Iterator[int]:
        """The epochs that are left, from 0, with a progress bar; starts the run unless `start` did.

        Args:
            iterations: of an epoch, or of each one. batch_size: images of an iteration.
            done: iterations of the first one that are done.
        """
        if states:
            self.start(**states)
        n = self.args.n_epochs
        self.run.progress([iterations] * n if isinstance(iterations, int) else iterations, batch_size, done)
        for epoch in range(self.run.next_epoch, n):
            self.epoch = epoch
            yield epoch

    def step(self, loss: Tensor, optimizer: Optimizer) -> Tensor:
        """One update of what the optimiser trains; returns the loss (0-d), detached."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.run.tick(loss.detach())
        return loss.detach()

    def record(self, losses: dict, pictures: Callable[[], Tensor] | None = None, **more) -> None:
        """Test the student and keep the epoch; every --sample_every epochs, and at the end, a grid of pictures."""
        percent, scores = self.evaluate(self.student)
        number = self.epoch + 1
        if pictures and (every := self.args.sample_every) and (number % every == 0 or number == self.args.n_epochs):
            self.run.images(f"epoch{number:04}", pictures())
        self.run.end_epoch(self.epoch, percent, losses, self.student, self.metadata, **scores, **more)

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
        data, args = self.data, self.args
        about = dict(dataset=data.name, fingerprint=data.fingerprint, test_images=len(data.test or ()))
        about |= dict(standard_error=self._standard_error(self.run.percent), published=self.published)
        if self.teacher is not None:
            about |= dict(teacher=args.teacher, student=args.student, teacher_accuracy=self.teacher_score)
            about |= dict(teacher_weights=self.teacher_record)
        names = ("Acc@5", "iou_", "pixel_", "mean_acc", "frequency")
        if scores := {k: v for k, v in self.run.rows[-1].items() if k.startswith(names)}:
            about["last_scores"] = scores
        return self.run.finish(**(about | facts))
