"""What the library says of its observers, fake quantizers and number formats, as Markdown: docstrings, options, states.

Nothing is said twice: formula, paper, gradient and differences are the docstrings' own words, and options, states and
leaves come from the registries and from running the pieces. No figures here; :mod:`numerics_page` adds them.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.core.registry import Factories
from sophq_func.fake_quantize._rounding import rectified_sigmoid
from sophq_func.numerics import affine, formats, ranges
from sophq_func.numerics.codebooks import CODEBOOKS
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.observers._mse import search_range

WIDTH = 120
KINDS: dict[str, Factories] = {"observer": OBSERVERS, "fake quantizer": FAKE_QUANTIZERS}
MAKERS = {f.__name__: f for f in (formats.int_, formats.float_, formats.codebook)}
FORMATS: dict[str, formats.Format] = {
    name: value for name, value in vars(formats).items() if isinstance(value, formats.Integer | formats.Float)
}
MORE: dict[str, tuple[Callable[..., Any], ...]] = {"mse": (search_range,), "adaround": (rectified_sigmoid,)}
"""Functions that a docstring relies on without a reference to them."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dorefa": {"mapping": "tanh"},
    "qdrop": {"prob": 0.5},
    "adaround": {"quant_type": "input"},
}
"""Options that change what a fake quantizer learns, needs or is."""

GRID = (ranges.range_to_qparams, affine.fake_quantize, ranges.positive)
"""The arithmetic of integer grids, which has a section of its own."""

CHANNELS, WEIGHT = 3, (3, 8)


@dataclass
class Text:
    """A docstring in parts.

    Attributes:
      paragraphs: what stands before the sections.
      options: what ``Args`` says, by name.
      differs: what differs from sophgo-mq.
    """

    paragraphs: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    differs: str = ""


def parse(docstring: str) -> Text:
    """The parts of a docstring; examples, returns and errors are left out."""
    text = Text()
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring).partition("\nExample:")[0].strip()):
        head, _, rest = block.partition(":")
        if head == "Args" or head == "Attributes":
            items = re.findall(r"^  (\S[^:]*): (.*(?:\n    .*)*)", rest, flags=re.MULTILINE)
            text.options = {name: " ".join(said.split()) for name, said in items}
        elif head == "Differs from sophgo-mq":
            text.differs = " ".join(rest.split())
        elif head not in ("Returns", "Raises"):
            text.paragraphs.append(" ".join(block.split()))
    return text


def anchor(name: str, kind: str) -> str:
    """The heading's anchor."""
    return f"{name}-{kind}".lower().replace(" ", "-")


def link(name: str, kind: str) -> str:
    """A link to the section of a piece."""
    return f"[`{name}`](#{anchor(name, kind)})"


