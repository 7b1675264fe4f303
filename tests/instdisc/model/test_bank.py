"""The bank starts alike for every partition and holds unit rows after every update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instdisc.model.bank import Bank, random_unit_rows
from tests import reference


@settings(deadline=None, max_examples=20)
@given(start=st.integers(0, 9000), length=st.integers(0, 5000))
def test_a_row_depends_on_seed_and_number_alone(start: int, length: int) -> None:
    whole = random_unit_rows(0, 14_000, 8, seed=3)
    assert torch.equal(random_unit_rows(start, start + length, 8, seed=3), whole[start : start + length])


def test_rows_are_unit_and_spread_over_the_sphere() -> None:
    rows = random_unit_rows(0, 50_000, 16, seed=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(50_000))
    assert rows.mean(dim=0).abs().max() < 0.01
    torch.testing.assert_close(rows.T @ rows / 50_000, torch.eye(16) / 16, rtol=0, atol=2e-3)
    assert not torch.equal(rows, random_unit_rows(0, 50_000, 16, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_update_is_the_formula_and_touches_nothing_else(dtype: torch.dtype, momentum: float) -> None:
    before = random_unit_rows(10, 30, 8, seed=1).to(dtype)
    bank = Bank(before.clone(), start=10)
    ids, embeddings = torch.tensor([12, 29, 10]), random_unit_rows(0, 3, 8, seed=2)
    bank.update(ids, embeddings * torch.nan, momentum=momentum, sound=torch.tensor(False))
    assert torch.equal(bank.rows, before)
    bank.update(ids, embeddings, momentum=momentum, sound=torch.tensor(True))
    expected = before.double().numpy()
    for id_, embedding in zip(ids.tolist(), embeddings.double().numpy(), strict=True):
        expected[id_ - 10] = reference.bank_update(expected[id_ - 10], embedding, momentum)
    assert bank.rows.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(bank.rows.double(), torch.tensor(expected), rtol=0, atol=tolerance)
    torch.testing.assert_close(bank.rows.float().norm(dim=1), torch.ones(20), rtol=0, atol=tolerance)
    untouched = [row for row in range(20) if row + 10 not in ids.tolist()]
    assert torch.equal(bank.rows[untouched], before[untouched])


def test_local_positions() -> None:
    bank = Bank(random_unit_rows(4, 9, 8, seed=0), start=4)
    positions, owned = bank.local(torch.tensor([3, 4, 8, 9, -1]))
    assert owned.tolist() == [False, True, True, False, False]
    assert positions[owned].tolist() == [0, 4]
