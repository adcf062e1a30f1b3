"""The home of the published cells: what each says, and the command that runs it.

A cell is a row of results/paper_tables.csv, named after its paper and counted in the table's order ("fast-53"). Its
command is a script and flags; the script's parser turns them into the run's name and settings. `reproduce.py` runs
cells, `compare.py` puts the records of runs beside them, and the scripts print what is published for a run. The rows of
the benchmark benchmarks/dfd10.csv are cells, too, of which nothing is published.
"""

import csv
import difflib
import functools
import importlib
import json
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data import SEGMENTATIONS, SOURCES
from datafree.cli import FREE
from datafree.errors import UsageError
from datafree.teachers import recipe_for

ROOT = Path(__file__).resolve().parent
TABLES, BENCHMARK = ROOT / "results" / "paper_tables.csv", ROOT / "benchmarks" / "dfd10.csv"
# What bench_rates.py found, and how many times a row's own rate it tries.
RATES, FACTORS = BENCHMARK.with_name("rates.csv"), (3.0, 1.0, 0.3, 0.1)
# The benchmark's teachers, which ship, and students, in the tables' names.
TRACKS = {"mnist": ("LeNet-5", "LeNet-5-HALF", "dafl-mnist"), "cifar10": ("WRN40-2", "WRN16-1", "fast")}
PAPERS = {"DAFL": "dafl", "DFND": "dfnd", "DFAD": "dfad", "MMRazor DFAD": "mmrazor", "MMRazor DAFL": "mmrazor",
          "MMRazor ZSKT": "mmrazor", "Fast-Datafree": "fast", "NAYER": "nayer"}  # fmt: skip
# By how many points a run with a cell's own flags may fall short of its value and still count as reproduced.
MARGIN = 1.0
# What the papers call the networks; the ImageNet forms go by the same names.
NETWORKS = {
    "LeNet-5": "lenet5", "LeNet-5-HALF": "lenet5_half", "HintonNet (2x1200 MLP)": "hintonnet",
    "2x800 MLP": "hintonnet_half", "AlexNet": "alexnet", "AlexNet-half": "alexnet_half",
    "ResNet-18 (cifar)": "resnet18", "ResNet-34 (cifar)": "resnet34", "ResNet-18": "resnet18", "ResNet-34": "resnet34",
    "ResNet-50": "resnet50", "MobileNetv2": "mobilenetv2", "VGG-11": "vgg11", "WRN16-1": "wrn16_1",
    "WRN16-2": "wrn16_2", "WRN40-1": "wrn40_1", "WRN40-2": "wrn40_2",
    "DeepLabv3-ResNet-50 (ImageNet)": "deeplabv3_resnet50", "DeepLabv3-MobileNetv2": "deeplabv3_mobilenet",
}  # fmt: skip
# Whose recipe trained the teachers where a paper has none of its own.
TEACHERS_OF = {"dfnd": "dafl", "mmrazor": "fast"}
SCRATCH = ("Student scratch", "Student", "Scratch")
# Related and unrelated transfer sets, below --data_root where they are no data set: the tables do not name DFAD's.
TRANSFER = {
    "mnist": ("svhn", "cifar10"), "cifar10": ("cifar100", "svhn"), "cifar100": ("cifar10", "svhn"),
    "caltech101": ("stl10", "celeba"), "camvid": ("cityscapes", "voc2012"), "nyuv2": ("sunrgbd", "voc2012"),
}  # fmt: skip
DFAD = {"mnist": "DFAD_mnist", "cifar10": "DFAD_cifar", "cifar100": "DFAD_cifar", "caltech101": "DFAD_caltech101",
        "camvid": "DFAD_camvid_deeplab", "nyuv2": "DFAD_nyu_deeplab"}  # fmt: skip
