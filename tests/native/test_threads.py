"""Threads and pools as Python sees them; the rest is in native/tests/thread_pool_test.cc and topology_test.cc."""

from __future__ import annotations

import pytest

from kt_sft.native import native


@pytest.fixture(autouse=True)
def restore_threads():
    before = native().num_threads(), native().num_pools()
    yield
    native().set_threads(*before, fake_nodes=False)


def test_no_more_threads_than_cpus_and_quota():
    native().set_threads(5000)
    assert native().num_threads() == native().max_threads() <= native().cpu_info()["logical_cpus"]
    assert native().default_threads() <= native().max_threads()


def test_pools_default_to_the_numa_nodes():
    native().set_threads(native().max_threads())
    nodes = native().cpu_info()["numa_nodes"]
    assert native().num_pools() == min(len(nodes), native().num_threads())
    assert len(native().cpu_info()["numa_node_ids"]) == len(nodes)


def test_fake_nodes_take_any_number():
    for threads, pools in ((1, 3), (3, 2), (5, 5)):
        native().set_threads(threads, pools, fake_nodes=True)
        assert (native().num_threads(), native().num_pools()) == (threads, pools)


@pytest.mark.parametrize(("threads", "pools"), [(0, 1), (2, 999), (2, -1)])
def test_refusals(threads, pools):
    with pytest.raises(ValueError, match="threads: expected at least 1|threadpool_count: expected"):
        native().set_threads(threads, pools)
