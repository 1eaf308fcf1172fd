"""``HourglassLM`` against ``hourglass-transformer-pytorch`` 0.0.6 over a table of configurations.

``python -m tests.measure.parity`` prints the table, and then the examples of the reference's README
at their own sizes; ``test_model_parity.py`` holds every row to the limits.
"""

from __future__ import annotations

from lucidrains_pairs import (
    CASES,
    LIMITS,
    README,
    Difference,
    compare,
    compare_readme,
    pair_from_ours,
    pair_from_reference,
)


def main() -> None:
    """Print the table."""
    print(
        f"{'largest difference':64} fp64: logits, grads    fp32: logits, grads  size: logit, grad"
    )
    worst = dict.fromkeys(LIMITS, 0.0)
    for case in CASES:
        cells = []
        for dtype in LIMITS:
            found = [compare(*make(case, dtype)) for make in (pair_from_reference, pair_from_ours)]
            difference = Difference(*(max(column) for column in zip(*found, strict=True)))
            worst[dtype] = max(worst[dtype], difference.logits, difference.gradients)
            cells.append(f"{difference.logits:11.1e} {difference.gradients:10.1e}")
        sizes = f"{difference.largest_logit:12.1f} {difference.largest_gradient:10.1f}"
        print(f"{case} {cells[0]} {cells[1]} {sizes}")
    for dtype, limit in LIMITS.items():
        print(f"worst of {len(CASES)} in {dtype}: {worst[dtype]:.1e} (limit {limit:.0e})")
    print("\nthe README's examples, fp32: largest difference with its weights, with ours")
    for name, kwargs in README.items():
        theirs, ours = compare_readme(name, kwargs["max_seq_len"])
        print(f"{name:8} {kwargs['max_seq_len']:5} tokens  {theirs:.1e}  {ours:.1e}")


if __name__ == "__main__":
    main()
