"""Checkpoints: plan, qparams, observer states, params and more in one safetensors file, checked at writing and reading."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sophq_func.checkpoint import sealed
from sophq_func.checkpoint.compare import differences
from sophq_func.checkpoint.extra import ClassNotFoundError, Packed, pack, unpack
from sophq_func.checkpoint.sealed import parse, refuse, short
from sophq_func.core.errors import CheckpointError, ConfigError, StateError, explain, raise_all
from sophq_func.core.public import public
from sophq_func.core.pytree import node_of, sorted_dict, tree_map
from sophq_func.core.registry import Factories, Spec
from sophq_func.core.texts import printable
from sophq_func.core.types import Tree
from sophq_func.core.version import __version__
from sophq_func.model.flat import flat, merge
from sophq_func.model.quantized import Quantized
from sophq_func.model.shapes import check_ostate, check_qparams, expected
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS, QParams, State
from sophq_func.numerics.entries import FIELDS
from sophq_func.planning.plan import Plan
from sophq_func.planning.stored import digest_of_version_2

FORMAT = "sophq_func"
"""Marks files of :func:`save` among other safetensors files."""

VERSION = 2
"""Of the file's layout; files of older versions are migrated. It grows where an older reader would misread a file.

The part ``extra`` came without a new version: a reader that does not know it refuses a file that holds it, and says so.
"""

PARTS = ("params", "qparams", "ostate", "plan", "extra")
"""What a file may hold; all but the plan prefix the names of its tensors."""

MOVED = ("params", "qparams", "ostate")
"""Parts of which every tensor goes to the device that a reader asks for."""

KEYS = ("format", "version", "library", "torch", "parts")
"""Entries of the text that every file has."""

Tensors = dict[str, Tensor]
Text = dict[str, str]
Parts = dict[str, Any]
"""The parts of a file by name, which may have any type before they are checked."""

Migration = Callable[[Tensors, Text], tuple[Tensors, Text]]
"""Turns the tensors and text of a file of one version into those of the next; must not change its arguments."""


def _from_1(tensors: Tensors, text: Text) -> tuple[Tensors, Text]:
    """From version 1, where the observer ``histogram`` counted in float32; now it counts in whole units of 2 ** -20."""
    if not any(name.startswith("ostate.") for name in tensors):
        return tensors, text
    entries = json.loads(text["plan"])["quantizers"]
    histograms = [entry["name"] for entry in entries if entry["config"]["observer"]["name"] == "histogram"]
    counts = {f"ostate.{name}.counts" for name in histograms} & tensors.keys()
    return tensors | {name: (tensors[name].double() * 2**20).round().to(torch.int64) for name in counts}, text


MIGRATIONS: Mapping[int, Migration] = MappingProxyType({1: _from_1})
"""By old version, the migration to the next one. The reader itself sets ``version`` in the text."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Checkpoint:
    """The contents of a file, read by :func:`load`. A part that was not saved is ``None``.

    Attributes:
      path: of the file.
      plan: equal to the plan that was saved.
      qparams: ``{quantizer name: QParams}``.
      ostate: ``{quantizer name: observer state}``.
      params: ``{name: Tensor}``.
      extra: equal to the tree that was saved.
      metadata: ``"version"`` of the file's layout before any migration; ``"library"`` and ``"torch"``, the versions that
        wrote it; ``"digest"`` of the plan.
    """

    path: str
    # ``Any`` instead of ``None``, which they may be: who loads a file knows what was saved in it, and a type checker
    # would ask for an ``assert`` before each use
    plan: Plan | Any = None
    qparams: dict[str, QParams] | Any = None
    ostate: dict[str, State] | Any = None
    params: dict[str, Tensor] | Any = None
    extra: Tree = None
    metadata: Mapping[str, str]

    def __repr__(self) -> str:
        parts = {name: getattr(self, name) for name in PARTS}
        saved = {name: part for name, part in parts.items() if part is not None}
        shown = {"plan": repr(self.plan), "extra": "extra"}
        texts = [shown[name] if name in shown else f"{len(part)} {name}" for name, part in saved.items()]
        return f"Checkpoint({self.path!r}: {', '.join(texts)})"

    def check(self, q: Quantized | Plan) -> Checkpoint:
        """Return this checkpoint if it fits a quantized model or a plan; ``load(path).check(q)`` is safe to use.

        It fits if both have the same quantizers, with equal configs at equal sites, and if states, qparams and, for a
        model, params have the expected shapes and dtypes. Shapes of activations, which depend on the example's batch,
        may differ where no saved tensor depends on them.

        Args:
          q: the quantized model or the plan to use the checkpoint with.

        Returns:
          This checkpoint.

        Raises:
          CheckpointError: the checkpoint does not fit; the message lists every quantizer and parameter that is missing,
            unknown or different.

        Example:
          >>> import tempfile, sophq_func as sq
          >>> model, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     sq.save(f"{folder}/q.safetensors", plan=q.plan)
          ...     sq.load(f"{folder}/q.safetensors").check(q).plan == q.plan
          True
        """
        if not isinstance(q, Quantized | Plan):
            raise CheckpointError(
                explain(
                    "check",
                    "a checkpoint cannot be compared with this",
                    got=type(q).__name__,
                    allowed="a sq.Quantized or a sq.Plan",
                )
            )
        lines = differences(q, self.plan, self.qparams, self.ostate, self.params)
        if lines:
            because = "1 thing differs" if len(lines) == 1 else f"{len(lines)} things differ"
            fix = "build the model from the plan of the file, or calibrate anew"
            sentence = explain(self.path, "the checkpoint does not fit", because=because, fix=fix)
            raise CheckpointError("\n  ".join([sentence, *map(printable, lines)]))
        return self


