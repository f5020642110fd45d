"""The commands of ``sophq``, which is ``python -m sophq_func``: inspect, diff, report, export."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from sophq_func.capture.contents import params_of
from sophq_func.checkpoint.io import load
from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.core.files import check_regular
from sophq_func.core.texts import printable, printable_lines
from sophq_func.core.types import Args, Kwargs
from sophq_func.core.version import __version__
from sophq_func.export import onnx, tables
from sophq_func.export.tables import COMPILERS
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
  {prog} inspect plan.json                               what is quantized how, where, and why
  {prog} inspect plan.json --columns quantizer,grid      some columns alone
  {prog} inspect plan.json --name layer1.conv1.weight_fake_quant
  {prog} diff before.json after.json                     exit code 1 where they differ
  {prog} report demo:make plan.json --html report.html   calibrate on the batches, and report
  {prog} export demo:make net.safetensors out            files for the compiler of a chip
  {prog} export demo:make net.safetensors net.onnx       integers for ONNX Runtime

where demo.py holds

  def make():
      model = Net()
      model.load_state_dict(torch.load("net.pt"))
      return model.eval(), [batch for batch, _ in loader]

Errors are one line on stderr, with exit code 2; --traceback shows where they come from.
"""


Batch: TypeAlias = Tensor | Args | Kwargs
"""A tensor, a tuple of positional arguments, or a dict of keyword arguments of a model."""

Command: TypeAlias = Callable[[argparse.Namespace], int]
"""From the parsed options to the exit code."""


INTERRUPTED = 130
"""The exit code of a program that the user stops: 128 and the number of the signal, as shells count."""


LONGEST_PLAN = 2**27
"""In bytes; five times the text of a plan of 20,000 quantizers. In memory, JSON takes many times the length of its text."""


class Contents(NamedTuple):
    """The contents of a file; of a plan alone there are no numbers."""

    plan: Plan
    qparams: Mapping[str, QParams] | None = None
    params: Mapping[str, Tensor] | None = None
    metadata: Mapping[str, str] = {}


