import hashlib
import os

import pytest

# Imports of torch stand below: the process that hands out the tests of `pytest -n 2` reads this, too, and runs none.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch looks: the work of tests is tiny


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a LeNet-5 and a ResNet-8, which has BatchNorm, quickly trained on the digits,
    as teacher_train.py leaves them."""
    import teacher_train

    out = tmp_path_factory.mktemp("teacher")
    folder = out / "checkpoints"
    for model, epochs in (("lenet5", "3"), ("resnet8", "1")):
        flags = ["--dataset", "digits", "--model", model, "--n_epochs", epochs, "--checkpoints", folder, "--out", out]
        teacher_train.main(teacher_train.parse_args(flags))
    return folder


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs commands in processes of their own, without the seconds that an interpreter's imports take."""
    import storm

    server = storm.Server(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Runs draw no accuracy.png, a tenth of their time, but for those of commands and of fixtures of a wider scope."""
    monkeypatch.setattr("datafree.run.plot_accuracy", lambda *_: None)


@pytest.fixture(scope="module")
def few_digits():
    """`storm.few_digits` in place of all."""
    import storm

    import data

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "digits", storm.few_digits())
        yield


@pytest.fixture
def in_double(monkeypatch):
    """Scripts compute in float64: in float32 gradients differ by 1e-5, and a generator's Adam makes more of it."""
    import torch

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def refused(capsys):
    """Run a script's command line; check that it ends in one line and code 2, and return it."""
    from datafree.cli import cli

    def run(script, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli(script.main, lambda: script.parse_args(argv))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.endswith("\n"), error
        return error

    return run


@pytest.fixture(scope="session")
def contents():
    """The SHA-256 of every file below a folder, by its path."""

    def read(folder):
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return read