@public
def save(
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    qparams: Mapping[str, QParams] | None = None,
    ostate: Mapping[str, State] | None = None,
    params: Mapping[str, Tensor] | None = None,
    extra: Tree = None,
) -> None:
    """Write the given parts into one safetensors file, with checksums of all tensors and text.

    The file is written under a temporary name in the same folder, flushed to the disk and renamed, so that it is never
    incomplete. If anything fails, an older file at ``path`` is unchanged. Nothing is pickled. Tensors that share memory
    are written separately; gradients are not written.

    Args:
      path: of the file; an older one is replaced.
      plan: ``q.plan``; without it :meth:`Checkpoint.check` can compare names, shapes and dtypes only.
      qparams: from ``q.calibrate`` or training, or a :func:`stack` of several.
      ostate: from ``q.init`` or ``q.observe``; needs the plan, whose observers define the classes of the states.
      params: from :func:`params_of` or training, by name.
      extra: whatever else a run needs to go on: the step, ``optimizer.state_dict()``, ``scheduler.state_dict()``, the state
        of a functional optimizer, ``generator.get_state()``. A tree of dicts, lists, tuples and named tuples, of tensors,
        numbers, strings, ``None``, dtypes and devices.

    Raises:
      CheckpointError: no part is given; states do not fit the plan; a scale is NaN; a tensor is sparse, batched or
        has no data; a name cannot be stored in a file; ``extra`` holds something else.
      StateError: the folder does not exist, or a folder or a device is at ``path``; it is an ``OSError``, too.
      OSError: from the operating system: no space, no permission.

    Example:
      >>> import tempfile, sophq_func as sq
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sq.save(f"{folder}/m.safetensors", params=sq.params_of(torch.nn.Linear(3, 2)))
      ...     sq.load(f"{folder}/m.safetensors")
      Checkpoint('...m.safetensors': 2 params)
      >>> generator = torch.Generator()
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sq.save(f"{folder}/run.safetensors", extra={"step": 7, "generator": generator.get_state()})
      ...     found = sq.load(f"{folder}/run.safetensors").extra
      >>> found["step"], torch.equal(found["generator"], generator.get_state())
      (7, True)
    """
    file = _path(path, "save")
    parts = zip(PARTS, (params, qparams, ostate, plan, extra), strict=True)
    given = {name: part for name, part in parts if part is not None}
    try:
        _check_parts(given)
        packed = pack(extra)
        tensors = _flat(given, packed)
    except StateError as error:
        raise CheckpointError(f"{file}: {error}") from error
    text = {"format": FORMAT, "version": str(VERSION), "library": __version__, "torch": str(torch.__version__)}
    text["parts"] = " ".join(given)
    if plan is not None:
        text |= {"plan": plan.to_json(), "digest": plan.digest()}
    if extra is not None:
        text["extra"] = packed.text
    sealed.write(file, tensors, text)


