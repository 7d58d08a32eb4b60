"""The data sets against the package they come from."""

import sys

import pytest
import torch
from sklearn.datasets import load_digits

from artlib.zoo import digits


def test_digits_are_scikit_learns_exactly():
    images, source = digits(), load_digits().images
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    # 17 grey levels, each exact in float32, so that the way back loses nothing.
    assert ((images[:, 0].double() + 1) * 8).tolist() == source.tolist()
    assert float(images.min()) == -1.0
    assert float(images.max()) == 1.0


def test_labels_on_request_are_those_of_the_images():
    images, labels = digits(return_labels=True)
    assert torch.equal(images, digits())
    assert labels.dtype == torch.int64
    assert labels.tolist() == load_digits().target.tolist()


def test_each_call_returns_its_own_memory():
    digits().zero_()
    assert float(digits().abs().sum()) > 0


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install .*art-diffusion\[book\]"):
        digits()
