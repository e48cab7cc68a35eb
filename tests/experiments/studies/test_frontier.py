"""The cost model's terms are those of compiled programs, its trends the paper's; choices fit in memory."""

import json

import pytest

from experiments.studies import frontier as study
from frugax.planner import configurations, device_bytes, latency, search, transformer_workload
from tests.devices import run_on_eight_devices


@pytest.mark.full
def test_terms_are_those_of_compiled_programs():
    for terms in json.loads(run_on_eight_devices("experiments.studies.frontier", "--check")):
        assert terms.pop("other axes")["compiled"] == 0
        assert len(terms) >= 2
        for name, term in terms.items():
            assert term["compiled"] == pytest.approx(term["model"], rel=1e-4), name
            assert term["model"] > 0


def test_trends_are_the_papers():
    found = study.trends()
    tensor = found["devices of the tensor axis"]
    assert tensor["8"] > 1.5 * tensor["16"] > 1.5 * tensor["32"]  # beyond a node links are slow
    microbatches = list(found["microbatches, 8 stages"].values())
    assert microbatches == sorted(microbatches)  # they fill the bubble
    stages = found["stages, 16 microbatches"]
    assert stages["16"] < 0.8 * stages["4"]  # which grows with stages
    a_stage = found["stages, 8 microbatches a stage"].values()
    assert max(a_stage) < 1.15 * min(a_stage)  # but not where microbatches grow with them


def test_the_search_is_brute_force_under_the_memory():
    work = transformer_workload(layers=8, width=1024, batch=32, time=2048)
    cluster = study.frontier(16)._replace(memory=1.5e9)
    every = list(configurations(work, 16))
    fit = [c for c in every if device_bytes(work, c) <= 1.5e9]
    assert 0 < len(fit) < len(every)
    first = search(work, cluster, steps=0, keep=1)[0]
    assert first.bytes <= 1.5e9
    assert first.seconds == min(latency(work, c, cluster).seconds for c in fit)