@public
def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Checkpoint:
    """Read and check a file that :func:`save` wrote.

    Tensors have the bits that were saved and no ``requires_grad``. No code in a file is ever run. Observers of your own
    must be registered before their states can be read, and modules imported that define named tuples in ``extra``.

    Args:
      path: of the file.
      device: of the returned tensors. Those of ``extra`` that were on the CPU stay there: states of generators, and the
        steps of ``torch.optim``.

    Returns:
      A :class:`Checkpoint`; call its ``check`` before you use it with a model.

    Raises:
      CheckpointError: the file is truncated, damaged or was not written by :func:`save`; its version cannot be read; its
        parts do not fit together, or hold something that :func:`save` refuses.
      OSError: from the operating system: no such file, no permission.

    Example:
      >>> import tempfile, sophq_func as sq
      >>> model, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> qparams = q.calibrate(params, [x], progress=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sq.save(f"{folder}/q.safetensors", plan=q.plan, qparams=qparams, params=params)
      ...     found = sq.load(f"{folder}/q.safetensors").check(q)
      >>> torch.equal(q.apply(found.params, found.qparams, x), q.apply(params, qparams, x))
      True
    """
    file, target = _path(path, "load"), _device(device)
    tensors, text = sealed.read(file)
    try:
        version = text.get("version", "")
        tensors, text = _migrated(tensors, text)
        parts = _parts(tensors, text, target)
        _check_parts(parts)
    except (ClassNotFoundError, PieceNotFoundError) as error:
        refuse(file, "the checkpoint cannot be read", str(error), error.fix)
    except (ArithmeticError, RecursionError, ValueError) as error:
        refuse(file, "the checkpoint cannot be read", str(error), "save it again, from the model")
    metadata = {key: text[key] for key in ("library", "torch") if key in text} | {"version": version}
    if "plan" in parts:
        # Computed, not copied from the file: plans of older versions had another digest.
        metadata["digest"] = parts["plan"].digest()
    moved = {name: tree_map(lambda t: t.to(target), part) for name, part in parts.items() if name in MOVED}
    return Checkpoint(path=str(file), metadata=MappingProxyType(sorted_dict(metadata)), **(parts | moved))


def _path(path: object, where: str) -> Path:
    if not isinstance(path, str | os.PathLike) or "\0" in os.fsdecode(path):
        raise CheckpointError(explain(where, "this is not a path", got=path, allowed="a string or a pathlib.Path"))
    return Path(os.fsdecode(path))


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(explain("load", "this is not a device", got=device, allowed="'cpu', 'cuda', ...")) from None


class PieceNotFoundError(ValueError):
    """A plan names an observer or a fake quantizer that nobody has registered in this process.

    Attributes:
      fix: what to do, to continue ``"Fix: "``.
    """

    fix = "import the module that registers it before sq.load; sophq --import MODULE does"


def _check_pieces(plan: Plan) -> None:
    """Raise a :class:`PieceNotFoundError` unless every observer and fake quantizer of a plan is registered."""
    lacking: dict[str, list[str]] = {}
    for name, config in plan.items():
        used: list[tuple[Factories[Any], Spec]] = [(OBSERVERS, config.observer), (FAKE_QUANTIZERS, config.fake_quantize)]
        for registry, spec in used:
            if spec.name not in registry:
                lacking.setdefault(f"the {registry.kind} {short(spec.name)}", []).append(name)
    if lacking:
        pieces = " and ".join(f"{piece} ({_shortened(names)})" for piece, names in sorted(lacking.items()))
        raise PieceNotFoundError(f"its plan has {pieces}, which nobody has registered here")