class Ready(NamedTuple):
    """A model that is ready to run: arguments of ``q.apply``, and the batches of the user's function."""

    q: Quantized
    params: Mapping[str, Tensor]
    qparams: Mapping[str, QParams]
    batches: list[Batch]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, where argparse prints the usage as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. Fix: {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: the words behind the program's name; by default those of the process.

    Returns:
      0; 1 where ``diff`` finds a difference; 2 for an error, which is one line on stderr; 130 where the user stops it.
    """
    options = _parser().parse_args(argv)
    try:
        for name in options.modules:
            _module(name)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the reader, such as head, stopped reading; Python flushes stdout once more at exit, which must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.traceback:
            raise
        sys.stderr.write(f"sophq_func {options.command}: {_one_line(error)}\n")
        return 2


def _one_line(error: Exception) -> str:
    """The text of an error in one line, behind the name of its class unless this library or the system raised it."""
    # str() of a KeyError is the repr of its text
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    line = printable(" ".join(str(text).split()))
    is_expected = isinstance(error, ValueError | KeyError | OSError)
    return line if is_expected and line else f"{type(error).__name__}: {line}"


def _program(path: str) -> str:
    """How a user called the program: by the script that an installation makes, or as a module.

    Example:
      >>> _program("/home/ada/.venv/bin/sophq"), _program("/home/ada/sophq_func/__main__.py")
      ('sophq', 'python -m sophq_func')
    """
    return "sophq" if Path(path).stem == "sophq" else "python -m sophq_func"


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    prog = _program(sys.argv[0])
    parser = Parser(prog, description=EXPLANATION, epilog=EXAMPLES.format(prog=prog), formatter_class=shape)
    versions = f"sophq_func {__version__}, torch {torch.__version__}"
    shown = "show the versions of the library and of torch"
    parser.add_argument("--version", action="version", version=versions, help=shown)
    pieces = "import a module first, which registers pieces of yours; as often as there are modules"
    parser.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help=pieces)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Command, summary: str, example: str) -> argparse.ArgumentParser:
        """A command, named by the first word of its example."""
        name = example.partition(" ")[0]
        description = f"{summary[0].upper()}{summary[1:]}."
        added = commands.add_parser(name, help=summary, description=description, epilog=f"example: {parser.prog} {example}")
        added.set_defaults(run=run)
        return added

    inspect = command(_inspect, "show what is quantized how, where, and why", "inspect plan.json --tree")
    inspect.add_argument("file", metavar="FILE", help="a plan or a checkpoint")
    view = inspect.add_mutually_exclusive_group()
    view.add_argument("--name", metavar="QUANTIZER", help="everything about one quantizer, with dots or underscores")
    view.add_argument("--tree", action="store_true", help="the quantizers nested by module")
    some = "some columns of the table alone, with commas between"
    view.add_argument("--columns", metavar="NAMES", type=_names, help=some)

    diff = command(_diff, "compare two plans; exit code 1 where they differ", "diff before.json after.json")
    diff.add_argument("before", metavar="A", help="a plan or a checkpoint")
    diff.add_argument("after", metavar="B", help="a plan or a checkpoint")

    summary = "say which quantizer makes the error of the output"
    reporting = command(_report, summary, "report demo:make plan.json")
    _add_model(reporting)
    reporting.add_argument("--html", metavar="PATH", help="write a page with pictures")
    reporting.add_argument("--csv", metavar="PATH", help="write the rows as CSV")

    summary = "write ONNX, or the tables that the compilers of chips take"
    exporting = command(_export, summary, "export demo:make plan.json net.onnx")
    _add_model(exporting)
    exporting.add_argument("target", metavar="TARGET", help="net.onnx; or a folder for tables, which must be there")
    prefix = "what the names of tables begin with (default: %(default)s)"
    exporting.add_argument("--name", default="sophq_func", help=prefix)
    compilers = f"which compiler reads the tables: {', '.join(COMPILERS)} (default: %(default)s)"
    exporting.add_argument("--compiler", default="tpu-mlir", help=compilers)
    with_float = "beside tables of sophgo-mq: write the float ONNX file, too; needs batches"
    exporting.add_argument("--float", action="store_true", help=with_float)
    return parser


def _names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",")]


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that run a model."""
    parser.add_argument("source", metavar="MODULE:FUNCTION", help="a function that returns (model, batches)")
    parser.add_argument("file", metavar="FILE", help="a checkpoint; or a plan, which is calibrated on the batches")


def _inspect(options: argparse.Namespace) -> int:
    contents = _read(options.file)
    plan = contents.plan
    if options.name:
        return _say(plan.explain(options.name))
    if options.tree:
        return _say(str(plan.tree()))
    lines = [repr(plan)]
    lines += [f"{key}: {printable(value)}" for key, value in sorted(contents.metadata.items())]
    lines += ["", plan.table(options.columns)]
    if contents.qparams is not None:
        lines += ["", "calibrated:"]
        lines += [_qparams_line(name, contents.qparams[name]) for name in plan if name in contents.qparams]
    return _say("\n".join(lines))


def _qparams_line(name: str, qparams: QParams) -> str:
    """Scale and zero point of a quantizer; of several scales the smallest, the largest and the number."""
    scale, zero = qparams.scale, qparams.zero_point
    text = f"  {printable(name)}  scale {float(scale.min()):.6g}"
    if scale.ndim:
        text += f" to {float(scale.max()):.6g}, {scale.numel()}"
    if bool((zero != 0).any()):
        text += f", zero point {float(zero.min()):g} to {float(zero.max()):g}"
    return text


def _diff(options: argparse.Namespace) -> int:
    before, after = _read(options.before).plan, _read(options.after).plan
    difference = before.diff(after)
    _say(str(difference))
    return 1 if difference else 0


def _report(options: argparse.Namespace) -> int:
    ready = _ready(options)
    result = report(ready.q, ready.params, ready.qparams, ready.batches)
    _show(result)
    if options.html:
        _say(f"written: {result.to_html(options.html)}")
    if options.csv:
        _say(f"written: {result.to_csv(options.csv)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    q, params, qparams, batches = _ready(options)
    target = options.target
    to_onnx = target.endswith(".onnx")
    if to_onnx and options.float:
        because = "it goes beside tables, and this target is a quantized ONNX file"
        raise ConfigError(explain(target, "--float cannot be used", because=because, fix="a folder as the target"))
    if (to_onnx or options.float) and not batches:
        because, fix = "ONNX is made from an example", "return model, [batch]"
        raise ConfigError(explain(options.source, "there are no batches", because=because, fix=fix))
    if to_onnx:
        onnx(q, params, qparams, batches[0], target)
        return _say(f"written: {target}")
    needs_example = options.float or COMPILERS.get(options.compiler).needs_example
    example = batches[0] if batches and needs_example else None
    written = tables(q, params, qparams, target, example_args=example, name=options.name, compiler=options.compiler)
    for path in filter(None, written):  # a file that was not asked for has no path
        _say(f"written: {path}")
    return 0


def _ready(options: argparse.Namespace) -> Ready:
    """The model of a function with the plan of a file; what the file lacks comes from the model and its batches."""
    contents = _read(options.file)
    model, batches = _call(options.source)
    q = build(model, contents.plan).eval()
    params, qparams = contents.params, contents.qparams
    if params is None:
        params = params_of(model)
    if qparams is None:
        qparams = q.calibrate(params, batches)
    return Ready(q, params, qparams, batches)


def _call(source: str) -> tuple[nn.Module, list[Batch]]:
    """Import the function of ``MODULE:FUNCTION`` and call it."""
    module_name, _, name = source.partition(":")
    if not module_name or not name:
        fix = "demo:make, for make() in demo.py"
        raise ConfigError(explain("MODULE:FUNCTION", "this source names no function", got=source, fix=fix))
    module = _module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(unknown(module_name, "function", name, functions or ["(it has none)"]))
    result = function()
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        got, allowed, fix = type(result).__name__, "a tuple (model, batches)", "return model, [batch, ...]"
        raise ConfigError(explain(source, "this result is no model with batches", got=got, allowed=allowed, fix=fix))
    model, batches = result
    return model, list(batches)


def _module(name: str) -> ModuleType:
    """Import a module as ``python -m`` does, so that a file in the current folder is found."""
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove("")


def _read(path: str) -> Contents:
    """The contents of a plan in JSON, or of a checkpoint."""
    source = Path(path)
    check_regular(path, source)
    # a safetensors file begins with the length of its header in 8 bytes, and the header, which is JSON
    with source.open("rb") as file:
        start = file.read(9)
    header_size = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_size < source.stat().st_size:
        return _read_checkpoint(path)
    size = source.stat().st_size
    if size > LONGEST_PLAN:
        sentence, allowed = "this file is too large for a plan", f"{LONGEST_PLAN} bytes"
        raise ConfigError(explain(path, sentence, got=size, allowed=allowed, because="it is no checkpoint"))
    try:
        return Contents(Plan.from_json(source.read_text(encoding="utf-8")))
    except ValueError as error:
        because = " ".join(str(error).split())
        raise ConfigError(explain(path, "this file is neither a plan nor a checkpoint", because=because)) from error


def _read_checkpoint(path: str) -> Contents:
    """The contents of a checkpoint with a plan."""
    checkpoint = load(path)
    if checkpoint.plan is None:
        because, fix = "the checkpoint was saved without one", "sq.save(path, plan=q.plan, ...)"
        raise ConfigError(explain(path, "there is no plan to read", because=because, fix=fix))
    return Contents(checkpoint.plan, checkpoint.qparams, checkpoint.params, checkpoint.metadata)


def _show(result: Report) -> None:
    """Write a report in colors on a terminal, where the package ``rich`` is installed; else as plain text."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console

        Console().print(result)
    else:
        _say(result.table())


def _say(text: str) -> int:
    """Write a line to stdout; returns the exit code of success."""
    sys.stdout.write(f"{printable_lines(text)}\n")
    return 0
