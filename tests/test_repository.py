"""What surrounds the code: citation, pinned versions, CI, style, and no paths of anybody's machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAPERS = {
    "Data-Free Learning of Student Networks": 2019,
    "Data-Free Adversarial Distillation": 2019,
    "Learning Student Networks in the Wild": 2021,
    "Up to 100x Faster Data-Free Knowledge Distillation": 2022,
    "NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge Distillation": 2024,
}


def requirements(file: Path) -> dict[str, Requirement]:
    """The lines of a requirements file, by canonical name, without comments."""
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}


def test_citation_names_the_collection_and_each_paper():
    head, references = (ROOT / "CITATION.cff").read_text().split("references:\n")
    fields = dict(re.findall(r"^([a-z-]+): *(.*)$", head, re.M))
    assert fields["cff-version"] == "1.2.0" and fields["type"] == "software"
    assert fields["message"] and fields["title"] and "\nauthors:\n  - name: " in head
    licence = (ROOT / "LICENSE").read_text()
    assert fields["license"] == "Apache-2.0" and "Version 2.0, January 2004" in licence
    found = {}
    for entry in references.split("  - type: ")[1:]:
        assert re.search(r"^    authors:\n      - .*name", entry, re.M), entry
        title, year = (re.search(rf'^    {key}: "?(.+?)"?$', entry, re.M)[1] for key in ("title", "year"))
        found[title] = int(year)
    assert PAPERS.items() <= found.items()


@pytest.mark.parametrize("file", sorted(ROOT.glob("requirements*.txt")), ids=lambda file: file.name)
def test_each_requirement_has_a_tested_version_that_it_allows(file):
    tested = requirements(ROOT / "constraints.txt")
    for name, requirement in requirements(file).items():
        assert name in tested, f"constraints.txt lacks a line for {name}"
        (pin,) = tested[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), (requirement, pin)


def test_one_version_of_ruff():
    pin = str(requirements(ROOT / "requirements-dev.txt")["ruff"])
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff[=<>~][^]]*", hooks)) == {pin}


def test_public_ci_runs_what_ci_runs_here():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.search(r"^ +- run: bash \.ci/run$", workflow, re.M)
    assert re.search(r'^ +python: \["3\.10", "3\.12"\]$', workflow, re.M)
    commands = (ROOT / ".ci/run").read_text()
    for command in ("bash scripts/test.sh", '"$PY" -m ruff check .', '"$PY" -m ruff format --check .'):
        assert command in commands.splitlines()


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=" ".join)
def test_style(command):
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_tracked_file_holds_a_path_of_the_machine_it_was_made_on():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    pattern = r"(^|[^[:alnum:]_./-])/(work|home|root|Users)/"
    grep = ["git", "-c", f"safe.directory={ROOT}", "grep", "-nIE"]
    done = subprocess.run([*grep, pattern], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout + done.stderr  # 1: nothing matched
