"""Whether the named tensors of a file are those of a model, and which sizes they speak for.

Shared by the rooms that read weights. What they find is named: the first few names, and how many more.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from synbrain_jax.errors import InputError

_LISTED = 5
_FLOATS = ("float32", "float16", "bfloat16")


def listed(items: Iterable, separator: str = ", ") -> str:
    """The first few in order, for a message.

    >>> listed("gfedcba")
    'a, b, c, d, e and 2 more'
    """
    items = sorted(map(str, items))
    more = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def check_tensors(tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], where: str, model: str) -> None:
    """Raises InputError unless `tensors` are exactly those `expected`, floating-point and of the given shapes.

    Tensors are anything with a shape and a dtype. `where` names their origin, `model` whose they should be.
    """
    missing, left_over = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    found = [f"{listed(names)} {what}" for what, names in (("missing", missing), ("not expected", left_over)) if names]
    if found:
        raise InputError(f"{where}: {'; '.join(found)}. Expected exactly the tensors of {model}.")
    wrong = [
        f"{key} has shape {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if tuple(tensors[key].shape) != tuple(shape)
    ]
    wrong += [f"{key} holds {tensors[key].dtype}" for key in expected if str(tensors[key].dtype) not in _FLOATS]
    if wrong:
        raise InputError(f"{where}: {listed(wrong, '; ')}. All must hold {', '.join(_FLOATS)} and fit one another.")


def agreed_size(tensors: Mapping[str, Any], where: str, *places: tuple[str, int]) -> int:
    """The size that most of some (key, axis) agree on, so that a single wrong tensor does not decide.

    Raises InputError if none of them is there.
    """
    seen = Counter(
        tensors[key].shape[axis] for key, axis in places if key in tensors and len(tensors[key].shape) > axis
    )
    if not seen:
        raise InputError(
            f"{where}: {places[0][0]} is missing or has too few axes; these are not the weights of this kind of model"
        )
    return seen.most_common(1)[0][0]
