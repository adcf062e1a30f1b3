"""What every script does around its algorithm: device, test images, networks, teacher, run, record."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datafree import checkpoint, distributed, metrics
from datafree.augment import Transform
from datafree.errors import UsageError
from datafree.fold import fold_batch_norm
from datafree.inputs import open_data, trial_images
from datafree.run import Run, column_of, finished
from datafree.runtime import setup
from datafree.teachers import check_gradient, check_network, find_teacher, load_teacher, own_weights
from models import defaults_of, get_generator, get_model, get_segmenter, is_program, place_of


class Session:
    """A script's networks on a device, and its run; DAFL_train.py shows how it is used.

    Attributes:
        result: the run's record if nothing is to be done: --evaluate_only, or a finished run resumed.
        runtime, data, transform: device and precision; the data set; images to what the networks take.
        student: the network that is trained. teacher: frozen, in eval mode; None if `taught` is False.
        metadata, teacher_metadata: what checkpoints say of the two.
        unseen: () -> batches of normalised images that the student has not seen; for --dataset none; a
            generator's, unless a script knows better.
        answers: (normalised images, what tells them apart or None) -> the teacher's logits.

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
        self.answers: Callable[[Tensor, Tensor | None], Tensor] = lambda x, _: self.folded_teacher(x)
        distributed.begin(args)
        self.result = None if args.evaluate_only else distributed.from_first(lambda: finished(args))
        if self.result:
            return
        self.runtime = setup(args)
        if args.evaluate_only:
            train, taught, path = False, False, own_weights(args)
        else:
            path = find_teacher(args, segmentation) if taught else None
        content = checkpoint.read(path) if path and not (taught and is_program(args.teacher)) else None
        known = checkpoint.metadata_of(content, path, args)
        if taught:
            known = {k: v for k, v in defaults_of(args.teacher).items() if getattr(args, k) is None} | known
        with distributed.first_alone():
            self.data = open_data(args, known, train, segmentation).to(self.runtime.device)
        args.fingerprint = self.data.fingerprint  # a run goes on with the same data and teacher only
        self.score = "mIoU" if segmentation else "Acc@1" if self.data.test is not None else "agreement"
        role = "student" if "student" in args else "model"
        name = getattr(args, role)
        self.student = self.runtime.place(self._build(name, self.data.num_classes, self.data.channels))
        self.teacher, self.teacher_metadata, self.teacher_record = None, known, None
        if taught:
            self.teacher, self.teacher_record = load_teacher(args, path, content, self._build, self.data)
            self.runtime.place(self.teacher)
            args.teacher_sha256 = self.teacher_record["sha256"]
        if not segmentation:
            for network, flag in ((self.student, role), (self.teacher, "teacher"))[: 1 + taught]:
                check_network(network, f"--{flag} {getattr(args, flag)}", self.data, self.runtime)
        for network in filter(None, (self.student, self.teacher)):
            distributed.join(network)
        self.transform = Transform.of(self.data, known, area)
        self.metadata = checkpoint.metadata(name, self.data, self.transform, run=args.run_name)
        if args.evaluate_only:
            checkpoint.load_weights(self.student, content, path, name)
            percent, _ = self.evaluate(self.student)
            print(f"[Eval] {path} {self.score}={percent:.2f}{metrics.error_text(self.score, percent, self.data)}")
            self.result = {"weights": str(path), column_of(self.score): percent}
        self.runtime.compile(self.student)

    def _build(self, name: str, num_classes: int, channels: int) -> nn.Module:
        return get_segmenter(name, num_classes) if self.segmentation else get_model(name, num_classes, channels)

    @cached_property
    def folded_teacher(self) -> nn.Module:
        """The teacher with each BatchNorm that follows a convolution inside it: faster, the same logits."""
        # The registry's networks are known to fold.
        images = trial_images(self.data, self.runtime.device) if place_of(self.args.teacher) else None
        # Whoever asks first, be it under autocast: bfloat16's rounding is larger than what the copy may differ by.
        with distributed.apart(), torch.autocast(self.runtime.device.type, enabled=False):
            folded = fold_batch_norm(self.teacher, images)
        # The teacher itself is watched: with other hooks each time it would be compiled each time.
        return folded if folded is self.teacher else self.runtime.compile(folded)

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
        if not self.segmentation:
            check_gradient(self.teacher, f"--teacher {self.args.teacher}", self.data, self.runtime.device)
        distributed.synchronize(generator)
        self.runtime.compile(generator)
        self.unseen = lambda: (self.sample(generator, generator.latents(250, self.runtime.device)) for _ in range(4))
        return generator

    @torch.no_grad()
    def sample(self, generator: nn.Module, z: Tensor) -> Tensor:
        """Images (N, C, H, W) of the latents z by the generator's running statistics, as it makes them."""
        with self.runtime.autocast(), self.runtime.eagerly():
            x = generator.eval()(z)
        generator.train()
        return x.float()

    def start(self, **states) -> int:
        """Begin the run or take it up again; returns the epoch to start with. `states`: see `Run.start`."""
        start, args, self.teacher_score, shown = self.run.start(**states), self.args, None, ""
        if self.published:
            cells = ", ".join(f"{c['value']} ({c['cell']}: {c['source']}, {c['table']})" for c in self.published)
            self.run.log(f"published: {cells}")
        if self.score == "agreement":
            self.run.log(metrics.AGREEMENT)
        elif self.teacher is not None:
            self.teacher_score, _ = self.evaluate(self.teacher)
            shown = f": {self.teacher_score:.2f} %{metrics.error_text(self.score, self.teacher_score, self.data)}"
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
        self.run.progress(iterations, batch_size, done)
        yield from range(self.run.next_epoch, self.args.n_epochs)

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
        number = self.run.next_epoch + 1
        if pictures and (every := self.args.sample_every) and (number % every == 0 or number == self.args.n_epochs):
            self.run.images(f"epoch{number:04}", pictures())
        self.run.end_epoch(number - 1, percent, losses, self.student, self.metadata, **scores, **more)

    def evaluate(self, network: nn.Module) -> tuple[float, dict]:
        """The test score in percent of a network, in eval mode, and further scores by name."""
        with self.runtime.eagerly():
            return self._evaluate(network)

    def _evaluate(self, network: nn.Module) -> tuple[float, dict]:
        if self.score == "agreement":
            if self.unseen is None:  # --evaluate_only
                raise UsageError("--evaluate_only needs test images: name a --dataset that has some")
            about = self.data.num_classes, self.unseen(), self.runtime
            return metrics.agreement_beyond_chance(network, self.teacher, *about), {}
        measure = metrics.segmentation_scores if self.segmentation else metrics.classification_scores
        scores = measure(network, self.data, self.transform, self.runtime)
        return scores.pop(self.score), scores

    def finish(self, **facts) -> dict:
        """Close the run and write its record, whose content is returned. `facts`: what the script adds."""
        data, args, percent = self.data, self.args, self.run.percent
        about = dict(dataset=data.name, fingerprint=data.fingerprint, test_images=len(data.test or ()))
        about |= dict(standard_error=metrics.standard_error(self.score, percent, data), published=self.published)
        if self.teacher is not None:
            about |= dict(teacher=args.teacher, student=args.student)
            about |= dict(teacher_accuracy=self.teacher_score, teacher_weights=self.teacher_record)
        if self.teacher is not None and self.score == "Acc@1":
            # Smaller batches than the tests': these halve theirs where memory is short, and this is the run's end.
            n = max(1, metrics.size_of_test_batches(data) // 8)
            batches = data.test.batches(n, device=self.runtime.device, share=distributed.part)
            with self.runtime.eagerly():
                shown = (self.transform(x) for x, _ in batches)
                about["agreement"] = metrics.agreement(self.student, self.teacher, shown, self.runtime)
        if further := {k: v for k, v in self.run.rows[-1].items() if k.startswith(metrics.FURTHER)}:
            about["last_scores"] = further
        return self.run.finish(**(about | facts))
