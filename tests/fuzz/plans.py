"""Plans whose JSON text was changed: refused in words, or right.

A text is read, built, calibrated and run, and each view of the plan is made. Errors of the library may come out of it,
and no others. ``python -m tests.fuzz.plans --count 3000 --seed 0`` prints a table of outcomes, and exits 1 on a fault.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from tests.fuzz.subjects import SUBJECTS, Subject

OURS = (sq.ConfigError, sq.PlanError, sq.StateError)

SECONDS = 20
"""After which a case hangs; each takes a tenth of a second."""

ODD = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    10**9,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "0",
    "conv",
    "x\x1b[2J\n",
    "*",
    "@",
    [],
    {},
)
"""What may come in the place of any value."""

Path = tuple[str | int, ...]
"""Keys and indices from the root of a tree to a value."""


def paths(tree: Any, at: Path = ()) -> Iterator[Path]:
    """Every value in a tree of JSON, the root left out."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from paths(value, (*at, key))


def get(tree: Any, path: Path) -> Any:
    """The value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Any) -> None:
    """Set the value at a path."""
    get(tree, path[:-1])[path[-1]] = value


def remove(tree: Any, chance: random.Random) -> None:
    """Leave out an entry of a dict or a list."""
    path = chance.choice(list(paths(tree)))
    del get(tree, path[:-1])[path[-1]]


def retype(tree: Any, chance: random.Random) -> None:
    """Put something else in the place of a value."""
    put(tree, chance.choice(list(paths(tree))), copy.deepcopy(chance.choice(ODD)))


def swap(tree: Any, chance: random.Random) -> None:
    """Exchange two values that have the same key, or stand in lists."""
    everywhere = list(paths(tree))
    one = chance.choice(everywhere)
    alike = [path for path in everywhere if path[-1] == one[-1] and path[: len(one)] != one and one[: len(path)] != path]
    if alike:
        other = chance.choice(alike)
        first, second = get(tree, one), get(tree, other)
        put(tree, one, second)
        put(tree, other, first)


def duplicate(tree: Any, chance: random.Random) -> None:
    """Repeat an item of a list."""
    items = [path for path in paths(tree) if isinstance(path[-1], int)]
    path = chance.choice(items)
    get(tree, path[:-1]).insert(path[-1], copy.deepcopy(get(tree, path)))


def nudge(tree: Any, chance: random.Random) -> None:
    """Change a number a little, or its sign."""
    numbers = [path for path in paths(tree) if type(get(tree, path)) in (int, float)]
    path = chance.choice(numbers)
    value = get(tree, path)
    put(tree, path, chance.choice((value + 1, value - 1, -value, value * 1000, 0)))


def rename(tree: Any, chance: random.Random) -> None:
    """Put a text of the plan in the place of another one, at one place or everywhere."""
    texts = [path for path in paths(tree) if isinstance(get(tree, path), str)]
    old, new = (get(tree, chance.choice(texts)) for _ in range(2))
    if chance.random() < 0.3:
        new = chance.choice((f"{new}.{old}", old[:-1], new.upper(), f"{old}$"))
    places = [path for path in texts if get(tree, path) == old]
    for path in places if chance.random() < 0.5 else [chance.choice(places)]:
        put(tree, path, new)


GRANULARITIES = (
    {"name": "PerTensor"},
    {"name": "PerChannel", "axis": 0},
    {"name": "PerChannel", "axis": 1},
    {"name": "PerChannel", "axis": -1},
    {"name": "PerGroup", "axis": 0, "size": 2},
    {"name": "PerGroup", "axis": [0, 1], "size": 2},
    {"name": "PerBlock", "rows": 2, "columns": 2},
    {"name": "PerToken"},
)


def reconfigure(tree: Any, chance: random.Random) -> None:
    """Another value for a field of a quantizer's config, of the right type."""
    config = chance.choice(tree["quantizers"])["config"]
    field = chance.choice(("scheme", "granularity", "observer", "fake_quantize", "options"))
    if field == "scheme":
        name = chance.choice(sorted(config["scheme"].keys() - {"granularity"}))
        config["scheme"][name] = chance.choice((2, 3, 4, 8, 12, 16)) if name == "bits" else chance.random() < 0.5
    elif field == "granularity":
        config["scheme"]["granularity"] = dict(chance.choice(GRANULARITIES))
    elif field == "options":
        options = config[chance.choice(("observer", "fake_quantize"))]["options"]
        name = chance.choice((*options, "bins", "block_size", "decay"))
        options[name] = copy.deepcopy(chance.choice(ODD))
    else:
        registry = OBSERVERS if field == "observer" else FAKE_QUANTIZERS
        config[field] = {"name": chance.choice(sorted(registry)), "options": {}}


MUTATIONS: tuple[Callable[[Any, random.Random], None], ...] = (
    *(remove, retype, duplicate),
    # most of these leave a text that is a plan
    *(swap, nudge, rename, reconfigure) * 2,
)


def outcome(text: str, subject: Subject) -> str:
    """What comes of a text: where it was refused, or that the run is as before, or another one."""
    stage = "from_json"
    try:
        plan = sq.Plan.from_json(text)
        stage = "views"
        plan.table(), str(plan.tree()), plan.to_dot(), repr(plan), str(plan.coverage), plan.digest()
        [plan.explain(name) for name in plan]
        again = sq.Plan.from_json(plan.to_json())
        assert again == plan, "another plan comes back from its own text"
        stage = "build"
        q = sq.build(subject.model, plan)
        stage = "calibrate"
        qparams = q.calibrate(subject.params, [subject.batch], progress=False)
        stage = "apply"
        made = q.apply(subject.params, qparams, *subject.batch)
        stage = "blocks"
        q.blocks()
        if plan == subject.q.plan:
            expected = subject.q.apply(subject.params, subject.qparams, *subject.batch)
            assert torch.equal(made, expected), "the same plan, and other numbers"
            return "the same plan"
        assert made.shape == subject.q.apply(subject.params, subject.qparams, *subject.batch).shape, "another shape"
        return "another plan, which runs"
    except Exception as error:
        return refused(stage, error)


def refused(stage: str, error: Exception) -> str:
    """The outcome of a case that ended in an error: a fault, unless the library says in words what is wrong."""
    if not isinstance(error, OURS):
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAULT {stage}: {type(error).__name__} at {place.filename.rpartition('/')[2]}:{place.lineno}: {error}"[:170]
    if "\x1b" in str(error):
        return "FAULT control characters in an error"
    return f"refused by {stage}: {type(error).__name__}"


def _alarm(*_: object) -> None:
    raise TimeoutError("it hangs")


def plans(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Mutate plans; the text of each, and what came of it."""
    subjects = {name: make() for name, make in SUBJECTS.items()}
    texts = {name: subject.q.plan.to_json() for name, subject in subjects.items()}
    signal.signal(signal.SIGALRM, _alarm)
    for i in range(count):
        chance = random.Random(f"{seed} {i}")
        name = chance.choice(list(subjects))
        tree = json.loads(texts[name])
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            with suppress(AttributeError, IndexError, KeyError, TypeError):  # an earlier one left nothing to change
                chance.choice(MUTATIONS)(tree, chance)
        text = json.dumps(tree)
        signal.alarm(SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outcome(text, subjects[name])
        signal.alarm(0)
        yield text, found


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = Counter(found for _, found in plans(options.count, options.seed))
    for found, number in outcomes.most_common():
        sys.stdout.write(f"{number:6}  {found}\n")
    return int(any(found.startswith("FAULT") for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
