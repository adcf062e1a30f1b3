"""What is known of a compressed network: scores, sizes and times of what it is now, and its README.md."""

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor, nn
from tqdm import tqdm

from data import Dataset
from datafree.export import ONNX_TOOLS, latencies, multiply_adds, parameters
from datafree.metrics import agreement, classification_scores, standard_error
from datafree.runtime import Runtime


def measure(networks: Mapping[str, nn.Module], data: Dataset, unseen: Tensor) -> dict[str, dict]:
    """Scores in percent, size, work and time of networks, uint8 pixels -> logits, in float32.

    Args:
        networks: by name; one is the "teacher", and those of ONNX files have ".onnx" in their names.
        data: whose test images, if it has any, tell the accuracy. unseen: images uint8 (N, C, H, W) for the agreement.
    """
    exact, facts = Runtime(unseen.device, "fp32"), {}
    for name, network in tqdm(networks.items(), "scores", leave=False, disable=None):
        facts[name] = {"agreement": agreement(network, networks["teacher"], unseen.split(250), exact)}
        if data.test is not None:
            score = classification_scores(network, data, lambda pixels: pixels, exact)["Acc@1"]
            facts[name] |= {"accuracy": score, "standard_error": standard_error("Acc@1", score, data)}
    one = unseen[:1].cpu()
    local = {name: deepcopy(network).cpu() for name, network in networks.items() if ".onnx" not in name}
    for name, network in local.items():
        facts[name] |= {"parameters": parameters(network), "multiply_adds": multiply_adds(network, one)}
    for name, milliseconds in latencies({**networks, **local}, one).items():
        facts[name]["milliseconds"] = milliseconds
    return facts


def versions() -> dict[str, str]:
    """The versions of what is installed of what writes and runs the files."""
    installed = {}
    for name in ("torch", *ONNX_TOOLS, "safetensors"):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def describe(card: Mapping) -> str:
    """The README.md of a folder that compress.py wrote, from the content of its card.json."""
    same, tested = card["student"] == "same", bool(card["test_images"])
    title = f"{card['teacher']}" if same else f"{card['student']}, which learnt from {card['teacher']} without its data"
    head = ["network", "file", "parameters", "multiply-adds", "ms an image", "agreement"]
    head += ["accuracy on {test_images:,} {dataset} test images".format(**card)] * tested
    rows = [head, ["---"] * len(head)]
    for name, facts in card["networks"].items():
        file = "student.pt" if name == "student" else name
        size = f"{card['bytes'][file] / 2**20:.2f} MiB" if file in card["bytes"] else ""
        work = (f"{facts[key]:,}" if key in facts else "" for key in ("parameters", "multiply_adds"))
        rows.append([name, size, *work, f"{facts['milliseconds']:.2f}", f"{facts['agreement']:.1f} %"])
        rows[-1] += ["{accuracy:.2f} ± {standard_error:.2f} %".format(**facts)] if tested else []
    text = [f"# {title}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    text.append(
        f"Milliseconds: the median of passes of one image, made in turn, on {card['hardware']}. Agreement: how often a "
        "network puts synthetic images, which it has not seen, into the teacher's class; that is no accuracy."
        + " ±: the standard error by the number of images."
        * tested
    )
    if made := card["made"]:
        text.append(
            f"The student was made by {made['method']}: {made['n_epochs']} epochs of {made['steps']} steps, "
            f"{made['share_of_recipe']:.2%} of the recipe's length, {made['generated_images']:,} images, "
            f"{made['seconds']:.0f} s. `{made['run']}/` is that run; --minutes makes it longer."
        )
    if "student.int8.onnx" in card["bytes"]:
        text.append(f"The ranges of student.int8.onnx were measured on: {card['calibrated_on']}.")
    channels, side, _ = card["image"]
    takes, norm = f"(N, {channels}, {side}, {side})", f"mean {card['mean']} and std {card['std']}"
    if "student.onnx" in card["bytes"]:
        kind = "float32 in 0..1" if card["onnx_input"] == "float" else "uint8"
        text.append(
            f"What ends in .onnx (opset {card['opset']}) takes `pixels` {takes}, {kind}, any number N, and gives "
            f"`logits` (N, {card['classes']}); {norm} are inside. The other files take images normalised by these."
        )
    else:
        text.append(f"The files take images {takes}, pixels in 0..1 normalised by {norm}.")
    text += [
        "![images of the classes](teacher_check.png) ![synthetic images](images.png)",
        f"*First: what the teacher takes for its classes after {card['check']['steps']} steps. Second: what a "
        "student learns from.*",
        f"Made by\n\n```\n{card['command']}\n```",
        "Licence: what learnt from a network is derived from it and from its data, whose licences say what may be done "
        "with these files. The scripts that made them are under Apache 2.0.",
    ]
    return "\n\n".join(text) + "\n"
