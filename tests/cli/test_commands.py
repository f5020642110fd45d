"""The command line: what it prints, what it writes, and errors that are one line with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sophq_func as sq
from sophq_func.cli import commands
from sophq_func.numerics.contracts import OBSERVERS
from tests.helpers import ready

MAKE = '''"""A model and its batches."""

import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), iter([torch.randn(5, 4)])

def wrong():
    return 3

def broken():
    raise RuntimeError("no\\nweights")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two plans and a module, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "maker", raising=False)
    (tmp_path / "maker.py").write_text(MAKE)
    for name, bits in (("a", 8), ("b", 3)):
        (tmp_path / f"{name}.json").write_text(plan(bits).to_json())
    return tmp_path


def plan(bits: int) -> sq.Plan:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    rule = sq.Rule(name="2.weight_fake_quant", weight=sq.override(bits=bits))
    return sq.plan(sq.trace(model, (torch.ones(1, 4),)), sq.QuantConfig(chip="BM1690" if bits == 8 else None, rules=(rule,)))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = commands.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_inspect_shows_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", "a.json")
    assert (code, err) == (0, "")
    assert plan(8).table() in out
    assert plan(8).digest()[:12] in out
    assert run(capsys, "inspect", "a.json", "--tree")[1] == f"{plan(8).tree()}\n"
    picked = plan(8).table(columns=("fake quantizer", "grid"))
    assert picked in run(capsys, "inspect", "--columns", "fake quantizer, grid", "a.json")[1]
    assert (
        run(capsys, "inspect", "a.json", "--name", "2_weight_fake_quant")[1] == f"{plan(8).explain('2.weight_fake_quant')}\n"
    )


def test_inspect_shows_what_a_checkpoint_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    q, params, qparams = ready(nn.Linear(2, 3).eval(), torch.tensor([[1.0, 2.0]]))
    sq.save(folder / "net.safetensors", plan=q.plan, qparams=qparams, params=params)
    code, out, err = run(capsys, "inspect", "net.safetensors")
    scale = qparams["weight_fake_quant"].scale
    assert (code, err) == (0, "")
    assert q.plan.table() in out
    assert q.plan.digest() in out
    assert f"weight_fake_quant  scale {float(scale.min()):.6g} to {float(scale.max()):.6g}, 3" in out


def test_a_checkpoint_without_a_plan_or_a_damaged_one_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, params, _ = ready(nn.Linear(2, 3).eval(), torch.tensor([[1.0, 2.0]]))
    sq.save(folder / "net.safetensors", params=params)
    code, _, err = run(capsys, "inspect", "net.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    assert "without one" in err
    whole = (folder / "net.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) - 4])
    code, _, err = run(capsys, "inspect", "half.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    assert "half.safetensors" in err


PIECES = """import sophq_func as sq

@sq.register.observer("ours")
def ours():
    return sq.observer("minmax")
