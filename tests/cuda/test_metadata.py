"""Where mma.sp's metadata lies, against torch's conversion, which is CUTLASS's: the words that run on GPUs today.

``sparse_semi_structured_from_dense_cutlass`` (torch/sparse/_semi_structured_conversions.py) reorders as CUTLASS's
``reorder_meta`` (tools/util/include/cutlass/util/host_reorder.h), for a layout in which a warp loads one 32-bit word a
lane for 32 rows and 32 columns: word l of a block of 32 rows goes to lane l, and the product of its first 16 rows
takes the words of lanes 4 g and 4 g + 1 (selector 0), that of the other 16 those of 4 g + 2 and 4 g + 3 (selector 1).
Our product takes 64 columns of the same 16 rows with both selectors.
"""

import ctypes

import pytest
import torch
from cuda_emulated import SUCCESS
from packing import sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

ROWS, COLUMNS = 64, 256


@pytest.mark.parametrize("wide", [1, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_word_is_that_of_torch_and_cutlass(kernels, dtype, wide):
    weight = sparse_nm(ROWS, COLUMNS // 4, NM(2, 4), seed=5)
    values, indices = linear_nm.pack(weight, NM(2, 4), dtype)
    kept, theirs = sparse_semi_structured_from_dense_cutlass(weight.to(dtype))
    assert torch.equal(kept, values)
    ours = torch.empty(ROWS // 16, COLUMNS // 64, 32, dtype=torch.int32)
    assert kernels.call("test_metadata", ctypes.c_int32(wide), indices, ours, ROWS, COLUMNS) == SUCCESS
    theirs = theirs.contiguous().view(torch.int32).reshape(COLUMNS // 32, ROWS // 32, 32)  # [columns, rows, lane]
    compared = 0
    for rows in range(ROWS // 16):
        for columns in range(COLUMNS // 32):
            for g in range(8):
                for half in range(2):  # 16 of the 32 columns
                    mine = ours[rows, columns // 2, 4 * g + 2 * (columns % 2) + half]
                    assert mine == theirs[columns, rows // 2, 4 * g + 2 * (rows % 2) + half]
                    compared += 1
    assert compared == ours.numel() == 512
