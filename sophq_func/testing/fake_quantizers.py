"""The check that holds a fake quantizer to its laws."""

from __future__ import annotations

from collections.abc import Callable, Collection

from sophq_func.core.public import public_as
from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from sophq_func.testing import fake_derivatives, fake_values
from sophq_func.testing.fakes import VARIANTS
from sophq_func.testing.laws import check_all
from sophq_func.testing.pieces import Piece, piece_of

LAWS = (*fake_values.LAWS, *fake_derivatives.LAWS)
"""All of them, in the order in which they are tried."""


@public_as("testing.check_fake_quantizer")
def check_fake_quantizer(
    name: str | Spec | Callable[[], Spec], *, without: Collection[str] = (), slow: bool = False
) -> None:
    """Hold a registered fake quantizer to the laws that the library's own obey.

    Args:
      name: of the fake quantizer; or the function that :func:`sophq_func.register.fake_quantizer` made, or what it returns,
        with options.
      without: names of laws that it does not claim, which its docstring should say, too: one with a scale for each block
        breaks ``order_is_kept``.
      slow: try the laws about compiling and about tiny and huge values, too, which takes a minute.

    Raises:
      ConfigError: an unknown fake quantizer or law, or a fake quantizer that is not registered.
      LawError: an ``AssertionError`` that names each law that is broken, with a case.

    Example:
      >>> import sophq_func as sq
      >>> sq.testing.check_fake_quantizer("fixed")
      >>> sq.testing.check_fake_quantizer(sq.fake_quantize.pact(alpha=3.0))
    """
    piece = piece_of(FAKE_QUANTIZERS, name, "testing.check_fake_quantizer")
    check_all("fake quantizer", _variant(piece), LAWS, without, slow)


def _variant(piece: Piece) -> Piece:
    """The name in ``VARIANTS`` of a piece with these options, as ``EXCEPT`` knows it; else the piece."""
    known = {FAKE_QUANTIZERS.spec(name, **options): variant for variant, (name, options) in VARIANTS.items()}
    return known.get(piece, piece) if isinstance(piece, Spec) else piece