def markdown(text: str, name: str = "", kind: str = "") -> str:
    """A sentence of a docstring, with links to pieces and papers, without references to files that are not here."""

    def role(found: re.Match[str]) -> str:
        target = found[1].lstrip("~").rpartition(".")[2]
        if any(target == f.__name__ for f in GRID):
            return f"[`{target}`](#{target})"
        return code(target)

    def code(words: str) -> str:
        known = kind in KINDS and words in KINDS[kind].names() and words != name
        return link(words, kind) if known else f"`{words}`"

    text = re.sub(r"(; |, | \()semantics\.md [\d.]+(, [\d.]+)*(?=\)|;|,)", lambda m: "\0" if m[1] == " (" else "", text)
    text = text.replace("\0)", "").replace("\0; ", " (")
    text = re.sub(r":\w+:`([^`]+)`", role, text)
    text = re.sub(r"``([^`]+)``", lambda found: code(found[1]), text)
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def wrap(text: str, indent: str = "") -> str:
    """Lines of at most :data:`WIDTH` characters; code and links are not broken, so that no line begins with an operator."""
    glued = re.sub(r"`[^`]+`", lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        glued, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return "\n".join(lines).replace("\0", " ")


def bold(paragraph: str) -> str:
    """``Gradient`` at the start of a paragraph is easy to find."""
    return re.sub(r"^(Gradients?)\b", r"**\1**", paragraph)


def options(build: Callable[..., Any], said: dict[str, str], renamed: dict[str, str], name: str, kind: str) -> list[str]:
    """One item for each option: name, other names, default, meaning."""
    lines = []
    for option, parameter in inspect.signature(build).parameters.items():
        others = [f"`{foreign}`" for foreign, own in renamed.items() if own == option]
        known = f"`{option}`" if parameter.default is parameter.empty else f"`{option}={parameter.default!r}`"
        also = f" (also {', '.join(others)})" if others else ""
        meaning = markdown(said.get(option, ""), name, kind)
        lines.append(wrap(f"* {known}{also}: {meaning}".removesuffix(": "), "  "))
    return lines


def referred(build: Callable[..., Any], names: list[str]) -> Iterator[Callable[..., Any]]:
    """Functions of the same file that a docstring refers to, and that these refer to in turn; no pieces."""
    module = inspect.getmodule(build)
    for target in re.findall(r":func:`~?(\w+)`", build.__doc__ or ""):
        found = getattr(module, target, None)
        if inspect.isfunction(found) and target not in names:
            yield found
            yield from referred(found, names)


def explained(build: Callable[..., Any], name: str, kind: str) -> list[str]:
    """The first two paragraphs about each function that a docstring relies on."""
    lines: list[str] = []
    for function in dict.fromkeys([*referred(build, KINDS[kind].names()), *MORE.get(name, ())]):
        first, *rest = parse(function.__doc__ or "").paragraphs[:2]
        lines += [wrap(f"`{function.__name__}`: {markdown(first, name, kind)}"), ""]
        lines += [line for part in rest for line in (wrap(markdown(part, name, kind)), "")]
    return lines


def body(name: str, kind: str) -> str:
    """The section of an observer or a fake quantizer, as far as the library itself says it."""
    registry = KINDS[kind]
    factory = registry.get(name)
    text = parse(factory.build.__doc__ or "")
    aliases = [f"`{alias}`" for alias in registry.aliases(name) if alias != name]
    lines = [f"### `{name}` {kind}", ""]
    lines += [f"Also {', '.join(aliases)}.", ""] if aliases else []
    lines += [line for part in text.paragraphs for line in (wrap(bold(markdown(part, name, kind))), "")]
    lines += explained(factory.build, name, kind)
    listed = options(factory.build, text.options, dict(factory.renamed), name, kind)
    lines += ["Options:", "", *listed, ""] if listed else ["No options.", ""]
    lines += [wrap(part) for part in (state(name) if kind == "observer" else leaves(name))]
    lines += ["", wrap(f"**Differs from sophgo-mq**: {markdown(text.differs, name, kind)}")] if text.differs else []
    return "\n".join(lines)


def shape(value: Tensor) -> str:
    """A shape with ``C`` for the number of channels, ``like x`` where it is that of the tensor."""
    if value.shape == WEIGHT:
        return "like the tensor"
    sizes = ["C" if size == CHANNELS else str(size) for size in value.shape]
    return f"`({', '.join(sizes)}{',' if len(sizes) == 1 else ''})`"


def state(name: str) -> list[str]:
    """What an observer keeps: fields with types and shapes, per tensor and per channel."""
    observer = sq.observer(name)
    x = torch.linspace(-1.0, 2.0, 24).reshape(WEIGHT)
    alone, channels = (observer.init(x, sq.QScheme(granularity=g)) for g in (sq.PerTensor(), sq.PerChannel(0)))
    cls = type(alone)
    said = markdown(parse(cls.__doc__ or "").paragraphs[0])
    fields = []
    for key in cls._fields:
        one, many = getattr(alone, key), getattr(channels, key)
        shapes = shape(one) if one.shape == many.shape else f"{shape(one)} or {shape(many)}"
        fields.append(f"`{key}` {str(one.dtype).removeprefix('torch.')} {shapes}")
    return [f"**State** `{cls.__name__}`: {said.rstrip('.')}. Per tensor or for `C` channels: {', '.join(fields)}."]


def prepared(name: str, symmetric: bool, **choices: Any) -> tuple[sq.FakeQuantize, sq.QParams]:
    """A fake quantizer and what it makes of the qparams of a weight, per channel."""
    fq, x = sq.fake_quantizer(name, **choices), torch.linspace(-1.0, 2.0, 24).reshape(WEIGHT)
    scheme, observer = sq.QScheme(symmetric=symmetric, granularity=sq.PerChannel(0)), sq.observer("minmax")
    return fq, fq.init(observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme), x, scheme)


def leaves(name: str) -> list[str]:
    """What of a fake quantizer is learned, what its ``init`` adds, what it must be given, and what its codes are."""
    said = _leaves(name)
    choices = VARIANTS.get(name, {})
    changed = [line for line in (_leaves(name, **choices) if choices else []) if line not in said]
    option = ", ".join(f"{key}={value!r}" for key, value in choices.items())
    return [" ".join(said), *(["", f"With `{option}`: {' '.join(changed)}"] if changed else [])]


