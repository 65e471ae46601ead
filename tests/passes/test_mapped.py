"""Tensors in mapped files: the same numbers, no memory, and no file that stays."""

import os
from pathlib import Path

import pytest
import torch
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.mapped import LEAST, is_mapped, mapped, parameters_mapped

MIB = 1 << 20


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_the_same_numbers_in_whatever_order_they_lie(dtype):
    for tensor in (torch.randn(300, 500), torch.randn(500, 300).t(), torch.randn(600, 500)[::2], torch.randn(1 << 17)):
        typed = tensor > 0 if dtype == torch.bool else tensor.to(dtype)
        found = mapped(typed)
        assert is_mapped(found)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0
        assert torch.equal(found, typed)


def test_small_ones_and_those_that_are_mapped_stay_where_they_are():
    small = torch.randn(LEAST // 4 - 1)
    assert mapped(small).data_ptr() == small.data_ptr()
    held = mapped(torch.randn(LEAST // 4))
    assert mapped(held).data_ptr() == held.data_ptr()
    assert mapped(torch.tensor(1.0)) == 1


def test_it_takes_no_memory_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before, files = anonymous(), len(os.listdir("/proc/self/fd"))
    held = [mapped(torch.ones(48 * MIB // 4)) for _ in range(3)]
    assert sum(int(each.sum()) for each in held) == 3 * 48 * MIB // 4
    assert anonymous() - before < 40 * MIB  # of 144, and malloc keeps none of such a size
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == files


def test_writing_to_one_changes_no_other():
    tensor = torch.zeros(LEAST)
    one, other = mapped(tensor), mapped(tensor)
    one += 1
    assert not other.any()
    assert not mapped(tensor).any()


def test_a_full_disk_is_said(monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *given):
            return None

        def write(self, raw):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    with pytest.raises(InputError, match=r"cannot be kept in .*: No space left on device; TMPDIR names another folder"):
        mapped(torch.zeros(LEAST))


def test_parameters_are_mapped_as_modules_get_them():
    with parameters_mapped():
        held = torch.nn.Linear(500, 300)
        meta = torch.nn.Linear(500, 300, device="meta")
    assert is_mapped(held.weight)
    assert held.weight.requires_grad
    assert not is_mapped(held.bias)  # it is small
    assert meta.weight.is_meta
    assert not is_mapped(torch.nn.Linear(500, 300).weight)
