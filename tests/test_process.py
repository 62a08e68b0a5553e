"""What a command sets up for its process; what ends its children is tested with the command line."""

import os

from recllm.process import set_up

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_kernels_that_are_kept_are_limited_unless_the_user_says(monkeypatch):
    monkeypatch.setenv(KERNELS, "0")  # so that it is put back as it was
    monkeypatch.delenv(KERNELS)
    set_up()
    assert os.environ[KERNELS] == "128"
    monkeypatch.setenv(KERNELS, "7")
    set_up()
    assert os.environ[KERNELS] == "7"
