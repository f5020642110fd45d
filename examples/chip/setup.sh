#!/usr/bin/env bash
# setup.sh HOME: the compiler of sophgo's chips, tpu-mlir 1.30.2 with its simulators, in HOME; 2 GB, a few minutes.
# Behind it, `. HOME/env.sh` puts model_transform.py and model_deploy.py on the path. A second run finds all there.
# The compiler's wheel is for CPython 3.10 alone: CHIP_PYTHON names one; else python3.10, or the newest of pyenv.
set -euo pipefail
mkdir -p "$1"
home=$(cd "$1" && pwd)
[[ ! -f $home/env.sh ]] || exit 0

is_310() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null; }
of_pyenv() { ls -d "$(pyenv root 2>/dev/null)"/versions/3.10.*/bin/python 2>/dev/null | sort -Vr; }
python=
# a python3.10 on the path may be one of pyenv's stand-ins, which fails where another version is chosen
for candidate in ${CHIP_PYTHON:-python3.10 $(of_pyenv)}; do
  if is_310 "$candidate"; then python=$candidate && break; fi
done
if [[ -z $python ]]; then
  echo "The compiler needs CPython 3.10, and there is none here: CHIP_PYTHON=/path/to/python3.10 names one." >&2
  exit 3
fi

"$python" -m venv "$home/venv"
install() { "$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# Without the packages that its wheel lists: most serve other tasks, and some are larger than the compiler.
install --no-deps tpu_mlir==1.30.2
install numpy==1.24.3 scipy==1.11.1 tqdm==4.65.0 Pillow==10.0.0 plotly==5.15.0 opencv-python-headless==4.8.0.74 \
  protobuf==3.20.3 graphviz==0.20.1 pycocotools==2.0.6 pandas==2.0.3 onnx==1.14.1 onnxruntime==1.16.3 onnxsim==0.4.17 \
  psutil filelock "setuptools<70"
root=$home/venv/lib/python3.10/site-packages/tpu_mlir
# The C library of another system is among its libraries: with it on the path, every program of this one ends.
rm -f "$root"/lib/third_party/{libc.so.6,libm.so.6,libpthread.so.0}

# Its reader of ONNX imports two packages for a few names; these stand for them.
mkdir -p "$home/shim/torch"
cat > "$home/shim/torch/__init__.py" <<'PYTHON'
"""Stands for torch where the compiler only makes an array of a list."""

import numpy


class tensor:
    def __init__(self, values):
        self.values = numpy.asarray(values)

    def numpy(self):
        return self.values
PYTHON
cat > "$home/shim/onnxruntime_extensions.py" <<'PYTHON'
"""Stands for a package with which the compiler declares one operator of its own that no file here has."""


class PyOp:
    dt_float, dt_int32, dt_int64, dt_string, dt_bool = range(5)


class PyOrtFunction:
    pass


def onnx_op(*args, **options):
    return lambda function: function


def get_library_path():
    return ""
PYTHON

cat > "$home/env.sh.new" <<VARIABLES
export TPUC_ROOT=$root CHIP_HOME=$home OMP_NUM_THREADS=1
export PATH=$home/venv/bin:$root/bin:$root/python/tools:$root/python/utils:\$PATH
export PYTHONPATH=$home/shim:$root/:$root/python/:$root/customlayer/python/
export LD_LIBRARY_PATH=$root/lib:$root/lib/capi:$root/lib/third_party
export PPL_PROJECT_ROOT=$root/cross_toolchains/ppl_compile PPL_RUNTIME_PATH=$root/cross_toolchains/ppl_compile/deps
export TPUKERNEL_CUSTOM_FIRMWARE_PATH=$root/lib/libcmodel_custom.so
VARIABLES
mv "$home/env.sh.new" "$home/env.sh"  # last, so that a setup that was cut off starts again
echo "ready: . $home/env.sh"
