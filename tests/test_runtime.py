"""The runtime file, and what the light processes of the crew import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ktray.crew.needs import Needs, Runtime, load_runtime
from ktray.errors import UserError


def test_a_runtime_file_sets_needs_by_stage_and_keeps_other_defaults(tmp_path: Path) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text("cpus: 8\ndead_after: 60\nstages: {student: {gpus: 0.5}, features: {memory_bytes: 1000}}\n")
    runtime = load_runtime(path)
    assert (runtime.cpus, runtime.dead_after, runtime.heartbeat_seconds) == (8, 60.0, 0.5)
    assert runtime.of("student") == Needs(gpus=0.5)
    assert runtime.of("features") == Needs(memory_bytes=1000, helpers=63)
    assert load_runtime(None) == Runtime()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu: 8", "the field 'cpu' is unknown. Did you mean cpus?"),
        ("cpus: many", "cpus: 'many' is not a whole number from 1"),
        ("heartbeat_seconds: 0", "heartbeat_seconds: 0 is not a number above 0"),
        ("stages: {student: {gpu: 1}}", "stages.student: the field 'gpu' is unknown. Did you mean gpus?"),
        ("stages: [student]", "stages: ['student'] is not a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_runtime_file_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_runtime(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_the_broker_and_its_clients_never_import_torch() -> None:
    modules = "ktray.crew.broker, ktray.crew.client, ktray.crew.worker, ktray.crew.runtime, ktray.crew.ray_pool"
    script = (
        f"import sys, {modules}\nprint([name for name in ('torch', 'ray.tune', 'optuna', 'mlflow') if name in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert said.stdout.strip() == "[]"