def _leaves(name: str, **choices: Any) -> list[str]:
    (fq, alone), (_, shifted) = (prepared(name, symmetric, **choices) for symmetric in (True, False))
    fixed, free = _floating(alone), _floating(shifted)
    learned = [_where(f"`{leaf}`", leaf in fixed, leaf in free) for leaf in fq.learnable]
    extras = [
        f"{_where(f'`{key}`', key in alone.extras, True)} {str(value.dtype).removeprefix('torch.')} {shape(value)}"
        for key, value in shifted.extras.items()
    ]
    mentioned = set(re.findall(r'extras\["(\w+)"\]', FAKE_QUANTIZERS.get(name).build.__doc__ or ""))
    given = [f"`{key}`, which you give" for key in sorted(mentioned - {"alpha", *shifted.extras})]
    return [
        f"**Learned**: {', '.join(learned) or 'nothing'}.",
        f"**Extras**: {', '.join([*extras, *given]) or 'none'}.",
        f"**Noise**: {'uniform numbers, from `q.with_noise`' if fq.noise else 'none'}.",
        f"**Codes**: {'integers times a scale' if fq.integer else 'no integers'}.",
    ]


def _floating(qparams: sq.QParams) -> set[str]:
    """Names of the leaves that a gradient can reach."""
    tensors = {"scale": qparams.scale, "zero_point": qparams.zero_point, **qparams.extras}
    return {name for name, value in tensors.items() if value.is_floating_point()}


def _where(text: str, symmetric: bool, other: bool) -> str:
    return text if symmetric or not other else f"{text} (affine)"


def merges(name: str) -> bool:
    """Whether the states of two shards can be put together."""
    observer, scheme = sq.observer(name), sq.QScheme()
    nothing = observer.init(torch.zeros(2), scheme)
    try:
        observer.merge(nothing, nothing)
    except sq.StateError:
        return False
    return True


def source(name: str, kind: str) -> str:
    """The paper or standard that a docstring names first."""
    said = " ".join(parse(KINDS[kind].get(name).build.__doc__ or "").paragraphs)
    found = re.search(r"arXiv:\d{4}\.\d{5}|OFP8|OCP MX|OCP Microscaling|IEEE|TensorRT", said)
    names = {"OCP Microscaling": "OCP MX v1.0", "OCP MX": "OCP MX v1.0", "IEEE": "IEEE 754", "OFP8": "OCP OFP8"}
    return markdown(names.get(found[0], found[0])) if found else ""


def grid() -> str:
    """The section on the arithmetic that all integer grids share."""
    lines = ["## The integer grid", "", wrap(markdown(parse(affine.__doc__ or "").paragraphs[1])), ""]
    for function in GRID:
        text = parse(function.__doc__ or "")
        lines += [f"### `{function.__name__}`", ""]
        lines += [line for part in text.paragraphs for line in (wrap(markdown(part)), "")]
        lines += [wrap(f"**Differs from sophgo-mq**: {markdown(text.differs)}"), ""] if text.differs else []
    return "\n".join(lines).rstrip()


def maker(name: str) -> str:
    """The section of a function that makes formats."""
    text = parse(MAKERS[name].__doc__ or "")
    lines = [f"### `{name}` format", ""]
    lines += [line for part in text.paragraphs for line in (wrap(markdown(part)), "")]
    listed = options(MAKERS[name], text.options, {}, name, "format")
    return "\n".join([*lines, "Options:", "", *listed])


def number(value: float) -> str:
    """A value of a format, exactly where that is short."""
    if value in (0, 1) or 1e-2 <= value < 1e6:
        return f"{value:.6g}"
    mantissa, exponent = value, 0
    while mantissa < 1:
        mantissa, exponent = mantissa * 2, exponent - 1
    return f"`2 ** {exponent}`" if mantissa == 1 else f"{value:.4g}"


def format_rows() -> list[list[str]]:
    """One row of a table for each constant and each table of the formats."""
    made: dict[str, formats.Format] = {**FORMATS, **CODEBOOKS}
    rows = []
    for name, value in made.items():
        values = value.values()
        smallest = number(float(values[values > 0].min()))
        rows.append([f"`{name}`", str(len(values)), number(value.largest), smallest, _how(name)])
    return rows


def _how(name: str) -> str:
    if name not in FORMATS:
        return "`codebook`"
    spec = FORMATS[name]
    make = "int_" if isinstance(spec, formats.Integer) else "float_"
    first = "bits" if make == "int_" else "exponent_bits"
    chosen = {k: getattr(spec, k) for k in inspect.signature(MAKERS[make]).parameters}
    defaults = {k: p.default for k, p in inspect.signature(MAKERS[make]).parameters.items()}
    shown = [f"{v}" if k in (first, "mantissa_bits") else f"{k}={v!r}" for k, v in chosen.items() if v != defaults[k]]
    return f"`{make}({', '.join(shown)})`"
