"""Live curves and images on a visdom server, or in a log that it replays later."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

PATIENCE = 10.0  # seconds that a run waits for its server, all in all
PROMPT = 0.25  # seconds: an answer within them is no waiting
ANSWER = 2**16  # bytes: the longest answer of a server


class Visdom:
    """Curves and image grids on a visdom server, or in a log file to replay on one later.

    The package is imported by the first object; where it or the server is missing, that costs one line, never the
    run: a server that answers slowly, endlessly or never takes `PATIENCE` seconds of it, and then the log takes over.

    Args:
        port: the server's, on this machine. env: the environment to draw in: the run's name. path: the log file.
        log: shows people a line. rows: a resumed run's rows of metrics.csv, with which its curves begin.
    """

    def __init__(self, port: int, env: str, path: Path, log: Callable[[str], None], rows: Sequence[dict] = ()):
        self.port, self.env, self.path, self.log = port, env.replace("_", "-"), path, log
        self.rows, self.client = list(rows), None
        self.curves, self.pictures, self.in_log = {}, {}, {}
        try:
            self.Client = self._client_class()
        except Exception as error:  # a broken installation raises nearly anything
            missing = isinstance(error, ModuleNotFoundError) and error.name == "visdom"
            reason = "is not installed" if missing else f"cannot be imported ({type(error).__name__}: {error})"
            log(f"visdom {reason}: no live curves (pip install {'' if missing else '--force-reinstall '}visdom)")
            return
        logging.getLogger("visdom").setLevel(logging.CRITICAL)
        try:
            self.client = self.Client(port=port, env=self.env, raise_exceptions=True, use_incoming_socket=False)
            log(f"live curves: http://localhost:{port}/env/{self.env}")
        except Exception:  # the client raises whatever requests or its sockets do
            start = f"python -m visdom.server -port {port} starts one"
            self._go_offline(f"no visdom server answers at port {port} ({start})")

    @staticmethod
    def _client_class():
        import visdom

        class Client(visdom.Visdom):
            patience = PATIENCE

            def _handle_post(self, url, data=None):
                # A server that trickles bytes keeps each of requests' own time limits: the thread is left to it.
                start, answers = time.monotonic(), []
                thread = threading.Thread(target=self._post, args=(url, data, answers), daemon=True)
                thread.start()
                thread.join(self.patience)
                took = time.monotonic() - start
                self.patience -= took if took > PROMPT else 0
                if not answers or self.patience <= 0:
                    raise ConnectionError("no answer in time")
                return answers[0]

            def _post(self, url, data, answers):
                # visdom itself would ask a proxy for this machine, wait for ever, and take an error page for success.
                self.session.trust_env = False
                options = dict(timeout=PATIENCE, stream=True, allow_redirects=False)
                plain = {"Accept-Encoding": "identity"}
                with contextlib.suppress(Exception), self.session.post(url, data, headers=plain, **options) as answer:
                    content = answer.raw.read(ANSWER + 1)
                    if answer.status_code == 200 and len(content) <= ANSWER:
                        answers.append(content.decode())

        return Client

    def _go_offline(self, reason: str) -> None:
        self.client = self.Client(offline=True, log_to_filename=str(self.path), env=self.env)
        self.log(f"{reason}: curves go to {self.path}, visdom.Visdom(port={self.port}).replay_log(FILE) shows them")
        # What a lost server was shown is lost with it.
        for name in self.curves:
            self._send(self._draw_curve, name)
        for name in self.pictures:
            self._send(self._draw_images, name)

    def _send(self, draw: Callable[[str], None], name: str) -> None:
        if self.client is None:
            return
        try:
            if self.client.offline and self.path.exists() and not self.path.is_file():
                raise OSError("no regular file")  # writing to a pipe may never end
            draw(name)
        except Exception as error:  # neither a server nor a log that went away may end the run
            if not self.client.offline:
                self._go_offline("the visdom server went away")
                return
            self.client = None
            self.log(f"cannot write {self.path} ({getattr(error, 'strerror', None) or error}): no live curves any more")

    def curve(self, name: str, x: int, y: float) -> None:
        """Append the point (x, y) to the window `name`."""
        if name not in self.curves:
            self.curves[name] = [(int(r["epoch"]), float(r[name])) for r in self.rows if r.get(name) is not None]
        self.curves[name].append((x, y))
        self._send(self._draw_curve, name)

    def _draw_curve(self, name: str) -> None:
        # A server gets the whole curve each time: it may hold none of it, another run's, or epochs that were run
        # again. A log has what was written, and grows by the new points.
        start = self.in_log.get(name, 0)
        points = self.curves[name][start:]
        # A lone point shows by its marker only; with markers visdom offers no smoothing.
        opts = dict(xlabel="epoch", markers=len(points) < 30, markersize=4)
        opts["title"] = name if "loss" in name else f"test {name} (%)"
        x, y = [x for x, _ in points], [y for _, y in points]
        self.client.line(y, x, win=name, update="append" if start else None, opts=opts)
        if self.client.offline:
            self.in_log[name] = len(self.curves[name])

    def images(self, name: str, grid: Tensor, title: str) -> None:
        """Show one picture (C, H, W) in 0..1 in the window `name`."""
        self.pictures[name] = (grid, title)
        self._send(self._draw_images, name)

    def _draw_images(self, name: str) -> None:
        grid, title = self.pictures[name]
        height, width = grid.shape[1:]
        scale = 380 / max(height, width)  # about as large as a curve
        opts = dict(title=title, width=round(width * scale), height=round(height * scale))
        self.client.image(grid.numpy(), win=name, opts=opts)