"""


@pytest.mark.usefixtures("scratch_registries")
def test_a_checkpoint_with_an_observer_of_the_user_needs_the_module(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OBSERVERS.register("ours")(lambda: sq.observer("minmax"))
    config = sq.QuantConfig(weight=sq.override(observer="ours"))
    q, _, qparams = ready(nn.Linear(2, 3).eval(), torch.tensor([[1.0, 2.0]]), config=config)
    sq.save(folder / "net.safetensors", plan=q.plan, qparams=qparams)
    sq.save(folder / "plan.safetensors", plan=q.plan)
    for table in (OBSERVERS._values, OBSERVERS._canonical, OBSERVERS._keys):  # as in a process that never saw it
        table.pop("ours")
    code, _, err = run(capsys, "inspect", "net.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    assert "the observer 'ours' (weight_fake_quant), which nobody has registered here" in err
    assert "Fix: import the module that registers it" in err
    assert run(capsys, "inspect", "plan.safetensors")[0] == 0
    (folder / "our_pieces.py").write_text(PIECES)
    code, out, err = run(capsys, "--import", "our_pieces", "inspect", "net.safetensors")
    assert (code, err) == (0, "")
    assert "ours()" in out and "weight_fake_quant  scale" in out
    assert "No module named 'nowhere'" in run(capsys, "--import", "nowhere", "inspect", "net.safetensors")[2]


def test_diff_says_what_differs_by_text_and_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "diff", "a.json", "a.json") == (0, "no difference\n", "")
    code, out, _ = run(capsys, "diff", "a.json", "b.json")
    assert code == 1
    assert "~ 2.weight_fake_quant: bits 8 -> 3" in out
    assert out == f"{plan(8).diff(plan(3))}\n"


def test_report_calibrates_a_plan_and_writes_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "report", "maker:make", "b.json", "--html", "r.html", "--csv", "r.csv")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(5, 4)
    q, params = sq.build(model, plan(3)).eval(), sq.params_of(model)
    expected = sq.report(q, params, q.calibrate(params, [x]), [x], progress=False)
    assert code == 0
    assert out == f"{expected.table()}\nwritten: r.html\nwritten: r.csv\n"
    expected.to_html(folder / "own.html")
    assert (folder / "r.html").read_bytes() == (folder / "own.html").read_bytes()


def test_export_writes_onnx(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    code, out, err = run(capsys, "export", "maker:make", "a.json", "net.onnx")
    assert (code, out, err) == (0, "written: net.onnx\n", "")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(5, 4)
    q, params = sq.build(model, plan(8)).eval(), sq.params_of(model)
    expected = q.apply(params, q.calibrate(params, [x], progress=False), x)
    session = runtime.InferenceSession("net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=0.02)


def test_export_writes_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["net_cali_table_from_sophgo_mq_sophgo_tpu", "net_q_table_from_sophgo_mq_sophgo_tpu", "net_clip_ranges.json"]
    code, out, _ = run(capsys, "export", "maker:make", "a.json", ".", "--name", "net", "--compiler", "sophgo-mq")
    assert (code, out) == (0, "".join(f"written: {name}\n" for name in names))
    assert "2_Gemm_weight INT8" in (folder / names[1]).read_text()


def test_export_writes_the_float_file_beside_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    code, out, _ = run(capsys, "export", "maker:make", "a.json", ".", "--name", "net", "--float", "--compiler", "sophgo-mq")
    assert code == 0 and out.endswith("written: net.onnx\n")
    made = {f"{node.output[0]}_{node.op_type}_weight INT8" for node in onnx.load(folder / "net.onnx").graph.node}
    table = (folder / "net_q_table_from_sophgo_mq_sophgo_tpu").read_text().splitlines()
    assert len(made.intersection(table)) == 2


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "a float file beside a file": (("export", "maker:make", "a.json", "net.onnx", "--float"), "--float"),
    "no command": ((), "COMMAND"),
    "unknown command": (("inspct", "a.json"), "inspct"),
    "no file": (("inspect", "none.json"), "none.json"),
    "a folder": (("inspect", "."), "directory"),
    "no plan": (("inspect", "maker.py"), "neither a plan nor a checkpoint"),
    "binary": (("inspect", "noise.bin"), "neither a plan nor a checkpoint"),
    "column": (("inspect", "a.json", "--columns", "grd"), "did you mean 'grid'"),
    "quantizer": (("inspect", "a.json", "--name", "2.weight_fake_quan"), "did you mean '2.weight_fake_quant'"),
    "source": (("report", "maker", "a.json"), "demo:make"),
    "module": (("report", "nowhere:make", "a.json"), "nowhere"),
    "function": (("report", "maker:mak", "a.json"), "did you mean 'make'"),
    "result": (("report", "maker:wrong", "a.json"), "a tuple (model, batches)"),
    "raises": (("report", "maker:broken", "a.json"), "RuntimeError: no weights"),
    "folder": (("export", "maker:make", "a.json", "none"), "folder of this file"),
}


@pytest.mark.parametrize(("words", "told"), WRONG.values(), ids=WRONG)
def test_errors_are_one_line_and_exit_code_2(
    words: tuple[str, ...], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "noise.bin").write_bytes(bytes(range(256)))
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err.count("\n") == 1
    assert told in err


def test_a_traceback_is_there_for_those_who_ask(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        commands.main(["--traceback", "inspect", "none.json"])


@pytest.mark.parametrize("words", [(), ("inspect",), ("diff",), ("report",), ("export",)], ids=" ".join)
def test_help_teaches(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0
    assert "FILE" in out or "A B" in out
    if not words:
        for line in ("inspect plan.json", "diff before.json after.json", "report demo:make", "def make():"):
            assert line in out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"sophq_func {sq.__version__}, torch {torch.__version__}\n", "")


@pytest.mark.parametrize(
    ("path", "prog"), [("/bin/sophq", "sophq"), ("sophq.exe", "sophq"), ("x/__main__.py", "python -m sophq_func")]
)
def test_help_and_errors_name_the_program_as_it_was_called(
    path: str, prog: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [path])
    _, out, _ = run(capsys, "--help")
    assert out.startswith(f"usage: {prog} ") and f"\n  {prog} inspect plan.json " in out
    assert run(capsys, "inspct")[2].startswith(f"{prog}: ")
    assert f"example: {prog} diff before.json" in run(capsys, "diff", "--help")[1]


def test_a_user_who_stops_a_command_sees_no_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "report", stopped)
    assert run(capsys, "report", "maker:make", "a.json") == (130, "", "")


@pytest.mark.slow
def test_the_module_runs_as_a_program_and_stops_with_its_reader(folder: Path) -> None:
    def program(*words: str) -> subprocess.Popen[bytes]:
        command, pipe = [sys.executable, "-m", "sophq_func", *words], subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(Path(sq.__file__).parent.parent)}
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=folder, env=environment)

    bad, unread = program("inspect", "none.json"), program("inspect", "a.json")
    assert unread.stdout and unread.stderr
    unread.stdout.close()
    out, err = bad.communicate()
    assert (bad.returncode, out) == (2, b"")
    assert b"Traceback" not in err and err.count(b"\n") == 1
    with unread.stderr as stream:
        assert (stream.read(), unread.wait()) == (b"", 0)


# Files of others


@pytest.mark.parametrize("command", [("inspect",), ("diff", "a.json")], ids=" ".join)
def test_only_regular_files_of_a_bounded_size_are_read(
    command: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(folder / "pipe")
    with (folder / "huge.json").open("wb") as file:
        file.truncate(2**40)  # a file that takes no room on the disk
    for path, told in (("/dev/zero", "device"), ("pipe", "pipe"), ("huge.json", "too large for a plan")):
        code, out, err = run(capsys, *command, path)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert told in err and "allowed" in err


def test_texts_of_files_move_no_cursor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential()
    model.add_module("\x1b[2J\nforged", nn.Linear(2, 3))
    q = ready(model.eval(), torch.tensor([[1.0, 2.0]])).q
    (folder / "b\x1b.json").write_text(q.plan.to_json())
    (folder / "c.json").write_text(q.plan.to_json().replace('"version": 4', '"version": "\\u001b[2J"'))
    for words in (("inspect",), ("inspect", "--tree"), ("diff", "a.json"), ("inspect", "--name", "\x1b"), ("inspect",)):
        for name in ("b\x1b.json", "c.json"):
            _, out, err = run(capsys, *words, name)
            assert out + err and [sign for sign in out + err if sign != "\n" and not sign.isprintable()] == []
            assert not any(line.startswith("forged") for line in out.splitlines())
