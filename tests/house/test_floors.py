"""The oldest versions that the library promises to run with: said in one way in every place, and asked for by a script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sophq_func as sq
from tools import floors

ROOT = Path(sq.__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LOWEST = floors.floors(PROJECT)


def test_the_script_reads_every_dependency() -> None:
    assert LOWEST.keys() == {"torch", "numpy", "optree", "safetensors"}
    assert all(re.fullmatch(r"\d+\.\d+", version) for version in LOWEST.values())


def test_the_page_of_versions_names_the_floors() -> None:
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert f"**torch** {LOWEST['torch']} and newer" in text
    for name in ("numpy", "optree", "safetensors"):
        assert f"{name} {LOWEST[name]}" in text
    (python,) = re.findall(r'^requires-python = ">=(.*)"$', PROJECT, flags=re.MULTILINE)
    assert f"**Python** {python} and newer" in text


def test_versions_of_an_environment_are_compared_with_the_floors() -> None:
    found = {"torch": "2.9.0+cu128", "numpy": "1.26.0", "optree": "0.13.1"}
    assert floors.wrong(found, {"torch": "2.9", "numpy": "1.26", "optree": "0.13"}) == ["optree is 0.13.1, not 0.13"]


class Runs:
    """Stands in for what the script starts."""

    def __init__(self, versions: dict[str, str], passes: tuple[bool, ...] = (True, True)) -> None:
        self.versions, self.outcomes = versions, list(passes)
        self.pins, self.tested = list[str](), list[list[str]]()

    def install(self, python: str, environment: Path, pins: list[str]) -> None:
        self.pins = pins

    def installed(self, environment: Path, names: list[str]) -> dict[str, str]:
        return {name: self.versions[name] for name in names}

    def passes(self, environment: Path, arguments: list[str]) -> bool:
        self.tested.append(arguments)
        return self.outcomes.pop(0)


def replaced(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> Runs:
    for name in ("install", "installed", "passes"):
        monkeypatch.setattr(floors, name, getattr(runs, name))
    return runs


def test_the_oldest_are_installed_together_and_both_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {name: f"{version}.0" for name, version in LOWEST.items()}
    runs = replaced(monkeypatch, Runs(versions))
    assert floors.main(["oldest", "--python", "python3.10"]) == 0
    assert runs.pins == [f"{name}=={version}" for name, version in LOWEST.items()]
    assert len(runs.tested) == len(floors.RUNS)
    failing = replaced(monkeypatch, Runs(versions, passes=(False, True)))
    assert floors.main(["oldest"]) == 1
    assert len(failing.tested) == len(floors.RUNS)


def test_the_newest_are_whatever_pip_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = replaced(monkeypatch, Runs(dict.fromkeys(LOWEST, "99.0")))
    assert floors.main(["newest"]) == 0
    assert runs.pins == []


def test_an_environment_with_other_versions_is_not_tested(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = replaced(monkeypatch, Runs(dict.fromkeys(LOWEST, "99.0")))
    assert floors.main(["oldest", "--environment", str(tmp_path)]) == 1
    assert runs.tested == []
    assert f"torch is 99.0, not {LOWEST['torch']}" in capsys.readouterr().out


def test_ci_runs_the_oldest_and_the_newest_python() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    asked = {(job["floors"], job["python"]) for job in workflow["jobs"]["floors"]["strategy"]["matrix"]["include"]}
    listed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert {("oldest", listed[0]), ("newest", listed[-1])} <= asked
