"""Short labels for dotted parameter names."""

from __future__ import annotations

from collections.abc import Sequence


def without_prefix(names: Sequence[str]) -> list[str]:
    """Remove the leading modules that all names share.

    Args:
        names: Dotted names.

    Returns:
        The names, each with at least its last part.

    >>> without_prefix(["net.model.0.weight", "net.model.0.bias"])
    ['weight', 'bias']
    """
    parts = [n.split(".") for n in names]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def shorten(name: str, room: int) -> str:
    """Shorten a dotted name and keep its end, which says most.

    Leading modules shrink to their first letter (numbers stay), then they are removed.

    Args:
        name: Dotted name.
        room: Largest length, characters.

    Returns:
        At most ``room`` characters.

    >>> shorten("encoder.layers.11.self_attn.out_proj.weight", 24)
    'e.l.11.s.out_proj.weight'
    """
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if len(".".join(parts)) <= room:
            break
        parts[i] = parts[i] if parts[i].isdigit() else parts[i][:1]
    while len(parts) > 1 and len(".".join(parts)) > room:
        del parts[0]
    return ".".join(parts)[-room:]
