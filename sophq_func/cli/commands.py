"""``python -m sophq_func``: look at plans and checkpoints, compare them, report, and export."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from sophq_func.capture.skeleton import params_of
from sophq_func.checkpoint.io import load
from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.export import onnx, tables
from sophq_func.model.build import build
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams
from sophq_func.planning.plan import Plan
from sophq_func.reports import Report, report

EXPLANATION = """\
Look at quantization plans and checkpoints, compare them, and find the layer to fix.

FILE is a plan (the text of plan.to_json()) or a checkpoint (sq.save). MODULE:FUNCTION names a function without
arguments that returns (model, batches): a file holds no model, so report and export need one from your code.
"""
EXAMPLES = """\
examples:
  python -m sophq_func inspect plan.json                             what is quantized how, where, and why
  python -m sophq_func inspect plan.json --name layer1.conv1.weight_fake_quant
  python -m sophq_func diff before.json after.json                   exit code 1 where they differ
  python -m sophq_func report demo:make plan.json --html report.html calibrate on the batches, and report
  python -m sophq_func export demo:make net.safetensors out          files for the compiler of a chip
  python -m sophq_func export demo:make net.safetensors net.onnx     integers for ONNX Runtime

where demo.py holds

  def make():
      model = Net()
      model.load_state_dict(torch.load("net.pt"))
      return model.eval(), [batch for batch, _ in loader]

Errors are one line on stderr, with exit code 2; --traceback shows where they come from.
"""


class Given(NamedTuple):
    """What a file holds; a plan alone has no numbers."""

    plan: Plan
    qparams: Mapping[str, QParams] | None = None
    params: Mapping[str, Tensor] | None = None
    metadata: Mapping[str, str] = {}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. Fix: {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: the words behind the program's name; by default those of the process.

    Returns:
      0; 1 where ``diff`` finds a difference; 2 for an error, which is one line on stderr.
    """
    given = _parser().parse_args(argv)
    try:
        code: int = given.run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if given.traceback:
            raise
        sys.stderr.write(f"sophq_func {given.command}: {_one_line(error)}\n")
        return 2


def _one_line(error: Exception) -> str:
    """An error in one line; of those that this library and the system raise the text alone, of others the class, too."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    line = " ".join(str(text).split())
    return line if isinstance(error, ValueError | KeyError | OSError) and line else f"{type(error).__name__}: {line}"


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m sophq_func", description=EXPLANATION, epilog=EXAMPLES, formatter_class=shape)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], told: str, example: str) -> argparse.ArgumentParser:
        name, sentence = example.partition(" ")[0], f"{told[0].upper()}{told[1:]}."
        made = commands.add_parser(name, help=told, description=sentence, epilog=f"example: {parser.prog} {example}")
        made.set_defaults(run=run)
        return made

    one = command(_inspect, "show what is quantized how, where, and why", "inspect plan.json --tree")
    one.add_argument("file", metavar="FILE", help="a plan or a checkpoint")
    part = one.add_mutually_exclusive_group()
    part.add_argument("--name", metavar="QUANTIZER", help="everything about one quantizer, with dots or underscores")
    part.add_argument("--tree", action="store_true", help="the quantizers nested by module")
    two = command(_diff, "compare two plans; exit code 1 where they differ", "diff before.json after.json")
    two.add_argument("before", metavar="A", help="a plan or a checkpoint")
    two.add_argument("after", metavar="B", help="a plan or a checkpoint")
    told = command(_report, "say which quantizer makes the error of the output", "report demo:make plan.json")
    _add_model(told)
    told.add_argument("--html", metavar="PATH", help="write a page with pictures")
    told.add_argument("--csv", metavar="PATH", help="write the rows as CSV")
    out = command(
        _export, "write ONNX, or the tables that the compilers of chips take", "export demo:make plan.json net.onnx"
    )
    _add_model(out)
    out.add_argument("target", metavar="TARGET", help="net.onnx; or a folder for tables, which must be there")
    out.add_argument("--name", default="sophq_func", help="what the names of tables begin with (default: %(default)s)")
    out.add_argument("--float", action="store_true", help="beside tables: write the float ONNX file, too; needs batches")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that run a model."""
    parser.add_argument("source", metavar="MODULE:FUNCTION", help="a function that returns (model, batches)")
    parser.add_argument("file", metavar="FILE", help="a checkpoint; or a plan, which is calibrated on the batches")


