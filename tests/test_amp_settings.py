"""pytrain.amp.LossScaler's arguments and settings: what is out of range is named, and changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pytrain
from pytrain.amp import LossScaler

INF, NAN = math.inf, math.nan

BAD_ARGUMENTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("policy", "amp", {}),
    *[("init_scale", value, {}) for value in (0, -1.0, INF, NAN, 1e39, 1e-50)],
    ("init_scale", 0.5, {"policy": "megatron"}),
    ("init_scale", 2.0**25, {"policy": "apex"}),
    *[("growth_factor", value, {}) for value in (1.0, 0.5, INF, NAN)],
    *[("backoff_factor", value, {}) for value in (0.0, 1.0, -0.5, NAN)],
    *[("growth_interval", value, {}) for value in (0, -1, 1.5, True, 2**24)],
    *[("hysteresis", value, {}) for value in (0, 1.5, True)],
    *[("min_scale", value, {}) for value in (-1.0, INF, NAN)],
    *[("max_scale", value, {}) for value in (0.0, -1.0, NAN)],
    ("max_scale", 0.5, {"min_scale": 1.0}),
    *[("max_skipped_in_a_row", value, {}) for value in (0, -1, 2.5, True)],
]


@pytest.mark.parametrize(("name", "value", "rest"), BAD_ARGUMENTS, ids=str)
def test_a_bad_argument_is_named_with_its_value(name: str, value: Any, rest: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        LossScaler(**{name: value}, **rest)
    assert str(caught.value).startswith(f"{name}: ") and repr(value) in str(caught.value)


def test_a_static_scale_takes_nothing_that_would_move_it() -> None:
    with pytest.raises(ValueError, match=r"^init_scale: policy='static'"):
        LossScaler("static")
    for name in ("growth_factor", "backoff_factor", "growth_interval", "hysteresis", "min_scale", "max_scale"):
        with pytest.raises(ValueError, match=f"^{name}: a static scale never moves"):
            LossScaler("static", init_scale=8.0, **{name: 2})  # type: ignore[arg-type]


BAD_SETTINGS = {
    "torch": [("growth_factor", 1.0), ("backoff_factor", 2.0), ("growth_interval", 0)],
    "static": [("growth_factor", 4.0), ("backoff_factor", 0.5), ("growth_interval", 1)],
}


@pytest.mark.parametrize("policy", BAD_SETTINGS)
def test_a_bad_later_setting_is_named_and_changes_nothing(policy: str) -> None:
    scaler = LossScaler(policy, init_scale=8.0)
    before = scaler.state_dict()
    for name, value in BAD_SETTINGS[policy]:
        reason = "a static scale never moves" if policy == "static" else f".* got {value}"
        with pytest.raises(ValueError, match=f"^{name}: {reason}"):
            getattr(scaler, f"set_{name}")(value)
    assert scaler.state_dict() == before


def test_settings_can_be_changed_at_a_ceiling_that_fp32_rounds_up() -> None:
    scaler, param = LossScaler(init_scale=0.05, max_scale=0.1, growth_interval=1), torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    pytrain.step(torch.optim.SGD([param], lr=0.0), scaler)
    scaler.set_growth_interval(3)
    assert scaler.get_growth_interval() == 3


@pytest.mark.parametrize("value", [0.0, -2.0, INF, NAN, 1e39, 1e-50])
def test_a_bad_new_scale_is_named_with_its_value(value: float) -> None:
    scaler = LossScaler()
    with pytest.raises(ValueError, match="^new_scale: ") as caught:
        scaler.update(value)
    assert str(value) in str(caught.value) and scaler.get_scale() == 2.0**16
