"""A network that leaves: normalisation inside, as safetensors, ONNX and int8 ONNX; its size, work and time."""

import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datafree.errors import UsageError

ONNX_TOOLS = "onnx onnxscript onnxruntime".split()
OPSET = 20
TOLERANCE = 1e-3  # between the logits of PyTorch and of ONNX


def missing(packages: Sequence[str]) -> str:
    """Which of these packages are not installed and how to get them, in words; empty if all are there."""
    lacking = [name for name in packages if find_spec(name) is None]
    if not lacking:
        return ""
    return f"{' and '.join(lacking)} missing: pip install -r requirements-export.txt"


class Deployed(nn.Module):
    """A frozen network in eval mode with its normalisation: pixels (N, C, H, W), uint8 or float in 0..1, to logits."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return self.network((x - self.mean) / self.std)


class OnnxNetwork(nn.Module):
    """An ONNX file's content as a network on the CPU, by onnxruntime, with as many threads as PyTorch has.

    It takes pixels (N, C, H, W), uint8, or what the file takes.
    """

    def __init__(self, content: bytes):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]

    def forward(self, pixels: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {self.input.name: _as_input(pixels, "uint8" in self.input.type)})
        return torch.from_numpy(logits).to(pixels.device)


def _as_input(pixels: Tensor, as_bytes: bool):
    pixels = pixels.cpu().contiguous()
    return (pixels if as_bytes or pixels.is_floating_point() else pixels.float() / 255).numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print and log; what goes wrong is raised."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def to_safetensors(state: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """A safetensors file of a state dict; `metadata` as text."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    return save(tensors, {k: str(v) for k, v in metadata.items()})


def to_onnx(model: Deployed, pixels: Tensor) -> tuple[bytes, float]:
    """An ONNX file's content of a network on the CPU, for any batch size, and how far it is from PyTorch's logits.

    Args:
        pixels: (N, C, H, W) to compare the two on, uint8, or float in 0..1: what the file is to take.

    Returns:
        The content, and the largest difference of a logit, as a share of the largest one where that is above 1.

    Raises:
        UsageError: the network cannot be traced, or they differ by more than TOLERANCE.
    """
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with _quiet():
            program = torch.onnx.export(
                model, (pixels[:2],), dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, verbose=False,
                input_names=["pixels"], output_names=["logits"],
            )  # fmt: skip
    except Exception as error:  # whatever a forward of the user's and the exporter raise
        what = next(filter(None, str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise UsageError(f"this network cannot be written as ONNX ({what}): rewrite what it names") from error
    content = program.model_proto.SerializeToString()
    with torch.no_grad():
        logits = model(pixels)
    difference = ((OnnxNetwork(content)(pixels) - logits).abs().max() / logits.abs().max().clamp_min(1)).item()
    if not difference <= TOLERANCE:
        text = f"its ONNX logits differ by {difference:.1e} from PyTorch's, more than {TOLERANCE}"
        raise UsageError(f"{text}: the network does something that ONNX does not, look at its forward")
    return content, difference


def to_int8(content: bytes, pixels: Tensor) -> bytes:
    """An ONNX file's content, quantised after training: QDQ, int8 weights per channel, int8 activations.

    Args:
        pixels: uint8 (N, C, H, W); the activations' ranges are the smallest and largest values on them.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    known = OnnxNetwork(content).input
    batches = iter([{known.name: _as_input(part, "uint8" in known.type)} for part in pixels.split(64)])

    class Batches(CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, prepared, small = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "small"))
        plain.write_bytes(content)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # merges BatchNorm into convolutions
        kinds = dict(activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
        quantize_static(prepared, small, Batches(), per_channel=True, **kinds)  # QDQ is its default
        return small.read_bytes()


def multiply_adds(network: nn.Module, x: Tensor) -> int:
    """Multiplications (each with an addition) of convolutions and matrix products for one image x (1, C, H, W)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a block of attention, whose work is not counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def parameters(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in network.parameters())


@torch.inference_mode()
def latencies(networks: Mapping[str, nn.Module], pixels: Tensor, seconds: float = 10.0) -> dict[str, float]:
    """Milliseconds of a forward pass of `pixels` by each network, the median of up to 100 that are made in turn."""
    times, begun = {name: [] for name in networks}, time.perf_counter()
    for turn in range(103):
        for name, network in networks.items():
            start = time.perf_counter()
            network(pixels)
            times[name].append(1000 * (time.perf_counter() - start))
        if turn >= 7 and time.perf_counter() - begun > seconds:
            break
    return {name: statistics.median(values[3:]) for name, values in times.items()}  # the first ones warm up
