"""Conformance suites and Hypothesis strategies for authors of plug-ins.

A suite is a class to derive from in a test module::

    from mplus.testing.retrievers import RetrieverConformance

    class TestRecency(RetrieverConformance):
        implementation = RecencyRetriever

Needs pytest and hypothesis.
"""

import pytest

# Failing asserts in the suites then show the values compared, as those in test modules do.
pytest.register_assert_rewrite(
    *(
        f"mplus.testing.{module}"
        for module in (
            "backends",
            "eviction",
            "mechanisms",
            "objectives",
            "retrievers",
            "rounding",
            "sources",
            "store_model",
            "stores",
        )
    )
)
