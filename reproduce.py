"""Every published cell by one command.

    bash scripts/reproduce.sh --list                 # all cells: name, published value, command
    bash scripts/reproduce.sh dafl-13 --dry-run      # the commands of one cell, teacher first
    bash scripts/reproduce.sh dafl-13                # runs them; again after an interruption
    bash scripts/reproduce.sh dafl-13 --seed 1 --tag seed1        # more flags for the last command

Cells are the rows of results/paper_tables.csv, named after their source and counted in its order.
A teacher whose file is in checkpoints/ is not trained again. Runs that were stopped are resumed.
Data sets are expected, or downloaded, in ./datasets (--data_root elsewhere): ImageNet and
Places365 as datasets/imagenet and datasets/places365. `compare.py` puts what came out beside the
published values.
"""

import csv
import difflib
import importlib
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from datafree.checkpoint import teacher_file
from datafree.published import DATASETS, NETWORKS, SCRATCH, TABLES
from datafree.runtime import Parser, UsageError, cli

SOURCES = {
    "DAFL": "dafl",
    "DFND": "dfnd",
    "DFAD": "dfad",
    "MMRazor DFAD": "mmrazor",
    "MMRazor DAFL": "mmrazor",
    "Fast-Datafree": "fast",
}
RECIPES = {  # of teachers and students from scratch, by source and data set
    ("dafl", "mnist"): "dafl-mnist",
    ("dfad", "mnist"): "dfad-mnist",
    ("dafl", "cifar"): "dafl",
    ("dfnd", "cifar"): "dafl",
    ("dfad", "cifar"): "dfad",
    ("fast", "cifar"): "fast",
    ("mmrazor", "cifar"): "fast",
    ("dfad", "caltech101"): "dfad-caltech101",
    ("dafl", "celeba"): "celeba",
    ("fast", "imagenet"): "imagenet",
}
# Related and unrelated transfer sets. The tables do not name DFAD's: these are our choice.
RELATED = {
    "mnist": "svhn",
    "cifar10": "cifar100",
    "cifar100": "cifar10",
    "caltech101": "datasets/stl10",
    "camvid": "datasets/cityscapes",
    "nyuv2": "datasets/sunrgbd",
}
UNRELATED = {
    "mnist": "cifar10",
    "cifar10": "svhn",
    "cifar100": "svhn",
    "caltech101": "celeba",
    "camvid": "datasets/voc2012",
    "nyuv2": "datasets/voc2012",
}
DFAD = {
    "mnist": "DFAD_mnist.py",
    "cifar10": "DFAD_cifar.py",
    "cifar100": "DFAD_cifar.py",
    "caltech101": "DFAD_caltech101.py",
    "camvid": "DFAD_camvid_deeplab.py",
    "nyuv2": "DFAD_nyu_deeplab.py",
}
FAST = {
    "DAFL": "dafl",
    "ZSKT": "zskt",
    "DFQ": "dfq",
    "DeepInv-2k": "deepinv",
    "CMI-500": "cmi",
    "DeepInversion": "deepinv",
}
WITHOUT = {
    "Meta data": "another paper's method (Lopes et al. 2017), which needs the teacher's activation "
    "statistics",
    "PU-compression": "another paper's method (Xu et al. 2019), which needs some of the data",
    "Generative DFD": "another paper's method (Luo et al. 2020)",
    "(row describes another algorithm, WSLD)": "not data-free: another algorithm's row",
}


@dataclass(frozen=True)
class Cell:
    """A published value: a row of paper_tables.csv.

    name: source and number. row: the table's columns. dataset, teacher, student: registry names.
    script, flags: its command; script is None where there is none, and `reason` says why.
    prepare: the commands before it, each a script and flags, with the file that they make.
    """

    name: str
    row: dict
    dataset: str
    teacher: str
    student: str
    script: str | None
    flags: tuple = ()
    prepare: tuple = ()
    reason: str = ""

    @property
    def command(self):
        return shlex.join(["python", self.script, *self.flags]) if self.script else None

    def args(self):
        """The parsed flags of the command: what a run of this cell has in its result.json."""
        module = importlib.import_module(self.script.removesuffix(".py"))
        return vars(module.parse_args(list(self.flags)))


def registry_name(paper_name, dataset):
    """The registry's name of a network as a table calls it."""
    names = [name for name, known in NETWORKS.items() if paper_name in known]
    if len(names) > 1:
        large = dataset in ("Caltech101", "ImageNet")
        names = [name for name in names if name.endswith("_imagenet") == large]
    return names[0]


def cells():
    """All cells, in the order of paper_tables.csv."""
    numbers, found = {}, []
    datasets = {paper: name for name, paper in DATASETS.items()}
    with TABLES.open(newline="") as file:
        for row in csv.DictReader(file):
            source = SOURCES[row["source"]]
            numbers[source] = numbers.get(source, 0) + 1
            dataset = datasets[row["dataset"]]
            teacher, student = (registry_name(row[role], row["dataset"]) for role in ("teacher", "student"))
            script, flags, prepare, reason = recipe(source, row["method"], dataset, teacher, student)
            found.append(
                Cell(
                    f"{source}-{numbers[source]:02}",
                    row,
                    dataset,
                    teacher,
                    student,
                    script,
                    tuple(flags),
                    tuple(prepare),
                    reason,
                )
            )
    return found


