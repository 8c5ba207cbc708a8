"""Storage formats: masters, compensation, chance, 8-bit and bf16 state, averages, zeroing, over every optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import randn, there
from format_cases import ALL_FORMATS_OF_ADAMW, BF16, FORMATS, FP16, NAMES, SHAPES, SOME_FORMATS_OF_ALL, equal, state_of
from optim_cases import (
    LAYOUTS,
    LEVELS,
    VARIANTS,
    gradients,
    isa,
    like,
    make_params,
    needs_kernels,
    ours,
    run,
    same_bits,
    threads,
)
from torch.nn import Parameter

from pytrain import backend
from pytrain.optim import REGISTRY, SGD, AdamW, RMSprop
from pytrain.optim.states import UnfitError
from pytrain.optim.storage import (
    CODES,
    decode_param,
    decode_state,
    encode_codes,
    random_bits,
    round_by_chance,
)

# ---- the kernels against the codecs in torch -----------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}])
@pytest.mark.parametrize("form", FORMATS)
def test_kernels_and_torch_path_store_the_same_bits(form: str, options: dict[str, Any]) -> None:
    """SGD computes the same on either path, so that all bits of all formats must agree too."""
    dtype, storage = FORMATS[form]
    both = []
    for fused in (None, False):
        params = make_params(dtype, SHAPES)
        optimizer = SGD(params, lr=0.05, fused=fused, **options, **storage)
        assert optimizer.backend == ("torch" if fused is False else "native")
        for step in range(4):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()
        both.append([*state_of(optimizer), *(p.grad for p in params)])
    for mine, plain in zip(*both, strict=True):
        assert mine.dtype == plain.dtype and torch.equal(mine, plain)


@needs_kernels
@pytest.mark.parametrize(("name", "form"), ALL_FORMATS_OF_ADAMW + SOME_FORMATS_OF_ALL)
def test_all_levels_and_threads_give_the_same_bits(name: str, form: str) -> None:
    dtype, storage = FORMATS[form]
    results = []
    for level in [level for level in LEVELS if backend.facts.isa_levels()[level]]:
        for count in (1, 2):
            params = make_params(dtype, [(301,), (200_003,), (2, 65_537)])
            optimizer = ours(name, params, **storage)
            with isa(level), threads(count):
                run(optimizer, params, params, 2)
            results.append(state_of(optimizer))
    assert all(equal(results[0], other) for other in results[1:])


@needs_kernels
@pytest.mark.parametrize("master", [True, "compact"])
@pytest.mark.parametrize("name", NAMES)
def test_a_master_is_what_an_fp32_parameter_would_be(name: str, master: Any) -> None:
    """Bit for bit, with the same gradients; and the parameter is the rounded master."""
    options = VARIANTS[name][-1]
    low, wide = make_params(BF16), like(make_params(BF16), torch.float32)
    a, b = ours(name, low, master_weights=master, **options), ours(name, wide, **options)
    for step in range(5):
        for p, q, g in zip(low, wide, gradients(low, step), strict=True):
            p.grad, q.grad = g, g.float()
        a.step()
        b.step()
    key = "master_low" if master == "compact" else "master"
    for p, q in zip(low, wide, strict=True):
        assert torch.equal(decode_param(p, a.state[p][key], key), q.detach())
        if master is True:
            assert torch.equal(p.detach(), a.state[p]["master"].to(BF16))
        for state in (*a.rule(a.param_groups[0]).states,):
            assert a.state[p][state].dtype == torch.float32 and torch.equal(a.state[p][state], b.state[q][state])


@pytest.mark.parametrize("fused", [None, False])
def test_a_parameter_changed_from_outside_is_believed(fused: bool | None) -> None:
    p = Parameter(torch.ones(4, dtype=BF16))
    optimizer = SGD([p], lr=0.5, master_weights=True, fused=fused)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p[:2] = 8.0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.tolist() == [7.5, 7.5, 0.0, 0.0] and optimizer.state[p]["master"].tolist() == [7.5, 7.5, 0.0, 0.0]


# ---- what a format keeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_small_updates_are_not_lost_by_kahan_or_chance(dtype: torch.dtype, fused: bool | None) -> None:
    """1,000 steps of 2^-14, each below half a unit of 1.0: plain rounding never moves, the sum is 0.061."""
    n, steps, lr = 4000, 1000, 2.0**-14
    storages: tuple[dict[str, Any], ...] = ({}, {"kahan": True}, {"rounding": "stochastic"})
    finals = []
    for storage in storages:
        p = Parameter(torch.full((n,), 1.0 + 2.0**-4, dtype=dtype))
        optimizer = SGD([p], lr=lr, fused=fused, **storage)
        p.grad = torch.ones_like(p)
        for _ in range(steps):
            optimizer.step()
        finals.append(p.detach().double())
    exact, unit = 1.0 + 2.0**-4 - steps * lr, torch.finfo(dtype).eps
    assert (finals[0] == 1.0 + 2.0**-4).all()
    assert (finals[1] - exact).abs().max() <= unit
    # Each step adds at most unit / 2 with a variance of at most lr * unit; five standard deviations of the mean.
    assert abs(finals[2].mean() - exact) <= 5 * (steps * lr * unit / n) ** 0.5


def test_chance_rounds_to_a_neighbour_and_is_unbiased() -> None:
    for dtype, bits in ((BF16, 16), (FP16, 13)):
        for value in (1.003, -2.7181, 3.1e-6, 1e-7, -6.5e-5, 65519.0):
            x = torch.full((65536,), value)
            down = torch.tensor(value).to(dtype)
            found = round_by_chance(x, dtype, torch.arange(65536)).double()
            unit = (torch.nextafter(down, down.new_tensor(float("inf"))) - down).double().item()
            assert (found - value).abs().max() < abs(unit)
            if value < 65000:
                assert abs(found.mean().item() - value) <= abs(unit) * 2.0**-bits
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 65504.0])
    for dtype in (BF16, FP16):
        out = round_by_chance(special, dtype, torch.full((5,), 65535))
        assert out.isnan().tolist() == [True, False, False, False, False] and out[1:4].tolist() == special[1:4].tolist()
    assert round_by_chance(special, FP16, torch.full((5,), 65535))[4] == 65504


def test_random_bits_are_a_function_of_seed_parameter_stream_element_and_step() -> None:
    base = random_bits(3, 1, 0, 7.0, 5000)
    assert torch.equal(base[:700], random_bits(3, 1, 0, 7.0, 700))
    for other in ((4, 1, 0, 7.0), (3, 2, 0, 7.0), (3, 1, 1, 7.0), (3, 1, 0, 8.0), (3 + 2**40, 1, 0, 7.0)):
        assert (random_bits(*other, 5000) == base).float().mean() < 0.01
    assert (
        base.min() >= 0 and base.max() < 65536 and abs(base.double().mean() - 32767.5) < 5 * 65536 / (12 * 5000) ** 0.5
    )


@needs_kernels
def test_random_numbers_do_not_depend_on_the_company() -> None:
    """The same parameter among others of other plans, with or without gradients for them."""
    options: dict[str, Any] = {"lr": 0.01, "rounding": "stochastic", "seed": 9}
    finals = []
    for others in (0, 3):
        params = [Parameter(torch.linspace(-1, 1, 3000).to(BF16))]
        params += [Parameter(torch.ones(70_000, dtype=BF16 if i else torch.float32)) for i in range(others)]
        optimizer = AdamW(params, **options)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = None if i and step == 1 else torch.linspace(1, 2, p.numel()).to(p.dtype)
            optimizer.step()
        finals.append(params[0])
    assert same_bits(finals[:1], finals[1:])


def test_codes_keep_a_sixteenth_and_the_largest_exactly() -> None:
    generator = torch.Generator().manual_seed(2)
    x = randn(1000, generator=generator) * 10.0 ** there(
        torch.randint(-3, 4, (1000,), generator=generator, device="cpu")
    )
    for kind in CODES:
        values = x.abs() if kind == "u8" else x
        codes, scale = encode_codes(values, kind)
        state = {"x": codes, "x_scale": scale}
        found = decode_state(state, "x", kind)
        floor = scale.repeat_interleave(256)[:1000] * 2.0 ** (-31.75 if kind == "u8" else -15.75)
        assert ((found - values).abs() <= values.abs() / 16 + floor).all()
        largest = torch.stack([block.abs().max() for block in values.split(256)])
        assert torch.equal(scale, largest)
        assert torch.equal(torch.stack([block.abs().max() for block in found.split(256)]), largest)
        again = encode_codes(found, kind)
        assert torch.equal(again[0], codes) and torch.equal(again[1], scale)
    assert encode_codes(torch.tensor([1.0, 1e-30, 0.0]), "u8")[0].tolist() == [255, 1, 0]


@pytest.mark.parametrize("fused", [None, False])
def test_which_states_are_coded_and_what_they_cost(fused: bool | None) -> None:
    small, large = Parameter(torch.ones(4095)), Parameter(torch.ones(4096 * 100))
    optimizer = AdamW([small, large], state_dtype="8bit", fused=fused)
    small.grad, large.grad = torch.ones_like(small), torch.ones_like(large)
    optimizer.step()
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    state = optimizer.state[large]
    assert {k: v.dtype for k, v in state.items()} == {
        "step": torch.float32,
        "exp_avg": torch.uint8,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_scale": torch.float32,
    }
    assert sum(v.nbytes for v in state.values()) <= 2.1 * large.numel()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_bad_gradient_enters_8_bit_state(bad: float, fused: bool | None) -> None:
    """Wherever it is: in a coded parameter, or in a small one."""
    for where in range(2):
        params = [Parameter(torch.ones(5000)), Parameter(torch.ones(5))]
        optimizer = AdamW(params, state_dtype="8bit", zero_grad_in_step=True, fused=fused)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        before = [x.clone() for x in state_of(optimizer)]
        for p in params:
            p.grad = torch.ones_like(p)
        params[where].grad[3] = bad  # type: ignore[index]
        optimizer.step()
        assert optimizer.step_was_skipped and equal(before, state_of(optimizer))
        assert all((p.grad == 0).all() for p in params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not optimizer.step_was_skipped and not equal(before, state_of(optimizer))


# ---- averages, zeroing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_averages_are_torchs_averaged_model(name: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Linear(5, 3).double()
    optimizer = ours(name, list(model.parameters()), ema_decay=0.8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for step in range(5):
        for p, g in zip(model.parameters(), gradients(list(model.parameters()), step), strict=True):
            p.grad = g
        optimizer.step()
        average.update_parameters(model)
    own = like(list(model.parameters()))
    with optimizer.swap_ema():
        for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-15, atol=1e-15)
        with pytest.raises(RuntimeError, match="hold their averages"):
            optimizer.step()
    assert same_bits(own, list(model.parameters()))
    with pytest.raises(RuntimeError, match="keeps no averages"), ours(name, list(model.parameters())).swap_ema():
        pass


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout_are_zeroed(layout: str, fused: bool | None) -> None:
    p = Parameter(torch.ones(4, 6, 3, 5))
    optimizer = SGD([p], lr=1.0, zero_grad_in_step=True, fused=fused)
    p.grad = grad = LAYOUTS[layout](torch.ones(4, 6, 3, 5))
    optimizer.step()
    assert (grad == 0).all() and (p == 0).all() and p.grad is grad


@pytest.mark.parametrize("fused", [None, False])
def test_an_expanded_gradient_is_zeroed_too(fused: bool | None) -> None:
    p = Parameter(torch.ones(4, 6))
    optimizer = SGD([p], lr=1.0, zero_grad_in_step=True, fused=fused)
    p.grad = torch.ones(1).expand(4, 6)
    if backend.simulated and fused is None:  # on a device nothing writes through memory that elements share
        with pytest.raises(UnfitError, match=r"grads\[0\] has elements that share memory and cannot be zeroed"):
            optimizer.step()
        assert (p == 1).all() and (p.grad == 1).all()
        return
    optimizer.step()
    assert (p.grad == 0).all() and (p == 0).all()  # type: ignore[union-attr]


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["master", "compact master", "kahan", "average", "bf16 state", "8-bit state"])
def test_layouts_do_not_matter_to_a_format(form: str, layout: str) -> None:
    dtype, storage = FORMATS[form]
    start = make_params(dtype, [(8, 30, 4, 5), (2, 3, 1, 1)])
    plain, odd = like(start), [Parameter(LAYOUTS[layout](p.detach())) for p in start]
    a, b = AdamW(plain, **storage), AdamW(odd, **storage)
    for step in range(3):
        for p, q, g in zip(plain, odd, gradients(start, step), strict=True):
            p.grad, q.grad = g, LAYOUTS[layout](g)
        a.step()
        b.step()
    if "8-bit" in form and layout in ("transposed", "channels_last"):  # other elements share a scale
        assert all(torch.allclose(p, q, atol=0.02) for p, q in zip(plain, odd, strict=True))
    else:
        assert same_bits(plain, odd)


# ---- errors --------------------------------------------------------------------------------------------------------

IMPOSSIBLE = [
    ({"kahan": True, "master_weights": True}, "kahan: a master already keeps"),
    ({"rounding": "stochastic", "master_weights": "compact"}, "rounding: with master_weights"),
    ({"rounding": "stochastic", "kahan": True}, "rounding: kahan already keeps"),
    ({"rounding": "up"}, "rounding: expected 'nearest' or 'stochastic', got 'up'"),
    ({"master_weights": 1}, "master_weights: expected False, True or 'compact', got 1"),
    ({"state_dtype": torch.bfloat16}, "state_dtype: expected None, 'fp32', 'bf16' or '8bit', got torch.bfloat16"),
    ({"ema_decay": 1.0}, r"ema_decay: expected in \[0, 1\), got 1.0"),
    ({"seed": -1}, r"seed: expected in \[0, 2\*\*63\), got -1"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
@pytest.mark.parametrize("name", NAMES)
def test_impossible_options_say_why(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(name, [Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=r"unexpected argument 'master'.* master_weights"):
        ours(name, [Parameter(torch.ones(1))], master=True)


def test_a_dtype_that_excludes_an_option_is_named_before_anything_is_written() -> None:
    for dtype, options, message in (
        (torch.float64, {"state_dtype": "8bit"}, "state_dtype='8bit', but the parameter is float64"),
        (FP16, {"master_weights": "compact"}, "'compact', but the parameter is float16"),
        (torch.complex64, {"kahan": True}, "torch.complex64 parameters are kept as torch does"),
    ):
        good, bad = Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=dtype))
        optimizer = SGD([{"params": [good]}, {"params": [bad]}], lr=1.0, **options)  # type: ignore[arg-type]
        good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
        with pytest.raises(ValueError, match=r"SGD: param_groups\[1\]\['params'\]\[0\]: .*" + message):
            optimizer.step()
        assert (good == 1).all()


def test_options_are_the_same_for_every_optimizer() -> None:
    for cls in REGISTRY.values():
        options: dict[str, Any] = {"master_weights": True, "ema_decay": 0.5, "seed": 4}
        optimizer = cls([Parameter(torch.ones(1))], **options)
        assert (optimizer.storage.keep, optimizer.storage.ema_decay, optimizer.storage.seed) == ("master", 0.5, 4)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("storage", [{"state_dtype": "8bit"}, {"state_dtype": "bf16"}])
def test_a_variance_that_rounding_makes_negative_is_zero(storage: dict[str, Any], fused: bool | None) -> None:
    """Centred RMSprop takes the root of v - c^2, which nears 0 where gradients do not change."""
    p = Parameter(torch.zeros(5000))
    optimizer = RMSprop([p], lr=0.01, alpha=0.9, centered=True, fused=fused, **storage)
    for _ in range(60):
        p.grad = torch.linspace(0.5, 1.5, 5000)
        optimizer.step()
    assert p.isfinite().all()
