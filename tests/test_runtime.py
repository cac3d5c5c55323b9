"""The runtime file, what the light processes of the scheduler import, and what killed sessions leave."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ktray.errors import UserError
from ktray.scheduler import ray_session
from ktray.scheduler.resources import GpuShares, ResourceRequest, RuntimeSettings, load_runtime_settings
from ktray.scheduler.worker_registry import WorkerShape, worker_shape_for
from ktray.stores.locks import lock_home


def test_a_runtime_file_sets_requests_by_stage_and_keeps_other_defaults(tmp_path: Path) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text("cpus: 8\ndead_after: 60\nstages: {student: {gpus: 0.5}, features: {memory_bytes: 1000}}\n")
    runtime = load_runtime_settings(path)
    assert (runtime.cpus, runtime.dead_after, runtime.heartbeat_seconds) == (8, 60.0, 0.5)
    assert runtime.resources_for("student") == ResourceRequest(gpus=0.5)
    assert runtime.resources_for("features") == ResourceRequest(memory_bytes=1000, helpers=63)
    assert load_runtime_settings(None) == RuntimeSettings()


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
        load_runtime_settings(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_the_broker_and_its_clients_never_import_torch() -> None:
    names = ("broker", "client", "worker", "ray_session")
    modules = ", ".join(f"ktray.scheduler.{name}" for name in names)
    script = (
        f"import sys, {modules}\nprint([name for name in ('torch', 'ray.tune', 'optuna', 'mlflow') if name in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "stage", "shape"),
    [
        ("", "student", WorkerShape(0.0, 0.25)),
        ("cpus: 4", "student", WorkerShape(0.0, 0.25)),
        ("stages: {student: {gpus: 0}}", "student", WorkerShape(1.0)),
        ("stages: {student: {gpus: 0, cpus: 2}}", "student", WorkerShape(2.0)),
        ("stages: {student: {gpus: 1}}", "student", WorkerShape(0.0, 1.0)),
        ("stages: {student: {gpus: null}}", "student", WorkerShape(0.0, 0.25)),
        ("stages: {student: {gpus: 0}}", "teacher", WorkerShape(0.0, 0.25)),
        ("stages: {student: {cpus: 2}}", "student", WorkerShape(0.0, 0.25)),
        ("stages: {student: {memory_bytes: 8000000000}}", "student", WorkerShape(0.0, 0.25)),
        ("stages: {features: {helpers: 3}}", "features", WorkerShape(0.0, 0.25)),
        ("stages: {clusters: {cpus: 2}}", "clusters", WorkerShape(0.0, 0.25)),
        ("stages: {pseudo_labels: {cpus: 2}}", "pseudo_labels", WorkerShape(2.0)),
    ],
)
def test_what_runs_a_network_has_a_share_of_a_gpu_unless_the_file_says_how_much_of_one(
    tmp_path: Path, text: str, stage: str, shape: WorkerShape
) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text(text)
    assert worker_shape_for(GpuShares(load_runtime_settings(path).resources_for, lambda: True)(stage)) == shape
    without = worker_shape_for(GpuShares(load_runtime_settings(path).resources_for, lambda: False)(stage))
    assert without.gpus == (1.0 if "gpus: 1" in text else 0.0)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of plugins that Python finds."""
    (tmp_path / "lab_of_tests").mkdir()
    (tmp_path / "lab_of_tests" / "colour.py").write_text("LEVELS = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "")
    return tmp_path / "lab_of_tests" / "colour.py"


def test_drivers_with_other_plugins_never_share_a_scheduler(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = ray_session.code_and_environment_hash()
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "lab_of_tests")
    allowed = ray_session.code_and_environment_hash()
    plugin.write_text("LEVELS = 3\n")
    ray_session._source_hash.cache_clear()  # as in the next driver's process
    assert len({without, allowed, ray_session.code_and_environment_hash()}) == 3


def test_the_order_of_plugins_and_of_folders_does_not_separate_two_drivers(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "lab_of_tests,pictures")
    monkeypatch.setenv("PYTHONPATH", "/one:/two")
    first = ray_session.code_and_environment_hash()
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "pictures,lab_of_tests")
    monkeypatch.setenv("PYTHONPATH", "/two:/one")
    assert ray_session.code_and_environment_hash() == first


def test_only_a_folder_that_we_made_is_removed_as_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, elsewhere = tmp_path / "places", tmp_path / "elsewhere" / "ktray-results"
    places.mkdir()
    elsewhere.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(places))
    ours, link, other = places / "ktray-1", places / "ktray-2", places / "of-others"
    ours.mkdir()
    other.mkdir()
    link.symlink_to(elsewhere)
    for named in (ours, link, other, elsewhere, places / "x" / ".." / ".." / "elsewhere" / "ktray-results", places / "ktray-3"):
        (tmp_path / "ray").write_text(str(named))
        ray_session.remove_folders_of_killed_sessions(tmp_path)
    assert not ours.exists()
    assert elsewhere.is_dir()
    assert other.is_dir()
    assert link.is_symlink()


def test_a_folder_of_another_user_is_no_leftover_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "ktray-1").mkdir()
    (tmp_path / "ray").write_text(str(tmp_path / "ktray-1"))
    monkeypatch.setattr("os.getuid", lambda: (tmp_path / "ktray-1").stat().st_uid + 1)
    ray_session.remove_folders_of_killed_sessions(tmp_path)
    assert (tmp_path / "ktray-1").is_dir()


def test_a_leftover_that_fills_again_while_it_is_removed_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stays, goes = tmp_path / "ktray-1", tmp_path / "ktray-2"
    for folder in (stays, goes):
        folder.mkdir()
    (tmp_path / "ray").write_text(f"{stays}\n{goes}\n")

    def refilled(folder: Path, ignore_errors: bool) -> None:  # as by a process of Ray that outlives its killed driver
        if folder == goes:
            folder.rmdir()

    with monkeypatch.context() as raced:
        raced.setattr("shutil.rmtree", refilled)
        assert ray_session.remove_folders_of_killed_sessions(tmp_path) == [stays]
    assert ray_session.remove_folders_of_killed_sessions(tmp_path) == []
    assert not stays.exists()


def test_commands_without_ray_remove_what_a_killed_session_left_unless_a_session_uses_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ray_session.remove_stale_folders(tmp_path)
    assert not (tmp_path / "lock").exists()
    (tmp_path / "ktray-1").mkdir()
    (tmp_path / "ray").write_text(f"{tmp_path / 'ktray-1'}\n")
    other = lock_home(tmp_path)
    ray_session.remove_stale_folders(tmp_path)
    assert (tmp_path / "ktray-1").exists()
    other.release()
    ray_session.remove_stale_folders(tmp_path)
    assert not (tmp_path / "ktray-1").exists()
    lock_home(tmp_path).release()
