"""Writes README.md beside it from the card.json files there and in whole/:   python results/compress/table.py"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGES = ("noise", "synthetic images", "real images")
WORDS = dict(zip(("noise", "synthetic"), IMAGES, strict=False))


def grid(rows: list[list[str]]) -> str:
    """Rows, the first of them titles, as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def distilled(folder: Path = HERE) -> str:
    """The commands from a teacher's file to a small network, and what came out."""
    rows = [["teacher", "its file", "data", "teacher", "student", "in float32", "in int8", "agrees on images made",
             "parameters", "bytes in int8", "epochs x steps", "of the recipe", "minutes"]]  # fmt: skip
    for path in sorted((folder / "whole").glob("*.json")):
        card = json.loads(path.read_text())
        nets, made = card["networks"], card["made"]
        score = {n: f"{nets[n]['accuracy']:.2f} ± {nets[n]['standard_error']:.2f}" for n in nets}
        parts = (f"{nets[n]['parameters']:,}" for n in ("teacher", "student"))
        rows.append([
            card["teacher"], card["teacher_weights"]["file"], f"{card['dataset']}, {card['test_images']:,} test images",
            score["teacher"], f"{card['student']}, by {made['method']}", score["student"], score["student.int8.onnx"],
            f"{nets['student']['agreement']:.1f}", " to ".join(parts), f"{card['bytes']['student.int8.onnx']:,}",
            f"{made['n_epochs']} x {made['steps']}", f"{made['share_of_recipe']:.1%}", f"{made['seconds'] / 60:.0f}",
        ])  # fmt: skip
    return grid(rows)


def table(folder: Path = HERE) -> str:
    """The page: int8 accuracy of each network by what its ranges were measured on, and what that says of noise."""
    cards = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    groups = {}
    for card in cards:
        on = WORDS.get(card["calibrated_on"], "real images")
        groups.setdefault((card["teacher"], card["dataset"]), {}).setdefault(on, []).append(card)
    head = ["network", "data", "float32", *(f"int8, {on}" for on in IMAGES), "ms: PyTorch, ONNX, int8"]
    rows, remarks = [head], []
    for (network, dataset), by in groups.items():
        means, cells, errors = {}, [], []
        for on in IMAGES:
            scores = [card["networks"]["student.int8.onnx"]["accuracy"] for card in by.get(on, ())]
            if scores:
                means[on] = statistics.fmean(scores)
                errors.append(by[on][0]["networks"]["student.int8.onnx"]["standard_error"])
            spread = f", {min(scores):.2f} to {max(scores):.2f}" if len(scores) > 1 else ""
            cells.append(f"{means[on]:.2f} ({len(scores)}{spread})" if scores else "not run")
        every = [card for group in by.values() for card in group]
        exact = every[0]["networks"]["teacher"]
        times = [statistics.median(c["networks"][n]["milliseconds"] for c in every)
                 for n in ("teacher", "student.onnx", "student.int8.onnx")]  # fmt: skip
        first = f"{exact['accuracy']:.2f} ± {exact['standard_error']:.2f}"
        tested = f"{dataset}, {every[0]['test_images']:,} test images"
        rows.append([network, tested, first, *cells, ", ".join(f"{t:.2f}" for t in times)])
        if {"noise", "synthetic images"} <= means.keys():
            gain = means["synthetic images"] - means["noise"]
            side, error = "ahead of" if gain > 0 else "behind", max(errors)
            clear = "" if abs(gain) > 2 * error else ", so that this may be chance"
            remarks.append(
                f"- {network}: synthetic images are {abs(gain):.2f} points {side} noise; a standard error is "
                f"{error:.2f}{clear}."
            )
    fewer = {}
    for path in sorted((folder / "ten_rounds").glob("*.json")):
        card = json.loads(path.read_text())
        score = f"{card['networks']['student.int8.onnx']['accuracy']:.2f}"
        fewer.setdefault(card["teacher"], []).append(score)
    ended = ", ".join(f"{network}'s at {', '.join(scores)}" for network, scores in fewer.items())
    remarks.append(
        "- The synthetic images are those of the last four of sixteen rounds. After ten rounds seeds ended lower and "
        f"further apart: {ended} (`ten_rounds/`)."
    )
    hardware = " and ".join(sorted({card["hardware"] for card in cards}))
    text = [
        "# A network in int8, its ranges measured without its data",
        "`compress.py --student same --int8 --calibrate_on ...`, 512 images each; the cards beside this page have the "
        "commands, and `python results/compress/table.py` writes it from them.",
        grid(rows),
        "Accuracy in percent: float32 ± its standard error by the number of test images; int8 as the mean over seeds "
        "(how many, from the lowest to the highest). Milliseconds of one image: medians, in turn in one process, "
        f"{hardware}, shared with other work: compare them within a row.",
        "\n".join(remarks),
        "# Other people's classifiers, made small without their data",
        "`compress.py --minutes 30 --int8 ...` from the teacher's file to ONNX and int8; the cards in `whole/` have "
        "the commands. The recipe's length is measured and cut to half an hour of two quiet cores; the minutes "
        "are those that went by while other work shared them, or stopped the run. One seed; the last epoch.",
        distilled(folder),
        "What the students learnt from: ![CIFAR-10](whole/cifar10.png) ![MNIST](whole/mnist.png)",
    ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(table())
