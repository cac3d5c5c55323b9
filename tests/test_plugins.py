"""Plugins from outside the package: what they must define, and the checks that they add to a plan."""

from __future__ import annotations

import sys

import pytest

from ktray import plugins
from ktray.errors import UserError
from ktray.pipeline.pair_check import check_pair, data_loader
from tests.toys import toy_pair

EVALUATION = """
from ktray.strict import StrictSpec
REVISION, NEEDS_LABELS, DIRECTION, evaluate = 1, False, {}, dict
class Spec(StrictSpec):
    kind: str = "my_other_lab.poor"
    of: str = "student"
"""
DESCRIPTOR = """
from ktray.errors import UserError
from ktray.strict import StrictSpec
REVISION = 1
class Spec(StrictSpec):
    kind: str = "my_other_lab.modes"
    modes: int = 100
def check(spec, size, count):
    if spec.modes > count:
        raise UserError(f"{spec.modes} modes cannot be made of {count} images of {size} px", "descriptor.modes", "Fewer.")
def quick(spec):
    return spec.model_copy(update={"modes": 2})
def fit(spec, images):
    assert len(images) >= spec.modes, "a plan must not fit what two images cannot give"
    return {}
def describe(spec, state, images):
    return images.float().flatten(1)[:, : spec.modes]
"""
TRANSFER = """
from ktray.errors import UserError
from ktray.strict import StrictSpec
REVISION = 1
NEEDS = {}
class Spec(StrictSpec):
    kind: str = "my_other_lab.pairs"
    partners: int = 10
    fails: bool = False
def check(spec, count, clustered):
    if spec.fails:
        raise ZeroDivisionError("no partners")
    if spec.partners > count:
        raise UserError(f"{spec.partners} partners of {count} images, {clustered} of them clustered", "partners", "Fewer.")
def task(spec, targets, augment):
    raise NotImplementedError
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The package `my_other_lab`, which this command trusts."""
    (tmp_path / "my_other_lab").mkdir()
    (tmp_path / "my_other_lab" / "poor.py").write_text(EVALUATION)
    (tmp_path / "my_other_lab" / "pairs.py").write_text(TRANSFER)
    (tmp_path / "my_other_lab" / "modes.py").write_text(DESCRIPTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "my_other_lab")


@pytest.mark.usefixtures("lab")
def test_an_evaluation_from_outside_has_the_fields_that_are_read_of_every_evaluation():
    with pytest.raises(UserError, match=r"poor\.py: .* has no name and no layer and no pool and no split"):
        plugins.module("evaluation", "my_other_lab.poor")


@pytest.mark.usefixtures("lab")
def test_the_check_of_an_outside_descriptor_runs_in_a_plan_and_it_is_tried_on_two_images():
    check_pair(toy_pair(teacher={"descriptor": "my_other_lab.modes"}), data_loader())
    said = r"teacher\.descriptor\.modes: 1000 modes cannot be made of 216 images of 28 px"
    with pytest.raises(UserError, match=said):
        check_pair(toy_pair(teacher={"descriptor": {"kind": "my_other_lab.modes", "modes": 1000}}), data_loader())


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("group", plugins.GROUPS)
def test_a_plugin_without_a_revision_is_refused(group, tmp_path, monkeypatch):
    other = "Spec = LOCATION = load = build = task = describe = NEEDS = NEEDS_LABELS = DIRECTION = evaluate = None\n"
    (tmp_path / "my_other_lab" / "young.py").write_text(other)
    monkeypatch.delitem(sys.modules, "my_other_lab.young", raising=False)
    with pytest.raises(
        UserError, match=rf"young\.py: the {group} kind 'my_other_lab\.young' defines no REVISION\. A {group} defines"
    ):
        plugins.module(group, "my_other_lab.young")


@pytest.mark.usefixtures("lab")
def test_an_outside_plugin_whose_kind_lacks_its_package_is_refused_with_the_right_kind(tmp_path):
    plain = DESCRIPTOR.replace('kind: str = "my_other_lab.modes"', 'kind: Literal["plain"] = "plain"')
    (tmp_path / "my_other_lab" / "plain.py").write_text(f"from typing import Literal\n{plain}")
    with pytest.raises(UserError, match=r'plain\.py: .* calls itself \'plain\'.* Literal\["my_other_lab\.plain"\]'):
        plugins.module("descriptor", "my_other_lab.plain")


def test_a_package_that_python_does_not_find_is_refused_with_advice_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "lab_of_nobody,lab_with_needs")
    with pytest.raises(UserError, match=r"Install the package 'lab_of_nobody', or .* PYTHONPATH"):
        plugins.module("pretext", "lab_of_nobody.mirror")
    (tmp_path / "lab_with_needs").mkdir()
    (tmp_path / "lab_with_needs" / "mirror.py").write_text("import a_module_of_nobody")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"No module named 'a_module_of_nobody'$"):
        plugins.module("pretext", "lab_with_needs.mirror")


@pytest.mark.usefixtures("lab")
def test_the_check_of_an_outside_transfer_runs_in_a_plan():
    def planned(**fields):
        check_pair(toy_pair(teacher=None, transfer={"kind": "my_other_lab.pairs", **fields}), data_loader())

    planned()
    with pytest.raises(UserError, match=r"^transfer\.partners: 217 partners of 216 images, 0 of them clustered\. Fewer"):
        planned(partners=217)
    with pytest.raises(UserError, match=r"^transfer: the transfer my_other_lab\.pairs cannot be made: no partners"):
        planned(fails=True)
