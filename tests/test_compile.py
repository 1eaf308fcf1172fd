"""``torch.compile`` takes every kind of model whole: no graph break, no second compilation."""

from __future__ import annotations

import pytest
import torch
from test_recompute import with_policy
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import documents_of, farthest, make_model, random_text


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("seed", "none"), ("paper, words", "full"), ("modern, words", "selective")],
)
def test_one_graph_for_all_batches_of_a_shape(kind: str, policy: str) -> None:
    """Other texts have other words and documents; the shapes stay, and so does the graph."""
    torch._dynamo.reset()
    plain = make_model(kind, "by 2")
    model = with_policy(plain, policy)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for seed, lengths in ((0, (4, 9, 1, 12)), (3, (13, 13))):
        given = {
            "tokens_BL": random_text(2, 26, seed),
            "targets_BL": random_text(2, 26, seed + 1),
            "documents_BL": documents_of(*lengths).expand(2, -1),
        }
        model.zero_grad()
        plain.zero_grad()
        nats, _ = compiled(**given)
        nats.backward()
        expected, _ = plain(**given)
        expected.backward()
        torch.testing.assert_close(nats, expected)
        for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None and other.grad is not None:
                assert farthest(one.grad, other.grad) < 1e-9, name
    assert counter.frame_count == 1