# Scripts of one data set, without --dataset.
OF_ONE = ("DFAD_camvid_deeplab", "DFAD_nyu_deeplab", "datafree_kd_imagenet")
# Method of the tables -> flags of datafree_kd.py.
FAST = {
    "DAFL": "--method dafl", "ZSKT": "--method zskt", "DFQ": "--method dfq", "CMI-500": "--method cmi --g_steps 500",
    # DFND's "DeepInversion" has the score of the other table's "DeepInv-2k".
    **dict.fromkeys(("DeepInv-2k", "DeepInversion"), "--method deepinv --g_steps 2000"),
    **{f"Fast-{n}": f"--method fast_meta --g_steps {n}" for n in (2, 5, 10)},
}  # fmt: skip
# NAYER-n: n epochs behind 20 of warm-up.
NAYER = {f"NAYER-{n}": f"--method nayer --n_epochs {n + 20} --warmup 20" for n in (100, 200, 300)}
# A file that one has to have: the cells' commands run without it.
EMBEDDING = dict(label_embedding="CLIP's text features")
UNKNOWN = "the figure does not say with which settings NAYER's authors ran Fast-Datafree"
WITHOUT = {
    "Meta data": "another paper's method (Lopes et al. 2017), which needs the teacher's activation statistics",
    "PU-compression": "another paper's method (Xu et al. 2019), which needs some of the data",
    "Generative DFD": "another paper's method (Luo et al. 2020)",
    "SpaceshipNet": "another paper's method (Yu et al. 2023)",
    "MAD": "another paper's method (Do et al. 2022)",
    "(row describes another algorithm, WSLD)": "not data-free: another algorithm's row",
    **{f"Fast (FM-{n})": UNKNOWN for n in (100, 200, 300)},
}  # fmt: skip
# What makes a run a run of a cell, whatever its name and length; other flags differ and are named beside its score.
IDENTITY = ("script", "dataset", "model", "recipe", "pretrained", "teacher", "student", "teacher_recipe", "method",
            "is_maml", "variant", "transfer_set", "scratch", "alpha", "beta", "selection")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A published value: a row of paper_tables.csv.

    name: paper and number. row: the table's columns. dataset, teacher, student: registry names.
    script, flags: its command; script is None where there is none, and `reason` says why.
    training: script and flags of the run that makes its teacher; empty where it has none.
    exact: whether only runs with all its flags are of it.
    """

    name: str
    row: Mapping[str, str]
    dataset: str
    teacher: str
    student: str
    script: str | None = None
    flags: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    reason: str = ""
    exact: bool = False

    @property
    def paper(self) -> str:
        return PAPERS[self.row["source"]]

    @property
    def command(self) -> str | None:
        return shlex.join(["python", self.script, *self.flags]) if self.script else None

    @property
    def value(self) -> float | None:
        """The published score in percent; None where a table says that it failed."""
        try:
            return float(self.row["value"]) * (100 if self.row["metric"] == "mIoU" else 1)
        except ValueError:
            return None

    @functools.cached_property
    def args(self) -> dict:
        """The parsed flags of the command, as a record has them, and what is published instead of a default of ours."""
        args = _as_recorded(parse(self.script, self.flags))
        return args | (EMBEDDING if args.get("method") == "nayer" and not self.exact else {})

    @property
    def _identity(self) -> tuple[str, ...]:
        # Fast-2, -5 and -10 are told apart by their steps alone.
        return (*IDENTITY, "g_steps") if self.args.get("method") == "fast_meta" else IDENTITY

    def made(self, flags: Mapping) -> bool:
        """Whether a run with these flags is one of this cell: of its script, networks and method, of any length."""
        same = bool(self.script) and all(flags.get(k, v) == v for k, v in self.args.items() if k in self._identity)
        return same and not (self.exact and self.differences(flags))

    def differences(self, flags: Mapping) -> str:
        """The flags in which a run of this cell is not the published one, with the published value in brackets."""
        told, same = [], {"seed", "compile", *FREE, *self._identity}  # compiled, networks take the same steps
        if not self.exact and flags.get("label_embedding") not in ("orthogonal", "teacher"):
            same |= EMBEDDING.keys()  # a file, whose content is not known here
        for key in (k for k, wanted in self.args.items() if k not in same and flags.get(k, wanted) != wanted):
            got, wanted = _text(flags[key]), _text(self.args[key])
            if key != "precision":
                told.append(f"--{key} {got} ({wanted})")
            elif wanted != "auto" or " then " in got:
                told.append(f"{got} ({wanted})")
        return ", ".join(told)


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "default", True: "on", False: "off"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _as_recorded(args: Namespace) -> dict:
    return json.loads(json.dumps(vars(args), default=str))


def parse(script: str, flags: Sequence[str]) -> Namespace:
    """What a script's own parser makes of the flags."""
    return importlib.import_module(script.removesuffix(".py")).parse_args(list(flags))


@functools.cache
def cells() -> tuple[Cell, ...]:
    """All cells, in the order of paper_tables.csv."""
    found, count = [], Counter()
    with TABLES.open(newline="") as file:
        for row in csv.DictReader(file):
            count[paper := PAPERS[row["source"]]] += 1
            found.append(_cell(f"{paper}-{count[paper]:02}", row, paper))
    return tuple(found)


def rate_of(args: Mapping | Namespace) -> str:
    """The name of the student's learning rate among a script's flags."""
    return "lr" if "lr" in args else "lr_S"


