"""What a command sets up for its process; what ends its children is tested with the command line."""

import os

import pytest

from recllm.errors import RecllmError
from recllm.process import Forks, set_up

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_kernels_that_are_kept_are_limited_unless_the_user_says(monkeypatch):
    monkeypatch.setenv(KERNELS, "0")  # so that it is put back as it was
    monkeypatch.delenv(KERNELS)
    set_up()
    assert os.environ[KERNELS] == "128"
    monkeypatch.setenv(KERNELS, "7")
    set_up()
    assert os.environ[KERNELS] == "7"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("used", [True, False])
def test_a_fork_of_a_process_that_used_polars_is_told_and_does_not_hang(used):
    forks = Forks()
    if used:
        forks.check()
        forks.check()
    child = os.fork()
    if child == 0:
        try:
            forks.check()
        except RecllmError as error:
            os._exit(7 if "forked from one that had loaded a bundle" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (7 if used else 0)


def test_what_needs_polars_asks_first(tiny_bundle, monkeypatch):
    import recllm
    from recllm.process import FORKS

    loaded = recllm.load(tiny_bundle)
    monkeypatch.setattr(FORKS, "began", os.getpid() + 1)
    for use in (lambda: recllm.load(tiny_bundle), lambda: loaded.with_items([{"item_id": "new", "title": "New"}])):
        with pytest.raises(RecllmError, match=r"spawn or forkserver"):
            use()
    assert loaded.recommend([["0"]], k=1).ids  # needs none
