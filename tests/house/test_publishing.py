"""What a release, its page and its workflows are made from, read without building anything."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import sophq_func as sq
from tools import wheel

ROOT = Path(sq.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")
"""A link or picture of Markdown with a relative target."""


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def project() -> Mapping[str, Any]:
    """The contents of ``pyproject.toml``."""
    toml = pytest.importorskip("tomllib")  # of Python 3.11
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def read(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


def shown_by_an_index(project: Mapping[str, Any], text: str) -> str:
    """A text with the substitutions of the build."""
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_a_package_index_shows_the_readme_with_absolute_links(project: Mapping[str, Any]) -> None:
    shown = shown_by_an_index(project, README)
    assert LINK.findall(shown) == []
    targets = LINK.findall(README)
    assert targets
    for target in targets:
        path = target.partition("#")[0]
        assert (ROOT / path).exists(), target
        kind = "raw" if path.endswith((".png", ".svg", ".gif")) else "blob"
        assert f"](https://github.com/sophq-func/sophq_func/{kind}/main/{target})" in shown


def test_links_are_made_absolute_and_code_is_left_alone(project: Mapping[str, Any]) -> None:
    home = "https://github.com/sophq-func/sophq_func"
    for before, after in {
        "[a page](docs/a-b.md#some-part)": f"[a page]({home}/blob/main/docs/a-b.md#some-part)",
        "[two\nlines](CONTRIBUTING.md)": f"[two\nlines]({home}/blob/main/CONTRIBUTING.md)",
        "![a plan](docs/plan.png)": f"![a plan]({home}/raw/main/docs/plan.png)",
        "[![a plan](docs/plan.png)](docs/a.md)": f"[![a plan]({home}/raw/main/docs/plan.png)]({home}/blob/main/docs/a.md)",
        "[a page](https://example.com/a.md)": "[a page](https://example.com/a.md)",
        "[below](#below)": "[below](#below)",
        "loss = losses[name](x, y)": "loss = losses[name](x, y)",
    }.items():
        assert shown_by_an_index(project, before) == after


def test_every_place_names_the_same_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", sq.__version__]
    assert read(ROOT / "CITATION.cff")["version"] == sq.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", sq.__version__)


def test_the_script_of_an_installation_is_the_command_line(project: Mapping[str, Any]) -> None:
    assert set(project["project"]["scripts"]) == {"sophq"}
    module, _, name = project["project"]["scripts"]["sophq"].partition(":")
    assert getattr(import_module(module), name) is import_module("sophq_func.cli.commands").main


def test_what_a_source_distribution_leaves_out_is_there(project: Mapping[str, Any]) -> None:
    for pattern in project["tool"]["hatch"]["build"]["targets"]["sdist"]["exclude"]:
        assert list(ROOT.glob(pattern.removeprefix("/"))), pattern


@by_name(WORKFLOWS)
def test_every_job_of_a_workflow_ends_and_may_do_no_more_than_it_needs(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True]  # "on", which YAML 1.1 reads as a boolean
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 90
        assert job["runs-on"] and job["steps"]
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])


@pytest.mark.parametrize("name", ["tests.yml", "release.yml"])
def test_workflows_run_targets_that_there_are(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    jobs = read(ROOT / ".github" / "workflows" / name)["jobs"].values()
    runs = [step["run"].split() for job in jobs for step in job["steps"] if "run" in step]
    asked = {word for run in runs if run[0] == "make" for word in run[1:] if "=" not in word}
    assert asked and asked <= targets


@by_name([*WORKFLOWS, ROOT / "pyproject.toml", ROOT / "CITATION.cff"])
def test_no_host_is_named_but_that_of_the_project(path: Path) -> None:
    hosts = set(re.findall(r"\w+://([^/\s'\")]+)", path.read_text(encoding="utf-8")))
    assert hosts <= {"github.com", "sophq-func.github.io"}


@by_name(FORMS)
def test_forms_of_issues_can_be_filled_in(path: Path) -> None:
    form = read(path)
    assert form["name"] and form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in form["body"])


class Runs:
    """Stands in for the programs that a check starts; one of them may fail."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.commands = fails, list[str]()

    def __call__(self, command: list[object], cwd: Path, check: bool) -> None:
        assert check and not list(cwd.iterdir())
        words = [Path(str(word)).name for word in command]
        self.commands.append(" ".join("CODE" if "import" in word else word for word in words))
        if self.fails and self.fails in words:
            raise subprocess.CalledProcessError(3, list(map(str, command)))


def test_a_wheel_is_installed_alone_in_each_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, file = Runs(), tmp_path / "made.whl"
    file.touch()
    monkeypatch.setattr(wheel.subprocess, "run", runs)
    assert wheel.main([str(file), "--no-deps", "--python", "python3.10", "python3.13"]) == 0
    install = "python -m pip install --quiet --disable-pip-version-check --no-deps made.whl"
    assert runs.commands == [
        *("python3.10 -m venv env", install, "python -I -c CODE"),
        *("python3.13 -m venv env", install, "python -I -c CODE"),
    ]


def test_a_wheel_is_used_with_its_dependencies_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, file = Runs(fails="inspect"), tmp_path / "made.whl"
    file.touch()
    monkeypatch.setattr(wheel.subprocess, "run", runs)
    assert wheel.main([str(file), "--python", "python3"]) == 1
    assert runs.commands[3:] == ["sophq --version", "sophq inspect plan.json --columns quantizer,grid"]
    assert "failed with exit code 3: sophq inspect" in capsys.readouterr().out