def _shortened(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _check_parts(parts: Parts) -> None:
    """Raise a :class:`StateError` unless the parts fit together."""
    plan = parts.get("plan")
    if not parts:
        allowed = "plan=, qparams=, ostate=, params= or extra="
        raise StateError(explain("checkpoint", "there is nothing to save", allowed=allowed))
    if plan is not None and not isinstance(plan, Plan):
        raise StateError(
            explain("plan", "the plan has the wrong type", got=type(plan).__name__, allowed="a sq.Plan", fix="plan=q.plan")
        )
    if "ostate" in parts:
        if plan is None:
            because = "the plan's observers say what the states are"
            raise StateError(
                explain("ostate", "observer states cannot be saved without their plan", because=because, fix="plan=q.plan")
            )
        check_ostate(plan, parts["ostate"])
    if "qparams" in parts:
        check_qparams(plan, parts["qparams"])
    if "params" in parts and not isinstance(parts["params"], Mapping):
        got = type(parts["params"]).__name__
        raise StateError(
            explain(
                "params",
                "the params have the wrong type",
                got=got,
                allowed="a dict {name: Tensor}",
                fix="sq.params_of(model)",
            )
        )


def _flat(parts: Parts, extra: Packed) -> Tensors:
    """All tensors by their names in the file, ``<part>.<name>``.

    Raises:
      StateError: an entry is not a tensor, or its name is not a string.
    """
    states = parts.get("ostate", {}).items()
    leaves = {
        "params": parts.get("params", {}),
        "qparams": flat(parts.get("qparams", {})),
        "ostate": {f"{name}.{field}": leaf for name, state in states for field, leaf in state._asdict().items()},
        "extra": extra.tensors,
    }
    named = {(part, name): leaf for part, tensors in leaves.items() for name, leaf in tensors.items()}
    problems = [
        explain(
            part,
            f"the entry {short(name)} cannot be saved",
            got=type(leaf).__name__,
            allowed="a Tensor with a dotted name",
            fix="sq.params_of(tree) has the tensors of a tree by name" if node_of(leaf) else "",
        )
        for (part, name), leaf in named.items()
        if not isinstance(name, str) or not isinstance(leaf, Tensor)
    ]
    raise_all(problems, StateError)
    return {f"{part}.{name}": leaf for (part, name), leaf in named.items()}


# Reading


def _migrated(tensors: Tensors, text: Text) -> tuple[Tensors, Text]:
    """Tensors and text in the layout of the current version."""
    if text.get("format") != FORMAT:
        raise ValueError(f"its format is {short(text.get('format'))}, not {FORMAT!r}: sq.save did not write it")
    spelled = text.get("version", "")
    version = int(spelled) if spelled.isascii() and spelled.isdigit() and len(spelled) < 10 else -1
    if not 0 <= version <= VERSION:
        raise ValueError(f"its version is {short(spelled)}, and this library reads up to {VERSION}: install a newer one")
    for step in range(version, VERSION):
        if step not in MIGRATIONS:
            raise ValueError(f"its version is {version}, and there is no migration from {step} to {step + 1}")
        tensors, text = MIGRATIONS[step](dict(tensors), dict(text))
    return tensors, {**text, "version": str(VERSION)}


def _parts(tensors: Tensors, text: Text, device: torch.device) -> Parts:
    """The parts that the text lists, made of the tensors; they are not yet checked against each other.

    On the CPU, but for tensors of ``extra`` that were on another device: those go to ``device``.
    """
    names = text.get("parts", "").split(" ")
    if len(set(names)) < len(names) or not set(names) <= set(PARTS):
        raise ValueError(f"its parts are {short(text.get('parts'))}, and a file may have {' '.join(PARTS)}")
    keys = {*KEYS, *(("plan", "digest") if "plan" in names else ()), *(("extra",) if "extra" in names else ())}
    if text.keys() != keys:
        raise ValueError(f"entries of its text are missing or unknown: {short(sorted(text.keys() ^ keys))}")
    groups: dict[str, Tensors] = {name: {} for name in names if name != "plan"}
    for name, tensor in sorted(tensors.items()):
        part, _, rest = name.partition(".")
        if part not in groups or not rest:
            raise ValueError(f"it holds a tensor {short(name)} that belongs to none of its parts")
        groups[part][rest] = tensor
    parts: Parts = dict(groups)
    if "plan" in names:
        parts["plan"] = _plan(text["plan"], text["digest"])
        if parts.keys() & {"qparams", "ostate"}:  # a plan alone is read without them, too
            _check_pieces(parts["plan"])
    if "qparams" in parts:
        parts["qparams"] = _qparams(groups["qparams"])
    if "ostate" in parts and "plan" in parts:
        parts["ostate"] = _states(parts["plan"], groups["ostate"])
    if "extra" in parts:
        parts["extra"] = unpack(Packed(text["extra"], groups["extra"]), device)
    return parts


def _plan(text: str, digest: str) -> Plan:
    parse(text, "the plan")
    plan = Plan.from_json(text)
    if digest not in (plan.digest(), digest_of_version_2(text)):
        raise ValueError("its plan is not the one that its digest names")
    return plan


def _qparams(leaves: Tensors) -> dict[str, QParams]:
    owners = {name.rpartition(".")[0] for name in leaves}
    lacking = sorted({f"{owner}.{field}" for owner in owners for field in FIELDS} - leaves.keys())
    if lacking:
        raise ValueError(f"its qparams lack {short(lacking[0])}")
    return merge(leaves, {})


def _states(plan: Plan, leaves: Tensors) -> dict[str, State]:
    """Observer states, in the classes of the plan's observers."""
    layouts = expected(plan)
    wanted = {f"{name}.{field}" for name, layout in layouts.items() for field in layout.state}
    lacking, unknown = sorted(wanted - leaves.keys()), sorted(leaves.keys() - wanted)
    if lacking:
        raise ValueError(f"its ostate lacks {short(lacking[0])}")
    if unknown:
        raise ValueError(f"its ostate holds {short(unknown[0])}, which is not in the plan")
    states: dict[str, State] = {}
    for name, layout in layouts.items():
        states[name] = layout.cls(*(leaves[f"{name}.{field}"] for field in layout.state))
    return sorted_dict(states)
