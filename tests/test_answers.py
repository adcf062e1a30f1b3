"""What the teacher said of a pool's images is what it would say again."""

import pytest
import torch

import bench
import datafree_kd
from datafree import checkpoint
from datafree.answers import Answers
from datafree.augment import Transform


class Teacher:
    """Two logits of an image: its first pixel and its sum; counts the images that it sees."""

    seen = 0

    def __call__(self, x):
        self.seen += len(x)
        return torch.stack([x[:, 0, 0, 0], x.sum((1, 2, 3))], 1)


def images(numbers):
    return numbers.view(-1, 1, 1, 1) * torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)


def test_each_image_is_asked_for_once(tmp_path):
    teacher, torch_rng = Teacher(), torch.Generator().manual_seed(0)
    answers = Answers(teacher, 2, tmp_path / "answers.bin", 100)
    for step in range(60):
        numbers = torch.randperm(100, generator=torch_rng)[:40]
        x = images(numbers)
        assert torch.equal(answers(x, numbers), Teacher()(x))
        assert len(answers) <= teacher.seen <= len(answers) + 16 * (step + 1)
    assert len(answers) == 100 and teacher.seen < 250
    seen = teacher.seen
    answers(x, numbers)
    assert teacher.seen == seen
    more = numbers + 61
    for numbers in (None, more):
        x, seen = images(more), teacher.seen
        assert torch.equal(answers(x, numbers), Teacher()(x)) and teacher.seen == seen + 40
    assert len(answers) == 100


def test_answers_are_restored_and_later_ones_forgotten(tmp_path):
    path, first, later = tmp_path / "answers.bin", torch.tensor([5, 3, 9]), torch.tensor([4, 5])
    answers = Answers(Teacher(), 2, path, 10)
    answers.flush()
    answers(images(first), first)
    state = answers.state_dict()
    answers.flush()
    answers(images(later), later)
    answers.flush()
    assert state == {"answers": 3} and answers.state_dict() == {"answers": 4}
    teacher = Teacher()
    again = Answers(teacher, 2, path, 10)
    again.load_state_dict(state)
    assert torch.equal(again(images(first), first), Teacher()(images(first))) and not teacher.seen
    other = torch.tensor([1, 2])
    again(images(other), other)
    again.flush()
    last = Answers(teacher := Teacher(), 2, path, 10)
    last.load_state_dict(again.state_dict())
    both = torch.cat([first, other])
    assert torch.equal(last(images(both), both), Teacher()(images(both))) and not teacher.seen
    assert not last.known[4]


@pytest.mark.parametrize("n, size, count", [(10, None, 6), (4, None, 3), (10, 40, 3), (10, None, -1), (10, -1, 3)])
def test_without_their_file_the_teacher_is_asked_again(n, size, count, tmp_path):
    path, numbers = tmp_path / "answers.bin", torch.tensor([5, 3, 9])
    answers = Answers(Teacher(), 2, path, 10)
    answers(images(numbers), numbers)
    answers.flush()
    path.unlink() if size == -1 else path.write_bytes(path.read_bytes()[:size])
    again = Answers(teacher := Teacher(), 2, path, n)
    again.load_state_dict({"answers": count})
    few = torch.tensor([3, 1])
    assert torch.equal(again(images(few), few), Teacher()(images(few))) and teacher.seen == 2
    again.flush()
    assert path.stat().st_size == 2 * again.row_bytes


def test_what_does_not_fit_is_asked_each_time(tmp_path):
    teacher, numbers = Teacher(), torch.tensor([10**12])
    answers = Answers(teacher, 2, tmp_path / "answers.bin", 10**13)
    for _ in range(2):
        answers(images(numbers), numbers)
    answers.flush()
    answers.load_state_dict({"answers": 7})  # of a run that was on another machine before
    assert teacher.seen == 2 and answers.state_dict() == {"answers": 0}


@pytest.mark.parametrize("padding, flip", [(1, True), (2, False), (0, True), (0, False)])
def test_a_form_has_a_number(padding, flip):
    transform = Transform([0.5], [0.5], padding, flip)
    x = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(2000, -1, -1, -1)
    torch.manual_seed(0)
    varied, form = transform.vary(x)
    torch.manual_seed(0)
    assert torch.equal(transform.augment(x), varied)
    pairs = {(number, tuple(image.flatten().tolist())) for number, image in zip(form.tolist(), varied, strict=True)}
    assert {number for number, _ in pairs} == set(range(transform.forms))
    assert len(pairs) == len({image for _, image in pairs}) == transform.forms
    assert Transform([0.5], [0.5], area=0.2).vary(x[:2])[1] is None


def test_a_run_that_remembers_ends_as_one_that_asks(tmp_path, checkpoints, in_double, few_digits, monkeypatch):
    text = "--dataset digits --method fast_meta --teacher resnet8 --student resnet8 --n_epochs 2 --warmup 1 --g_steps 1"
    text += " --ep_steps 20 --kd_steps 20 --batch_size 8 --synthesis_batch_size 8 --ngf 4 --nz 8 --precision fp32"
    found = []
    for name, room in (("remembers", Answers.ROOM), ("asks", 0)):
        monkeypatch.setattr(Answers, "ROOM", room)
        where = "--checkpoints", str(checkpoints), "--out", str(tmp_path / name), "--device", "cpu"
        result = datafree_kd.main(datafree_kd.parse_args([*text.split(), *where]))
        found.append(checkpoint.read(tmp_path / name / result["name"] / "last.pt")["run"]["states"])
        assert not (tmp_path / name / result["name"] / "answers.bin").exists()
    one, other = found
    assert one["answers"]["answers"] == 16  # images of a pool, in one form each
    assert other["answers"]["answers"] == 0
    for key, value in other["student"].items():
        assert torch.allclose(one["student"][key], value, rtol=1e-9, atol=1e-12), key


def test_how_much_of_a_run_is_remembered():
    """Fast-Datafree's proportions, an eighth of its batch: an epoch adds a batch, its student takes 400 steps."""
    batch, forms, epochs, warmup, steps = 32, Transform([0.5], [0.5], 4, True).forms, 55, 5, 400
    known, new = torch.zeros(epochs * batch * forms, dtype=torch.bool), 0
    torch.manual_seed(0)
    for n in range(warmup + 1, epochs + 1):
        passes = torch.cat([torch.randperm(n * batch) for _ in range(-(-steps // n))])
        for rows in passes[: steps * batch].split(batch):
            numbers = rows * forms + torch.randint(forms, rows.shape)
            new += len(rows) - int(known[numbers].sum())
            known[numbers] = True
    assert new / (steps * batch * (epochs - warmup)) == pytest.approx(1 - bench.REMEMBERED, abs=0.01)
