"""Sharded exact top-k against a float64 brute force, over actors, and with an actor killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cluster.errors import ClusterError
from cluster.live_topk import LiveTopK
from cluster.metrics import Metrics
from cluster.settings import ActorsConfig
from cluster.topk import TopK, cut, read_rows
from cluster.topk_kernels import FaissKernel, TopKKernel, TorchKernel, from_keys, to_keys
from instdisc.common.metrics import EVALUATION
from tests.ray_cluster import RayCluster

HERE = ActorsConfig(num_actors=0)
Found = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def unit_rows(count: int, dim: int, seed: int) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def coarse_rows(count: int, dim: int, seed: int) -> npt.NDArray[np.float32]:
    """Small multiples of 1/8, whose products are exact in float32, and in half precision, and often equal."""
    return (np.random.default_rng(seed).integers(-4, 5, (count, dim)) / 8).astype(np.float32)


def brute_force(
    queries: npt.NDArray[Any], rows: npt.NDArray[Any], k: int, excluded: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    if excluded is not None:
        asked = np.flatnonzero(excluded >= 0)
        scores[asked, excluded[asked]] = -np.inf
    scores[:, np.isnan(rows).any(axis=1)] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(rows)), scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def kernel(name: str, rows: npt.NDArray[np.float32], start: int = 0) -> TopKKernel:
    return FaissKernel(rows.copy(), start, 2) if name == "faiss" else TorchKernel(rows.copy(), start, "cpu")


def search(name: str, *arguments: Any, start: int = 0) -> Found:
    queries, rows, k, *excluded = arguments
    out = excluded[0] if excluded else np.full(len(queries), -1)
    return from_keys(kernel(name, rows, start).search(queries, k, out))


class ArrayRows:
    """An array in memory as a source."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    @property
    def num_rows(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self._array[start:stop]


def test_keys_sort_by_score_then_row() -> None:
    scores = np.array([0.5, -0.0, 0.0, -1.5, 0.5, np.inf, -np.inf, 1e-40, -1e-40], np.float32)
    rows = np.array([2**32 - 1, 8, 7, 1, 3, 4, 5, 6, 9])
    keys = np.sort(to_keys(scores, rows))
    sorted_scores, sorted_rows = from_keys(keys)
    assert sorted_rows.tolist() == [4, 3, 2**32 - 1, 6, 7, 8, 9, 1, 5]
    np.testing.assert_array_equal(sorted_scores, np.sort(scores)[::-1])
    assert from_keys(to_keys(np.float32([3]), np.array([-1]))) == (-np.inf, -1)


@pytest.mark.parametrize("name", ["faiss", "torch"])
@pytest.mark.parametrize("k", [1, 7, 200, 2500])
def test_ties_are_exactly_those_of_a_brute_force(name: str, k: int) -> None:
    queries, rows = coarse_rows(300, 16, seed=1), coarse_rows(2500, 16, seed=2)
    rows[1000:1300] = rows[50]
    scores, found = search(name, queries, rows, k)
    exact, expected = brute_force(queries, rows, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, exact)


@pytest.mark.parametrize("k", [7, 200])
def test_a_kernel_gives_the_same_bits_whatever_its_tiles(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    queries, rows = unit_rows(300, 64, seed=1), unit_rows(2500, 64, seed=2)
    rows[1000:1300] = rows[50]
    whole = search("torch", queries, rows, k)
    monkeypatch.setattr(TorchKernel, "_TILE", 96)
    for one, other in zip(whole, search("torch", queries, rows, k), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["faiss", "torch"])
def test_a_bank_of_one_vector_gives_the_first_rows(name: str) -> None:
    rows = np.tile(unit_rows(1, 32, seed=0), (20_000, 1))
    _, found = search(name, rows[:5], rows, 40, np.array([-1, 0, 7, 39, 19_999]))
    assert found[0].tolist() == list(range(40))
    assert found[1].tolist() == list(range(1, 41))
    assert found[3].tolist() == [*range(39), 40]


@pytest.mark.parametrize("name", ["faiss", "torch"])
@pytest.mark.parametrize("concentrated", [False, True])
def test_unit_rows_agree_up_to_rounding(name: str, concentrated: bool) -> None:
    queries, rows = unit_rows(300, 128, seed=1), unit_rows(6000, 128, seed=2)
    if concentrated:  # as in a network that has learned little: all scores within a few thousandths
        rows = rows * np.float32(0.01) + unit_rows(1, 128, seed=3)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    excluded = np.arange(300) * 3 - 1
    scores, found = search(name, queries, rows, 200, excluded)
    exact, _ = brute_force(queries, rows, 200, excluded)
    np.testing.assert_allclose(scores, exact, rtol=0, atol=1e-6)
    own = np.einsum("qkd,qd->qk", rows[found].astype(np.float64), queries.astype(np.float64))
    np.testing.assert_allclose(own, exact, rtol=0, atol=1e-6)
    assert all(len(set(row)) == 200 for row in found.tolist())
    assert not (found == excluded[:, None]).any()


@pytest.mark.parametrize("name", ["faiss", "torch"])
def test_rows_of_nan_are_never_found(name: str) -> None:
    queries, rows = coarse_rows(20, 16, seed=1), coarse_rows(1500, 16, seed=2)
    rows[10:900] = np.nan
    scores, found = search(name, queries, rows, 700)
    exact, expected = brute_force(queries, rows, 700)
    np.testing.assert_array_equal(found[:, :610], expected[:, :610])
    np.testing.assert_array_equal(scores, exact)
    assert (found[:, 610:] == -1).all()


def test_blocks_are_cut_whole_and_cover_all_rows() -> None:
    assert cut(5000, 3) == [(0, 1024), (1024, 3072), (3072, 5000)]
    assert cut(1000, 4) == [(0, 1000)]
    for rows, actors in [(1, 1), (1024, 2), (1025, 2), (1_281_167, 7)]:
        parts = cut(rows, actors)
        assert [start for start, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (0, rows)


def test_in_this_process_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.topk._QUERIES_AT_A_TIME", 512)
    queries, rows = coarse_rows(1100, 16, seed=1), coarse_rows(3000, 16, seed=2)
    with TopK(ArrayRows(rows), HERE) as top_k:
        scores, found = top_k.search(queries, 9)
        none = top_k.search(queries[:0], 9)
    exact, expected = brute_force(queries, rows, 9)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, exact)
    assert none[0].shape == none[1].shape == (0, 9)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.float32]:
    rows = unit_rows(9000, 64, seed=2)
    rows[5000:5040] = rows[100]
    rows[8990] = np.nan
    return rows


@pytest.mark.parametrize("num_actors", [1, 2, 4])
def test_any_number_of_actors_gives_the_same_bits(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, table: npt.NDArray[np.float32], num_actors: int
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    queries = np.concatenate([table[:2500:5], unit_rows(4200, 64, seed=1)])
    excluded = np.concatenate([np.arange(0, 2500, 5), np.full(4200, -1)])
    with TopK(ArrayRows(table), HERE) as here:
        expected = here.search(queries, 100, excluded=excluded)
    config = ActorsConfig(num_actors=num_actors, cpus_per_actor=0.5)
    with TopK(ArrayRows(table), config) as top_k:
        found = top_k.search(queries, 100, excluded=excluded)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


class PidRows(ArrayRows):
    """Notes which processes read it."""

    def __init__(self, array: npt.NDArray[Any], notes: Path) -> None:
        super().__init__(array)
        self._notes = notes

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        with (self._notes / f"{start}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().read(start, stop)


def test_a_killed_actor_comes_back_unseen(
    ray_cluster: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
    table: npt.NDArray[np.float32],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    monkeypatch.setattr("cluster.topk._QUERIES_AT_A_TIME", 256)
    queries = unit_rows(3000, 64, seed=1)
    metrics = Metrics(EVALUATION, run="test", rank=0)
    config = ActorsConfig(num_actors=2, cpus_per_actor=1)
    with TopK(PidRows(table, tmp_path), config, metrics) as top_k:
        expected = top_k.search(queries, 50)
        victim = int((tmp_path / "0").read_text())
        answers = top_k._search_actors(queries, np.full(len(queries), -1), 50)
        parts = [next(answers)]
        os.kill(victim, signal.SIGKILL)  # with blocks of queries under way
        parts += answers
    found = from_keys(np.concatenate([keys for _, keys in parts]))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert len(set((tmp_path / "0").read_text().split())) == 2
    labels = {"run": "test", "rank": "0"}
    values = {
        name: metrics.registry.get_sample_value(f"instdisc_evaluation_{name}", labels)
        for name in ("actors", "rows", "queries_total", "actor_restarts_total", "search_seconds_count")
    }
    assert values == {
        "actors": 2,
        "rows": len(table),
        "queries_total": 3000,
        "actor_restarts_total": 1,
        "search_seconds_count": 12,
    }


class BrokenRows(ArrayRows):
    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        if start:
            raise FileNotFoundError("shard 7 is gone")
        return super().read(start, stop)


def test_errors_of_the_source_arrive_as_they_are(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, table: npt.NDArray[np.float32]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    config = ActorsConfig(num_actors=2, cpus_per_actor=1)
    with pytest.raises(FileNotFoundError, match="shard 7 is gone"):
        TopK(BrokenRows(table), config)
    with pytest.raises(FileNotFoundError, match="shard 7 is gone"):
        read_rows(BrokenRows(table), config)
    with pytest.raises(ClusterError, match="--num-actors"):
        TopK(ArrayRows(table), ActorsConfig(num_actors=3, cpus_per_actor=1))
    with pytest.raises(ClusterError, match="nothing to search"):
        TopK(ArrayRows(table[:0]), HERE)


def test_rows_are_read_by_several_processes_in_order(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    rows = np.arange(2001, dtype=np.float32)[:, None]
    source = PidRows(rows, tmp_path)
    np.testing.assert_array_equal(read_rows(source, ActorsConfig(num_actors=2, cpus_per_actor=1)), rows)
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(read_rows(source, HERE), rows)


@pytest.mark.parametrize("num_actors", [0, 2])
def test_tables_are_replaced_while_they_are_searched(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_actors: int
) -> None:
    """Two tables are there at a time, and an actor that dies comes back with what it is asked for."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    before, after = unit_rows(3000, 16, seed=1), unit_rows(5001, 16, seed=2)
    after[4999] = np.nan
    queries, excluded = unit_rows(300, 16, seed=3), np.full(300, -1)
    excluded[0] = brute_force(queries[:1], after, 1)[1][0, 0]
    config = ActorsConfig(num_actors=num_actors, cpus_per_actor=0.5)
    with LiveTopK(config) as top_k:
        assert top_k.num_actors == num_actors
        tables = top_k.load(ArrayRows(before)), top_k.load(PidRows(after, tmp_path))
        for number in range(2):
            for table, rows in zip(tables, (before, after), strict=True):
                out = excluded if rows is after else None
                scores, found = top_k.search(table, queries, 20, excluded=out)
                exact, expected = brute_force(queries, rows, 20, out)
                np.testing.assert_allclose(scores, exact, atol=1e-6)
                assert (found == expected).mean() > 0.99  # where two are equal but for rounding
            if num_actors and number == 0:  # of both tables it has to load its part again
                os.kill(int((tmp_path / "2048").read_text().splitlines()[-1]), signal.SIGKILL)
        if num_actors:
            assert len((tmp_path / "2048").read_text().splitlines()) == 2
        top_k.drop(tables[0])