def known_rates() -> list[dict[str, str]]:
    """The lines of rates.csv, none if there is no such file.

    Raises:
        UsageError: a line is damaged.
    """
    lines = list(csv.DictReader(RATES.read_text().splitlines())) if RATES.exists() else []
    for line in lines:
        try:
            float(line["agreement"])
        except (LookupError, TypeError, ValueError) as error:
            text = ",".join(str(value) for value in line.values())
            raise UsageError(f"{RATES} has a line that is none of its own: {text}: mend or delete it") from error
    return lines


@functools.cache
def benchmark(searched: bool = True) -> tuple[Cell, ...]:
    """The cells of the benchmark DFD-10, in the order of its file: dfd10-<track>-<method>.

    searched: also dfd10-<track>-<method>-searched where the search has found a better rate than the method's own.
    """
    found, tried = [], {}
    for line in known_rates() if searched else ():
        tried.setdefault(f"dfd10-{line['track']}-{line['method']}", {})[line["rate"]] = float(line["agreement"])
    with BENCHMARK.open(newline="") as file:
        for line in csv.DictReader(file):
            track, (teacher, student, recipe) = line["track"], TRACKS[line["track"]]
            row = dict(source="DFD-10", table=track, dataset=SOURCES[track].paper, method=line["method"], value="",
                       teacher=teacher, student=student)  # fmt: skip
            names = NETWORKS[teacher], NETWORKS[student]
            flags = "--dataset", track, "--teacher", names[0], "--student", names[1], "--teacher_recipe", recipe
            flags += tuple(shlex.split(line["flags"]))
            name = f"dfd10-{track}-{line['method']}"
            found.append(Cell(name, row, track, *names, line["script"], flags, exact=True))
            found += _searched(found[-1], tried.get(name, {}))
    return tuple(found)


def _searched(cell: Cell, tried: Mapping[str, float]) -> Iterable[Cell]:
    """The cell at its best rate, of what the students at some rates agree with the teacher; none if that is its own."""
    if not tried:
        return
    flag = rate_of(cell.args)
    rates = {f"{factor * cell.args[flag]:g}": factor for factor in FACTORS}
    if rates.keys() <= tried.keys():
        best = max(rates, key=lambda rate: (tried[rate], rates[rate] == 1))
        if rates[best] != 1:
            row = {**cell.row, "method": f"{cell.row['method']}-searched"}
            yield replace(cell, name=f"{cell.name}-searched", row=row, flags=(*cell.flags, f"--{flag}", best))


def _cell(name: str, row: Mapping[str, str], paper: str) -> Cell:
    method = row["method"]
    dataset = next(key for key, source in (SOURCES | SEGMENTATIONS).items() if source.paper == row["dataset"])
    teacher, student = (NETWORKS[row[role]] for role in ("teacher", "student"))
    if row["dataset"] in ("Caltech101", "ImageNet"):
        teacher, student = (n + "_imagenet" * n.startswith("resnet") for n in (teacher, student))
    cell, segmentation = functools.partial(Cell, name, row, dataset, teacher, student), dataset in SEGMENTATIONS
    if method in WITHOUT or segmentation and method == "DAFL":
        return cell(reason=WITHOUT.get(method, "the paper gives no setting of DAFL for segmentation"))
    recipe = recipe_for(TEACHERS_OF.get(paper, paper), dataset)
    trainer, data = f"teacher_train{'_seg' * segmentation}.py", ("--dataset", dataset)
    if method == "Teacher" or method in SCRATCH:
        made_by = _flag("--recipe", "imagenet" if recipe == "torchvision" else recipe)
        return cell(trainer, (*data, "--model", teacher if method == "Teacher" else student, *made_by))
    made_by = ("--pretrained",) if recipe == "torchvision" else _flag("--recipe", recipe)
    script, *more = _command(paper, dataset, method).split()
    flags = () if script in OF_ONE else data
    flags += ("--teacher", teacher, "--student", student, *_flag("--teacher_recipe", recipe), *more)
    return cell(f"{script}.py", flags, (trainer, *data, "--model", teacher, *made_by))


def _flag(name: str, value: str | None) -> tuple[str, ...]:
    return (name, value) if value else ()


def _command(paper: str, dataset: str, method: str) -> str:
    """The script of a method with a teacher, and its flags but for data and networks."""
    related, unrelated = TRANSFER.get(dataset, (None, None))
    transfer = {
        "KD original data": "original", "KD-ORI": "original", "KD": "original --beta 0.1",
        "Random noise (normal distribution)": "noise", "RANDOM": "noise", "KD alternative data (USPS)": "usps",
        "KD alternative data (similar)": related, "KD-REL": related, "KD-UNR": unrelated, "Places365+KD": "places365",
    }  # fmt: skip
    if method in transfer:
        return f"vanilla_kd{'_seg' * (dataset in SEGMENTATIONS)} --transfer_set {transfer[method]}"
    if method in FAST and paper == "fast" or method == "DeepInversion":
        return f"datafree_kd {FAST[method]}"
    if method in NAYER:
        return f"datafree_kd {NAYER[method]}"
    variant = " --variant mmrazor" * (paper == "mmrazor")
    return {
        "DAFL": f"DAFL_train{variant}",
        "ZSKT": "ZSKT_train",
        # Without the falling rates a published run does not get there; MNIST's does, MMRazor's has its own.
        "DFAD": DFAD.get(dataset, "") + (variant or " --scheduler" * (dataset != "mnist")),
        "DFND": "DFND_train --wild imagenet/train",
        "Random wild images": "DFND_train --wild imagenet/train --selection random",
        "Fast-50": "datafree_kd_imagenet",
    }[method]


