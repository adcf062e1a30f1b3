"""Curves and images reach a real visdom server, and a missing one costs a line, never the run."""

import base64
import contextlib
import csv
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

import DAFL_train
import teacher_train
from datafree import visdom
from datafree.run import Run
from datafree.visdom import Visdom

# visdom's client warns of itself in several ways; none of it is ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:visdom")


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


class Server:
    """A visdom server in its own process, without the web page's scripts, which it downloads."""

    # It has no use for torch, whose import takes seconds.
    CODE = "import sys; sys.modules['torch'] = None; from visdom.server.run_server import main; main()"

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, "-port", str(self.port), "-env_path", str(self.folder), "-bind_local"],
            env={**os.environ, "HOME": str(self.folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, "the server ended at once"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def stop(self):
        self.process.kill()
        self.process.wait()

    def client(self):
        import visdom

        return visdom.Visdom(port=self.port, raise_exceptions=True, use_incoming_socket=False)

    def windows(self, folder):
        """The windows of a run, by their names."""
        return json.loads(self.client().get_window_data(env=environment(folder)))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("visdom", reason="visdom is not installed")
    server = Server(tmp_path_factory.mktemp("visdom"))
    try:
        yield server.start()
    finally:
        server.stop()


def environment(folder):
    return folder.name.replace("_", "-")


def train(out, port, tag, *argv, script=teacher_train):
    """A short run on the digits; returns its folder."""
    common = ("--dataset", "digits", "--out", out, "--checkpoints", out, "--visdom", port, "--tag", tag)
    return out / script.main(script.parse_args([*common, *argv]))["name"]


def points(window):
    (line,) = window["content"]["data"]
    return list(zip(line["x"], line["y"], strict=True))


def recorded(folder, column):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(r["epoch"]), float(r[column])) for r in csv.DictReader(file)]


def check_curves(windows, folder, epochs):
    """Each column of metrics.csv is a window, with the epochs 1 to `epochs` once each."""
    for name in ("accuracy", "loss"):
        assert [x for x, _ in points(windows[name])] == list(range(1, epochs + 1))
        assert points(windows[name]) == recorded(folder, name)
        layout = windows[name]["content"]["layout"]
        assert layout["xaxis"]["title"] == "epoch" and layout["title"] == windows[name]["title"]
    assert windows["accuracy"]["title"] == "test accuracy (%)"


def test_curves_and_images(server, checkpoints, tmp_path, monkeypatch):
    # Proxies know another localhost: the client has to leave this one alone.
    with monkeypatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        short = ("--n_epochs", 2, "--iterations", 2, "--batch_size", 16, "--sample_every", 1)
        flags = ("--checkpoints", checkpoints, *short)
        folder = train(tmp_path, server.port, "curves", *flags, script=DAFL_train)
    assert f"localhost:{server.port}/env/{environment(folder)}\n" in (folder / "log.txt").read_text()
    windows = server.windows(folder)
    losses = {"loss_oh", "loss_a", "loss_ie", "loss_G", "loss_kd"}
    assert set(windows) == {"accuracy", "samples"} | losses
    for name in {"accuracy"} | losses:
        assert len(points(windows[name])) == 2
        assert points(windows[name]) == recorded(folder, name)
    assert windows["samples"]["type"] == "image"
    assert windows["samples"]["title"] == "samples epoch0002"
    shown = base64.b64decode(windows["samples"]["content"]["src"].split(",")[1])
    shown = np.array(Image.open(io.BytesIO(shown))).astype(int)
    saved = np.array(Image.open(folder / "samples/epoch0002.png")).astype(int)
    assert shown.shape == saved.shape and abs(shown - saved).max() <= 1
    assert not (folder / "visdom.log").exists()


def test_resumed_run_has_each_epoch_once(server, tmp_path):
    folder = train(tmp_path, server.port, "again", "--n_epochs", 2)
    check_curves(server.windows(folder), folder, 2)
    folder = train(tmp_path, server.port, "again", "--n_epochs", 3, "--resume")
    check_curves(server.windows(folder), folder, 3)
    server.client().delete_env(environment(folder))  # now the server knows nothing of the run
    folder = train(tmp_path, server.port, "again", "--n_epochs", 4, "--resume")
    check_curves(server.windows(folder), folder, 4)
    folder = train(tmp_path, server.port, "again", "--n_epochs", 4)  # another run of the same name
    check_curves(server.windows(folder), folder, 4)