def recipe(source, method, dataset, teacher, student):
    """Script, flags, commands before it, and the reason if there is no script."""
    pair = ["--teacher", teacher, "--student", student]
    data = ["--dataset", dataset]
    segmentation = dataset in ("camvid", "nyuv2")

    def classifier(model):
        if segmentation:
            return "teacher_train_seg.py", [*data, "--model", model]
        kind = "cifar" if dataset.startswith("cifar") else dataset
        return "teacher_train.py", [*data, "--model", model, "--recipe", RECIPES[source, kind]]

    if method == "Teacher":
        return *classifier(teacher), (), ""
    if method in (*SCRATCH, "Scratch"):
        return *classifier(student), (), ""
    if method in WITHOUT:
        return None, (), (), WITHOUT[method]
    if segmentation and method == "DAFL":
        return None, (), (), "the paper gives no setting of DAFL for segmentation"

    make = classifier(teacher)
    if dataset == "imagenet":
        make = make[0], [*make[1], "--pretrained"]
    prepare = ((*make, teacher_file("checkpoints", dataset, teacher)),)
    transfer = {
        "KD original data": "original",
        "KD-ORI": "original",
        "KD": "original",
        "Random noise (normal distribution)": "noise",
        "RANDOM": "noise",
        "KD alternative data (USPS)": "usps",
        "Places365+KD": "datasets/places365",
        "KD alternative data (similar)": RELATED.get(dataset),
        "KD-REL": RELATED.get(dataset),
        "KD-UNR": UNRELATED.get(dataset),
    }.get(method)
    if transfer:
        labels = ["--alpha", "0.9", "--beta", "0.1"] if method == "KD" else []
        script = "vanilla_kd_seg.py" if segmentation else "vanilla_kd.py"
        return script, [*data, *pair, "--transfer_set", transfer, *labels], prepare, ""
    if method in ("DFND", "Random wild images"):
        selection = ["--selection", "random"] if method != "DFND" else []
        return "DFND_train.py", [*data, *pair, "--wild", "datasets/imagenet/train", *selection], prepare, ""
    if dataset == "imagenet" and method == "Fast-50":
        return "datafree_kd_imagenet.py", pair, prepare, ""
    if method.startswith("Fast-"):
        return (
            "datafree_kd.py",
            [*data, *pair, "--method", "fast_meta", "--g_steps", method.removeprefix("Fast-")],
            prepare,
            "",
        )
    if method in FAST and (source == "fast" or method == "DeepInversion"):
        return "datafree_kd.py", [*data, *pair, "--method", FAST[method]], prepare, ""
    variant = ["--variant", "mmrazor"] if source == "mmrazor" else []
    script = "DAFL_train.py" if method == "DAFL" else DFAD[dataset]
    return script, [*([] if segmentation else data), *pair, *variant], prepare, ""


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("cell", nargs="?", help="its name, as --list prints it")
    p.add_argument("--list", action="store_true", help="print all cells and their commands")
    p.add_argument("--dry-run", action="store_true", help="print the cell's commands, run nothing")
    p.add_argument(
        "--data_root",
        "--data",
        metavar="DIR",
        help="where the data sets are, for all of the cell's commands (default: ./datasets)",
    )
    args, args.flags = p.parse_known_args(argv)
    if not args.list and args.cell is None:
        p.error("name a cell, or give --list")
    if args.flags and args.list:
        p.error(f"--list takes no other flags: {' '.join(args.flags)}")
    return args


def show_list():
    """Print each table's heading and its cells."""
    heading = None
    for cell in cells():
        row = cell.row
        if heading != (heading := f"{row['source']}, {row['table']}"):
            print(f"\n# {heading}" if cell.name != "dafl-01" else f"# {heading}")
        print(
            f"{cell.name:11}{row['value']:>7}  {row['dataset']:10} {row['method'][:34]:34} "
            f"{cell.teacher} -> {cell.student}:  {cell.command or 'none: ' + cell.reason}"
        )


def find(name):
    """The cell of this name. Raises UsageError if there is none, or it has no command."""
    known = {cell.name: cell for cell in cells()}
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        raise UsageError(
            f"no cell '{name}'"
            + (f", did you mean {' or '.join(close)}?" if close else ":")
            + " --list prints all"
        )
    if known[name].script is None:
        raise UsageError(f"cell {name} has no command: {known[name].reason}")
    return known[name]


def main(args):
    """List, show or run; returns the commands that were, or would be, run."""
    if args.list:
        return show_list()
    cell = find(args.cell)
    root = ["--data_root", args.data_root] if args.data_root else []
    commands = []
    for script, flags, target in cell.prepare:
        if Path(target).exists():
            print(f"# {target} is there already")
        else:
            commands.append([script, *flags, *root, "--resume"])
    commands.append([cell.script, *cell.flags, *args.flags, *root, "--resume"])
    for command in commands:
        print(shlex.join(["python", *command]), flush=True)
        if not args.dry_run:
            here = Path(__file__).resolve().parent
            code = subprocess.run([sys.executable, here / command[0], *command[1:]]).returncode
            if code:
                sys.exit(code)
    return commands


if __name__ == "__main__":
    cli(main, parse_args)
