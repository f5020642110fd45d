"""The laws of number formats, and the check that holds one to them."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.public import public_as
from sophq_func.numerics.formats import FORMATS, Format
from sophq_func.testing.laws import Law, check_all, law

SEVENTHS = torch.arange(-16.0, 17.0, dtype=torch.float64) / 14
"""Shares of the largest value, from beyond it to beyond the other end; few of them are values of a format."""


def table(form: Format) -> Tensor:
    """The values as float32, which is what codebooks round to, in float64."""
    return form.values().float().double()


def nearest(form: Format, x: Tensor) -> Tensor:
    """The distance of each element to the nearest value."""
    return (x.double()[:, None] - table(form)[None]).abs().amin(-1)


def inside(form: Format) -> Tensor:
    """Numbers between the smallest and the largest value, float64."""
    values = table(form)
    return (SEVENTHS * form.largest).clamp(values[0], values[-1])


@law()
def values_are_finite_ascending_and_end_with_the_largest(form: Format) -> None:
    """``values`` are float64, finite, ascending, each once; the last is ``largest``."""
    values = form.values()
    assert values.dtype == torch.float64
    assert bool(values.isfinite().all())
    assert bool((values.diff() > 0).all())
    assert float(values[-1]) == form.largest > 0


@law()
def values_stay_as_they_are(form: Format) -> None:
    """Every value is rounded to itself."""
    values = table(form)
    assert torch.equal(form.round(values), values)


@law()
def numbers_become_the_nearest_value(form: Format) -> None:
    """No value is nearer than the one that a number is rounded to."""
    x = inside(form)
    rounded = form.round(x)
    assert bool((nearest(form, rounded) == 0).all())
    # midpoints between the values of a codebook are float32, too
    assert bool(((rounded - x).abs() <= nearest(form, x) + 2.0**-23 * form.largest).all())


@law()
def dtype_and_shape_come_back(form: Format) -> None:
    """The result has the shape and the dtype of the tensor, which is not written to."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = SEVENTHS.to(dtype).reshape(3, 11)
        before = x.clone()
        y = form.round(x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert torch.equal(x, before)


@law()
def nan_stays_nan(form: Format) -> None:
    """NaN is rounded to NaN."""
    assert bool(form.round(torch.tensor([torch.nan])).isnan().all())


@law()
def no_gradient_passes(form: Format) -> None:
    """The result requires no gradient."""
    assert not form.round(SEVENTHS.clone().requires_grad_()).requires_grad


@law()
def vmap_equals_the_loop(form: Format) -> None:
    """Rounding under ``vmap`` equals the loop."""
    x = inside(form).reshape(3, 11)
    assert torch.equal(torch.vmap(form.round)(x), torch.stack([form.round(row) for row in x]))


@law()
def noise_decides_between_the_neighbours(form: Format) -> None:
    """With noise near 0 a number is rounded up, with noise near 1 down, to one of its two neighbours."""
    x = inside(form)[1:-1]
    up, down = form.round(x, torch.zeros_like(x)), form.round(x, torch.full_like(x, 1 - 2.0**-20))
    assert bool((nearest(form, up) == 0).all() and (nearest(form, down) == 0).all())
    assert bool((down <= up).all())
    values = table(form)
    steps = torch.searchsorted(values, up) - torch.searchsorted(values, down)
    assert bool((steps <= 1).all())


LAWS = tuple(one for one in list(globals().values()) if isinstance(one, Law))
"""All of them, in the order in which they are tried."""


@public_as("testing.check_format")
def check_format(form: Format | str) -> None:
    """Hold a number format to the laws that the library's own obey.

    Args:
      form: the name of a registered format; or one that is not registered yet, from ``sq.formats.int_``, ``float_`` or
        ``codebook``, or an object of your own with ``largest``, ``values`` and ``round``. What
        :func:`sophq_func.register.format` makes of it is a fake quantizer, see :func:`check_fake_quantizer`.

    Raises:
      ConfigError: an unknown name, or no format.
      LawError: an ``AssertionError`` that names each law that is broken.

    Example:
      >>> import sophq_func as sq
      >>> sq.testing.check_format(sq.formats.float_(3, 4))
    """
    if isinstance(form, str):
        form = FORMATS.get(form)
    if not all(hasattr(form, attribute) for attribute in ("largest", "values", "round")):
        fix = "sq.testing.check_format(sq.formats.float_(4, 3))"
        raise ConfigError(explain("testing.check_format", "this is no format", got=form, fix=fix))
    check_all("format", form, LAWS, (), slow=False)