def test_no_server(server, tmp_path):
    port = free_port()
    folder = train(tmp_path, port, "offline", "--n_epochs", 2)
    (line,) = [s for s in (folder / "log.txt").read_text().splitlines() if "visdom" in s]
    assert f"no visdom server answers at port {port}" in line
    assert str(folder / "visdom.log") in line
    server.client().replay_log(folder / "visdom.log")
    check_curves(server.windows(folder), folder, 2)
    folder = train(tmp_path, port, "offline", "--n_epochs", 3, "--resume")
    server.client().replay_log(folder / "visdom.log")
    check_curves(server.windows(folder), folder, 3)


def test_server_restarts_and_dies(server, tmp_path, monkeypatch):
    other = Server(tmp_path).start()
    end_epoch = Run.end_epoch

    def interfere(run, epoch, *args, **more):
        end_epoch(run, epoch, *args, **more)
        if epoch == 0:
            other.stop()
            other.start()
        elif epoch == 1:
            check_curves(other.windows(run.folder), run.folder, 2)
            other.stop()

    monkeypatch.setattr(Run, "end_epoch", interfere)
    try:
        folder = train(tmp_path, other.port, "died", "--n_epochs", 4)
    finally:
        other.stop()
    (line,) = [s for s in (folder / "log.txt").read_text().splitlines() if "visdom.log" in s]
    assert line.startswith("the visdom server went away")
    server.client().replay_log(folder / "visdom.log")
    check_curves(server.windows(folder), folder, 4)


def test_another_program_at_the_port(server, tmp_path):
    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    other, lines = HTTPServer(("127.0.0.1", 0), Refuse), []
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        Visdom(other.server_port, "run", tmp_path / "visdom.log", lines.append)
    finally:
        other.shutdown()
        other.server_close()
    (line,) = lines
    assert line.startswith("no visdom server answers")


@contextlib.contextmanager
def talking(talk):
    """The port of a server that accepts, reads, and does `talk(connection)` until it is shut."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=server.accept()[:1], daemon=True).start()

    def one(connection):
        with connection, contextlib.suppress(OSError):
            while connection.recv(2**16):
                talk(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


def trickle(connection):
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 500:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def flood(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(2**16))


def answer_late(connection):
    time.sleep(0.06)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue")


@pytest.mark.parametrize("talk", [lambda connection: None, trickle, flood, answer_late])
def test_waiting_for_a_server_is_bounded(tmp_path, monkeypatch, talk):
    pytest.importorskip("visdom", reason="visdom is not installed")
    monkeypatch.setattr(visdom, "PATIENCE", 0.5)
    monkeypatch.setattr(visdom, "PROMPT", 0.05)
    lines, start, path = [], time.monotonic(), tmp_path / "visdom.log"
    with talking(talk) as port:
        board = Visdom(port, "run", path, lines.append)
        for epoch in range(1, 41):
            board.curve("loss", epoch, 1 / epoch)
    assert time.monotonic() - start < 20
    assert [str(path) in line for line in lines] in ([True], [False, True])
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x for _, message in logged for x in message["data"][0]["x"]] == list(range(1, 41))


@pytest.mark.parametrize("vanish", ["folder", "pipe", "full"])
def test_log_that_cannot_be_written(tmp_path, vanish):
    pytest.importorskip("visdom", reason="visdom is not installed")
    (tmp_path / "run").mkdir()
    lines, path = [], tmp_path / "run" / "visdom.log"
    board = Visdom(free_port(), "run", path, lines.append)
    board.curve("loss", 1, 0.5)
    path.unlink()
    if vanish == "folder":
        path.parent.rmdir()
    elif vanish == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full")
    for epoch in range(2, 5):
        board.curve("loss", epoch, 0.5)
    (said,) = lines[1:]
    assert said.startswith(f"cannot write {path} (") and "no live curves any more" in said


def test_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "visdom", None)
    folder = train(tmp_path, 1, "without", "--n_epochs", 1)
    (line,) = [s for s in (folder / "log.txt").read_text().splitlines() if "visdom" in s]
    assert line.startswith("visdom is not installed")
    assert (folder / "result.json").exists() and not (folder / "visdom.log").exists()


def test_installed_and_broken(tmp_path, monkeypatch):
    (tmp_path / "visdom.py").write_text("raise ValueError('built for another Python')")
    monkeypatch.delitem(sys.modules, "visdom", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    lines = []
    Visdom(1, "run", tmp_path / "visdom.log", lines.append).curve("loss", 1, 0.5)
    (line,) = lines
    assert "ValueError: built for another Python" in line and "--force-reinstall visdom" in line


def test_imported_only_when_asked_for(tmp_path, forks):
    (tmp_path / "imported.py").write_text("import sys; print(*{'DAFL_train', 'visdom'} & {*sys.modules})")
    assert forks.run(tmp_path / "imported", []).stdout == "DAFL_train\n"
