"""How long tasks wait for memory on Linux (Documentation/accounting/psi.rst)."""

from __future__ import annotations


def stalled_percent(text: str) -> dict[str, float]:
    """Percent of the last ten seconds in which some tasks waited ("some"), and in which all did at once ("full").

    text: of a pressure file such as /proc/pressure/memory. A share that it does not tell is left out.
    """
    shares = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        figures = dict(item.split("=", 1) for item in rest.split() if "=" in item)
        if "avg10" in figures:
            shares[kind] = float(figures["avg10"])
    return shares