def find(name: str) -> Cell:
    """The cell of this name. Raises UsageError if there is none, or it has no command."""
    known = {cell.name: cell for cell in (*cells(), *benchmark())}
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f", did you mean {' or '.join(close)}?" if close else ":"
        raise UsageError(f"no cell '{name}'{hint} --list prints all")
    if known[name].script is None:
        raise UsageError(f"cell {name} has no command: {known[name].reason}")
    return known[name]


def select(words: Iterable[str]) -> list[Cell]:
    """The cells for which each of the words key=value[,value...] holds, in the tables' or the registry's names.

    Raises:
        UsageError: a word is none, or no cell is left.
    """
    found = list(cells())
    for word in words:
        key, _, values = word.partition("=")
        if key not in ("paper", "dataset", "teacher", "student", "method") or not values:
            raise UsageError(f"--select {word}: it takes paper=, dataset=, teacher=, student= or method=NAME[,NAME...]")
        values = [value.lower() for value in values.split(",")]
        column = "source" if key == "paper" else key
        found = [c for c in found if {c.row[column].lower(), getattr(c, key, None)} & {*values}]
    if not found:
        raise UsageError(f"no cell has {' '.join(words)}: --list prints all")
    return found


def flags_of(record: Mapping) -> dict:
    """The flags of a recorded run as it was: by its teacher's own recipe, where known, in its real precision."""
    flags = {**record["args"], "script": record["script"], "precision": record["precision"]}
    recipe = (record.get("teacher_weights") or {}).get("recipe")
    if recipe not in (None, "unknown"):
        flags |= {"teacher_recipe": recipe, "teacher_ckpt": None}
    return flags


def of_benchmark(record: Mapping, published: bool = False) -> bool:
    """Whether a record is one of the benchmark's, whose lengths are hardly those of any table.

    Args:
        published: its command is a table's, too: only where it lies tells then.
    """
    if record.get("file", "").startswith("dfd10/"):
        return True
    return not published and any(
        cell.dataset == record["dataset"] and cell.made(flags_of(record)) for cell in benchmark()
    )


def runs_of(cell: Cell, records: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    """The records of a cell's runs by how they differ from the published one; the fewest differences first."""
    found = {}
    for record in records:
        if record["dataset"] != cell.dataset or not cell.made(flags := flags_of(record)):
            continue
        if cell.exact or not of_benchmark(record, published=not cell.differences(flags)):
            found.setdefault(cell.differences(flags), []).append(record)
    return dict(sorted(found.items(), key=lambda item: (item[0].count("("), item[0])))


def verdict(cell: Cell, records: Iterable[Mapping], margin: float = MARGIN) -> str:
    """'reproduced': the mean best score of runs as published is at least the value less the margin.

    'partly': there are runs, but shorter or otherwise different ones, or they fall short. 'not yet': there are none.
    Of the benchmark's cells runs are 'measured'.
    """
    runs = runs_of(cell, records)
    if not runs:
        return "not yet"
    if cell.exact:
        return "measured"
    best = [r["best"] for r in runs.get("", ())]
    return "reproduced" if best and cell.value and sum(best) / len(best) >= cell.value - margin else "partly"


def published(args: Namespace) -> list[dict]:
    """The cells that a script's run with these flags is one of, and the flags in which it differs from them."""
    flags = _as_recorded(args)
    near = [c for c in cells() if c.script == flags["script"] and c.dataset == flags["dataset"]]
    return [{"cell": c.name, **{k: c.row[k] for k in ("source", "table", "method")}, "value": c.value,
             "differs": c.differences(flags)} for c in near if c.made(flags)]  # fmt: skip


def homes() -> dict[str, str]:
    """Script -> the paper whose page has its deviations: the one of its name, else the one with most of its cells."""
    count = Counter((cell.script, cell.paper) for cell in cells() if cell.script)
    ranked = sorted(count, key=lambda pair: (pair[0].lower().startswith(pair[1]), count[pair]))
    return dict(ranked)  # of a script's papers the last stays