def _inspect(given: argparse.Namespace) -> int:
    found = _read(given.file)
    if given.name:
        return _say(found.plan.explain(given.name))
    if given.tree:
        return _say(str(found.plan.tree()))
    lines = [repr(found.plan), *(f"{key}: {value}" for key, value in sorted(found.metadata.items()))]
    lines += ["", found.plan.table()]
    if found.qparams is not None:
        lines += ["", "calibrated:", *(_scales(name, found.qparams[name]) for name in found.plan if name in found.qparams)]
    return _say("\n".join(lines))


def _scales(name: str, qparams: QParams) -> str:
    scale, zero = qparams.scale, qparams.zero_point
    steps = f"scale {float(scale.min()):.6g}" + (f" to {float(scale.max()):.6g}, {scale.numel()}" if scale.ndim else "")
    shift = f", zero point {float(zero.min()):g} to {float(zero.max()):g}" if bool((zero != 0).any()) else ""
    return f"  {name}  {steps}{shift}"


def _diff(given: argparse.Namespace) -> int:
    found = _read(given.before).plan.diff(_read(given.after).plan)
    _say(str(found))
    return int(bool(found))


def _report(given: argparse.Namespace) -> int:
    made: Report = report(*_ready(given))
    _show(made)
    if given.html:
        _say(f"written: {made.to_html(given.html)}")
    if given.csv:
        _say(f"written: {made.to_csv(given.csv)}")
    return 0


def _export(given: argparse.Namespace) -> int:
    q, params, qparams, batches = _ready(given)
    to_onnx = given.target.endswith(".onnx")
    if to_onnx and given.float:
        because = "it goes beside tables, and this target is a quantized ONNX file"
        raise ConfigError(explain(given.target, "--float is not possible", because=because, fix="a folder as the target"))
    if (to_onnx or given.float) and not batches:
        raise ConfigError(explain(given.source, "no batches is not possible", because="ONNX is made from an example"))
    if to_onnx:
        onnx(q, params, qparams, batches[0], given.target)
        return _say(f"written: {given.target}")
    example = batches[0] if given.float else None
    for path in filter(None, tables(q, params, qparams, given.target, example_args=example, name=given.name)):
        _say(f"written: {path}")
    return 0


def _ready(given: argparse.Namespace) -> tuple[Quantized, Mapping[str, Tensor], Mapping[str, QParams], list[Any]]:
    """The model of a function with the plan of a file; what the file lacks comes from the model and its batches."""
    found = _read(given.file)
    model, batches = _made(given.source)
    q = build(model, found.plan).eval()
    params = found.params if found.params is not None else params_of(model)
    return q, params, found.qparams if found.qparams is not None else q.calibrate(params, batches), batches


def _made(source: str) -> tuple[nn.Module, list[Any]]:
    """What ``MODULE:FUNCTION`` returns."""
    module, _, name = source.partition(":")
    if not module or not name:
        raise ConfigError(
            explain("MODULE:FUNCTION", "this source is not possible", got=source, fix="demo:make, for make() in demo.py")
        )
    sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    finally:
        sys.path.remove("")
    if not callable(getattr(found, name, None)):
        functions = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(unknown(module, "function", name, functions or ["(it has none)"]))
    result = getattr(found, name)()
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        got, allowed = type(result).__name__, "a tuple (model, batches)"
        raise ConfigError(
            explain(source, "this result is not possible", got=got, allowed=allowed, fix="return model, [batch, ...]")
        )
    return result[0], list(result[1])


def _read(path: str) -> Given:
    """A plan from JSON, or a checkpoint: a safetensors file, which begins with the length of its header."""
    source = Path(path)
    with source.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < source.stat().st_size:
        return _checkpoint(path)
    try:
        return Given(Plan.from_json(source.read_text(encoding="utf-8")))
    except ValueError as error:
        because = " ".join(str(error).split())
        raise ConfigError(explain(path, "reading a plan or a checkpoint is not possible", because=because)) from error


def _checkpoint(path: str) -> Given:
    """A checkpoint with a plan."""
    found = load(path)
    if found.plan is None:
        raise ConfigError(explain(path, "reading a plan is not possible", because="the checkpoint was saved without one"))
    return Given(found.plan, found.qparams, found.params, found.metadata)


def _show(made: Report) -> None:
    """In colors on a terminal, where rich is installed; else as text."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console

        Console().print(made)
    else:
        _say(made.table())


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    return 0
