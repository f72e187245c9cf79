"""Muon's iterations against numpy's singular values; its steps, against torch's, are in test_optimization.py."""

import numpy as np
import pytest
import torch

from modeling_vit_scratch.training import muon
from modeling_vit_scratch.training.muon import COEFFICIENTS, NUM_ITERATIONS, orthogonalised


@pytest.mark.parametrize("rows, columns", [(24, 24), (40, 16), (16, 40)])
def test_muons_update_is_nearly_the_orthogonal_factor_of_each_matrix(rows, columns):
    matrices = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(0))
    left, _, right = np.linalg.svd(matrices.numpy(), full_matrices=False)
    found = orthogonalised(matrices, torch.bfloat16).double().numpy()
    values = np.linalg.svd(found, compute_uv=False)
    assert found.shape == matrices.shape and values.max() < 1.3
    assert rows == columns or values.min() > 0.6  # a square one has singular values near zero, which stay smaller
    cosines = (found * (left @ right)).sum((1, 2)) / np.linalg.norm(found, axis=(1, 2)) / min(rows, columns) ** 0.5
    assert cosines.min() > 0.95


@pytest.mark.parametrize("compute_dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_muons_iterations_are_those_of_double_precision_but_for_their_rounding(
    compute_dtype, tolerance, library, monkeypatch
):
    monkeypatch.setattr(muon, "SMALLEST_SIDE", 1)
    matrices = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 1e4  # whose squares float16 lacks
    found = orthogonalised(matrices, compute_dtype)
    assert found.dtype == (compute_dtype or torch.float32)
    for matrix, update in zip(matrices.double().numpy(), found.double().numpy(), strict=True):
        left, values, right = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
        for _ in range(NUM_ITERATIONS):  # a product of U S V^T, its transpose and itself changes S alone
            values = np.polynomial.Polynomial([0, COEFFICIENTS[0], 0, COEFFICIENTS[1], 0, COEFFICIENTS[2]])(values)
        np.testing.assert_allclose(update, left * values @ right, atol=tolerance)
