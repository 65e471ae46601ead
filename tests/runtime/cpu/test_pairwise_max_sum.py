"""pairwise_max_sum against float64, and its promise of one fixed order."""

import numpy as np
import pytest
import torch
from sparsify_export import _native
from sparsify_export.passes.equivalence import compare


def test_by_hand():
    a, b = np.array([[1, 5], [2, -1]], np.float32), np.array([[3, 0, 9], [0, 0, -7]], np.float32)
    assert _native.pairwise_max_sum(a, b).tolist() == [[5, 3, 11], [5, 5, 8]]


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 300])
@pytest.mark.parametrize(("k1", "k2"), [(0, 3), (1, 1), (6, 64), (7, 65), (49, 257), (130, 31)])
def test_equals_float64(rows, k1, k2):
    rng = np.random.default_rng(rows)
    a, b = rng.standard_normal((rows, k1), np.float32), rng.standard_normal((rows, k2), np.float32)
    exact = np.maximum(a[:, :, None].astype(np.float64), b[:, None, :]).sum(axis=0)
    baseline = np.zeros((k1, k2), np.float32)
    for left, right in zip(a, b, strict=True):
        baseline += np.maximum(left[:, None], right)
    got = _native.pairwise_max_sum(a, b)
    assert got.dtype == np.float64
    closeness = compare(torch.from_numpy(got.astype(np.float32)), torch.from_numpy(baseline), torch.from_numpy(exact))
    assert closeness.ok, str(closeness)


def test_does_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((500, 90), np.float32), rng.standard_normal((500, 700), np.float32)
    before = _native.num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            _native.set_num_threads(threads)
            results.append(_native.pairwise_max_sum(a, b))
    finally:
        _native.set_num_threads(before)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
