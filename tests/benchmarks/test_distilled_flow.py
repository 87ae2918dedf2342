"""Variants a second of a student of one step beside its teacher's eight.

`pytest tests/benchmarks/test_distilled_flow.py --benchmark-only`. Aim: four times its teacher. The two have the same
network, so that weights do not matter: the student here is the built-in flow of the digits, said to be one. They take
turns, batch by batch.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time

import pytest
import torch

from genssl.generators.configs import FlowConfig
from genssl.generators.flow import Flow
from genssl.generators.models import BUILTIN

BATCH, ROUNDS = 64, 40


@pytest.mark.benchmark(group="distilled flow")
def test_one_step_against_eight(benchmark, tmp_path):
    shutil.copytree(BUILTIN / "digits-flow", tmp_path / "student")
    facts = json.loads((tmp_path / "student" / "config.json").read_text())
    (tmp_path / "student" / "config.json").write_text(json.dumps(facts | {"student_steps": 1}))
    cpu = torch.device("cpu")
    student = Flow(FlowConfig(model=str(tmp_path / "student")), cpu)
    teacher = Flow(FlowConfig(model="builtin:digits-flow", num_inference_steps=8), cpu)
    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(BATCH, student.spec.embedding_dim, generator=random)
    seconds: dict[Flow, list[float]] = {student: [], teacher: []}

    def timed(generator: Flow) -> None:
        begun = time.perf_counter()
        generator.generate(embeddings, range(BATCH), [generator.spec.defaults] * BATCH)
        seconds[generator].append(time.perf_counter() - begun)

    benchmark.pedantic(lambda: timed(student), setup=lambda: timed(teacher), rounds=ROUNDS, warmup_rounds=2)
    rates = {
        name: BATCH / statistics.median(seconds[one]) for name, one in (("student", student), ("teacher", teacher))
    }
    benchmark.extra_info |= {f"{name}_variants_per_second": round(rate) for name, rate in rates.items()}
    benchmark.extra_info |= {"ratio": round(rates["student"] / rates["teacher"], 2), "threads": torch.get_num_threads()}
    assert rates["student"] >= 4 * rates["teacher"]
