"""Whatever the schema accepts plans within a second, or is refused with a SettingsError.

Values are generated from the fields of the schema: limits, their neighbors, extremes, wrong types.
"""

import time
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flowgrain import METHODS, SettingsError, load_config
from flowgrain.config.load import validate
from flowgrain.config.schema import Config
from flowgrain.methods import Method
from flowgrain.planning.plan import RunPlan
from flowgrain.settings import Section

SECONDS = 5
"""Wall time of one plan. It takes less than 1 s on an idle core; tests share busy cores."""
EXTREMES = [0, 1, 2, -1, 3, 7, 16, 10**3, 10**6, 10**12, 2**31, 2**63 - 1, 2**63, 10**400]
FLOATS = [0.0, 0.5, 1.0, -1.0, 1e-300, 5e-324, 1e30, 1e300, float("nan"), float("inf"), -0.0]
WRONG = st.sampled_from([None, True, "", "x" * 300, "auto", [], [[]], {}, {"a": 1}, [1, 2], "${x}"])


def limits(metadata):
    """The numbers at which a constraint begins."""
    for constraint in metadata:
        for kind in ("Ge", "Gt", "Le", "Lt"):
            if isinstance(constraint, getattr(annotated_types, kind)):
                yield getattr(constraint, kind.lower())


def values_of(annotation: Any, metadata=()) -> st.SearchStrategy:
    """Values of a field: mostly of its type, and often at a limit."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return values_of(inner, [*metadata, *more])
    if origin in (Union, UnionType):
        return st.one_of([values_of(part, metadata) for part in get_args(annotation)])
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is tuple:
        return st.lists(values_of(get_args(annotation)[0]), max_size=4)
    if annotation is bool:
        return st.booleans()
    near = [limit + step for limit in limits(metadata) for step in (-1, 0, 1)]
    if annotation is int:
        whole = [int(value) for value in near]
        small = st.integers(0, 40)
        return small | st.sampled_from([*EXTREMES, *whole]) | st.integers()
    if annotation is float:
        return st.sampled_from([*FLOATS, *map(float, near)]) | st.floats()
    if annotation is str:
        return st.text(max_size=8) | st.sampled_from(["none", "taylorseer:2", "x" * 300])
    return st.none()


def fields_of(section, prefix=""):
    """The fields of a section and of the sections in it, by full path."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and kind is not Method:
            yield from fields_of(kind, f"{prefix}{name}.")
        elif kind is not Method and name not in ("rewards", "plugins", "name"):
            yield f"{prefix}{name}", field


REWARD = st.fixed_dictionaries(
    {"name": st.sampled_from(["oracle", "towers", "", "a:b"])},
    optional={
        "weight": st.floats() | st.sampled_from(FLOATS),
        "batch_size": st.sampled_from(EXTREMES),
    },
)


@st.composite
def configurations(draw):
    """A method, and up to four settings of it by full path."""
    method = draw(st.sampled_from(sorted(METHODS)))
    fields = dict(fields_of(Config)) | dict(fields_of(METHODS.get(method), "method."))
    changes = {}
    for path in draw(st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)):
        field = fields[path]
        changes[path] = draw(values_of(field.annotation, field.metadata) | WRONG)
    if draw(st.booleans()):
        changes["rewards"] = draw(st.lists(REWARD, max_size=3))
    return method, changes


def check(case):
    method, changes = case
    begin = time.perf_counter()
    try:
        config = load_config(method, changes)
        plan = RunPlan(config).to_dict()
        warnings = config.warnings()
    except SettingsError as error:
        assert str(error)
        assert len(str(error)) < 8000
    else:
        assert plan["forward_passes"] > 0
        assert all(len(warning.splitlines()) == 1 for warning in warnings)
        assert validate(config.to_dict()) == config
    assert time.perf_counter() - begin < SECONDS


PROFILE = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),
}


@settings(max_examples=150, **PROFILE)
@given(configurations())
def test_what_the_schema_accepts_plans_or_is_refused(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=3000, **PROFILE)
@given(configurations())
def test_what_the_schema_accepts_plans_or_is_refused_for_long(case):
    check(case)


def test_the_fuzzing_reaches_every_field():
    fields = dict(fields_of(Config))
    assert {"sampling.shift", "optimizer.betas", "runtime.seed", "lora.rank"} <= set(fields)
    assert "calibration.rounds" in dict(fields_of(METHODS.get("densegrpo")))
    assert list(limits(fields["runtime.threads"].metadata)) == [0, 1024]
