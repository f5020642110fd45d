"""The compiled kernel of fake quantization: made of ``kernel.cpp`` when somebody asks for it, kept in the user's cache.

Why C++, and not a program of inductor from the same definition in Python: on one core of a Xeon, per tensor in microseconds,

============================  ==================  ====================  ==================
elements                      2,048               131,072               802,816
forward, calls of torch       9                   70                    1100
forward, inductor             8                   32                    310
forward, C++                  2                   18                    280
with backward, inductor       93                  265                   1190
with backward, C++            33                  148                   930
============================  ==================  ====================  ==================

(a copy took 2, 19 and 280 in the same run). Small networks live on what a call costs: inductor's program is called through
Python, and its derivative needs an ``autograd.Function`` in Python, too. It also has to be made for each kind of signature,
and inductor itself takes more than a second to import even where its cache has the program; this library is loaded in a few
milliseconds. What C++ does not give is a kernel for a GPU: there the composition runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.logs import KERNELS

SOURCE = Path(__file__).with_name("kernel.cpp")

NAME = "sophq_func_kernel"
"""Of the extension module; the source exports the function that initializes it under this name."""

INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""Flags for what torch found this CPU to have; not ``-march=native``, since a home directory may serve many kinds of CPU."""

OPTIMIZED = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic")
"""Of -O3 the part that makes the loops fast; the rest takes a fifth longer to compile."""

EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""A product and a sum stay two roundings, as in torch. Nobody reads ``errno`` or traps; without this promise no loop would
use wide registers."""

NEEDS = "g++ and Python's headers (on Debian the packages g++ and python3-dev); CXX names another compiler"


class Kernel(Protocol):
    """Fake quantization by one quantizer: the tensor, or ``None`` where the composition has to compute it."""

    def __call__(self, x: Tensor, scale: Tensor, zero: Tensor | None, factor: Tensor | None, /) -> Tensor | None: ...


class Library(Protocol):
    """What the extension module holds: a maker of kernels; see ``Uniform`` in ``kernel.cpp``."""

    def Quantizer(  # noqa: N802
        self,
        low: int,
        high: int,
        reciprocal: bool,
        whole: bool,
        learned: bool,
        grad_scaling: int,
        granularity: int,
        axis: int,
        size: int,
        large: int,
        config: str,
        /,
    ) -> Kernel: ...


def find() -> Library | None:
    """The library, if it has been compiled; ``None`` where it has not, or cannot be loaded, which a log says."""
    path = place()
    if not path.exists():
        return None
    try:
        return _load(path)
    except ImportError as error:  # another libstdc++ than where it was compiled, in a home directory of many machines
        KERNELS.warning("%s cannot be loaded, and quantizers are composed: %s", path, error)
        return None


def compiled() -> Library:
    """The library, compiled now if it is not there.

    Raises:
      ConfigError: there is no compiler, or it fails.
    """
    path = place()
    if not path.exists():
        _compile_once(path)
    try:
        return _load(path)
    except ImportError as error:
        raise ConfigError(_refusal(f"{path} cannot be loaded", str(error))) from error


def place() -> Path:
    """Where the library lies: in torch's folder for extensions, under a name that changes with all that it depends on."""
    parts = [SOURCE.read_text(encoding="utf-8"), torch.__version__, platform.machine(), EXTENSION_SUFFIXES[0], *_flags()]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    # The rule of torch.utils.cpp_extension, whose import takes longer than all else here. Unlike Path.expanduser, this does
    # not fail for a user without a home.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(home) / "torch_extensions"
    return Path(extensions) / "sophq_func" / digest / f"{NAME}{EXTENSION_SUFFIXES[0]}"


def _flags() -> list[str]:
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"  # of strings and lists in torch's own libraries
    return [*OPTIMIZED, "-std=c++20", abi, "-fPIC", "-fopenmp", "-fvisibility=hidden", *EXACT, *instructions]


@cache  # an extension module is initialized once in a process
def _load(path: Path) -> Library:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None, "the suffix is that of extension modules"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Library, module)


def _compile_once(path: Path) -> None:
    """Compile, but for what another process compiles at the same time, as all those of one training run do."""
    if os.name != "posix":
        raise ConfigError(_refusal("only Linux is supported", os.name))
    import fcntl  # which other systems do not have

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the system if this process dies
            if not path.exists():
                _compile(path)
    except OSError as error:
        raise ConfigError(
            _refusal("the kernel cannot be written; TORCH_EXTENSIONS_DIR names its folder", str(error))
        ) from error


def _compile(path: Path) -> None:
    """Compile and link in a folder of its own, and move the result, so that no other process loads a part of it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise ConfigError(_refusal("there is no C++ compiler", " ".join(compiler)))
    # only here, since it looks for compilers of its own when it is imported
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{folder}" for folder in (*include_paths(), sysconfig.get_paths()["include"])]
    libraries = [f"-L{folder}" for folder in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch_python"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / path.name
        _run([*compiler, *_flags(), f"-DTORCH_EXTENSION_NAME={NAME}", *includes, "-c", str(SOURCE), "-o", str(made)])
        # without -fopenmp: the threads are those of the OpenMP that torch has loaded, not of another one
        _run([*compiler, "-shared", str(made), *libraries, "-o", str(linked)])
        linked.replace(path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise ConfigError(_refusal("the C++ compiler fails", "; ".join(errors[:3]) or f"exit status {done.returncode}"))


def _refusal(sentence: str, got: str) -> str:
    because, fix = "kernels='compiled' compiles a kernel", f"kernels='auto', or install {NEEDS}"
    return explain("build", sentence, got=got, because=because, fix=fix)
