"""Reads what a traced program computes, for tests that look into jaxprs."""

from collections.abc import Iterator


def products(jaxpr, repeats: int = 1) -> Iterator[tuple]:
    """Every dot_general in a jaxpr and the ones it calls, and how often it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation, repeats
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in (getattr(value, "jaxpr", value) for value in equation.params.values()):
            if hasattr(inner, "eqns"):
                yield from products(inner, repeats * times)
