"""Which parts, optimizers and 8-bit moments update_latents_ refuses, and with which message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsae import ops
from tests.small_case import D, K, M, N, every_backend, raw, update_arguments

pytestmark = pytest.mark.usefixtures("one_thread")
EIGHT = torch.float8_e4m3fn


def update(**changes: Any) -> None:
    ops.update_latents_(**{**update_arguments(), **changes})


def eight_bit() -> dict[str, Any]:
    moments = update_arguments()["moments"]
    return {
        "moments": [m.to(EIGHT) if m.ndim == 2 else m for m in moments],
        "scales": [torch.zeros(M, 1) for _ in range(4)],
        "seed": 1,
    }


def kept(letters: int) -> list[torch.Tensor]:
    return [m for i, m in enumerate(update_arguments()["moments"]) if i % 2 < letters]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, r"optimizer is 'sgd', expected one of \['adam', 'adamw', 'lion', 'signsgd'\]"),
        ({"weight_decay": 0.1}, "weight_decay is 0.1, but optimizer 'adam' has none; pass optimizer='adamw'"),
        ({"optimizer": "adamw", "weight_decay": -1.0}, "weight_decay is -1.0, expected a number >= 0"),
        ({"optimizer": "adamw", "weight_decay": float("nan")}, "weight_decay is nan, expected a number >= 0"),
        ({"optimizer": "lion"}, "got 8 moments, expected 4: m of W_enc, W_dec, b_enc, b_dec"),
        ({"optimizer": "signsgd"}, "got 8 moments, expected 0: it keeps none"),
        ({"decoder_pull": torch.ones(M)}, r"decoder_pull has shape \(16,\), expected \(16, L\) with L dividing 8"),
        ({"decoder_pull": torch.ones(M, 3)}, r"decoder_pull has shape \(16, 3\), expected \(16, L\) with L dividing 8"),
        ({"decoder_pull": torch.ones(M, 0)}, r"decoder_pull has shape \(16, 0\), expected"),
        ({"decoder_pull": torch.ones(M - 1, 1)}, r"decoder_pull has shape \(15, 1\), expected"),
        ({"db_enc": torch.ones(D)}, r"db_enc has shape \(8,\), expected \(16,\), that of b_enc"),
        ({"added": [torch.ones(M, D)]}, "got 1 tensors in added, expected none or 3: dW_enc, dW_dec, dpre"),
        (
            {"added": [torch.ones(M, D), torch.ones(M, D - 1), torch.ones(M)]},
            r"added\[1\], dW_dec, has shape \(16, 7\), expected \(16, 8\)",
        ),
        ({"clip_rows": 0.0}, "clip_rows is 0.0, expected a norm > 0, or None"),
        ({"clip_rows": float("nan")}, "clip_rows is nan, expected a norm > 0"),
        ({"grad_scale": torch.ones(1)}, r"grad_scale is torch.float32 of shape \(1,\), expected a 0-d torch.float64"),
        ({"skip": torch.zeros((), dtype=torch.uint8)}, r"skip is torch.uint8 of shape \(\), expected a 0-d torch.bool"),
        ({"skip": torch.tensor([True])}, r"skip is torch.bool of shape \(1,\), expected a 0-d torch.bool tensor"),
        ({"scales": [torch.zeros(M, 1)]}, "got 1 scales, expected 0: one for each moment of torch.float8_e4m3fn"),
        ({**eight_bit(), "scales": []}, "got 0 scales, expected 4"),
        (
            {**eight_bit(), "scales": [torch.zeros(M, 2)] * 4},
            r"scales\[0\] is torch.float32 of shape \(16, 2\), expected torch.float32 of shape \(16, 1\)",
        ),
        ({**eight_bit(), "scales": [torch.zeros(M, 1).double()] * 4}, r"scales\[0\] is torch.float64 of shape"),
        ({**eight_bit(), "scales": [torch.zeros(2 * M, 1)[::2]] * 4}, r"scales\[0\] is not contiguous"),
        ({**eight_bit(), "seed": None}, "moment m of W_enc is float8_e4m3fn, which needs a seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder_pull": torch.ones(M, 1).double()},
            "decoder_pull is torch.float64 but W_dec has torch.float32; cast",
        ),
        ({"decoder_pull": torch.ones(M, 1).int()}, "decoder_pull has dtype torch.int32, expected a floating dtype"),
        ({"db_enc": torch.ones(M).double()}, "db_enc is torch.float64 but W_dec has torch.float32"),
        ({"added": [torch.ones(M, D).double(), torch.ones(M, D), torch.ones(M)]}, r"added\[0\] is torch.float64"),
        ({**eight_bit(), "moments": [m.to(EIGHT) for m in update_arguments()["moments"]]}, "moments are torch.float8"),
        (
            {"optimizer": "lion", "moments": [m.to(EIGHT) if m.ndim == 2 else m for m in kept(1)], "seed": 1},
            "moments are torch.float32, torch.float8_e4m3fn, expected all torch.float32 or .* for adam and adamw",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_dtypes(changes: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        update(**changes)


def test_tied_dictionaries_take_two_added_gradients() -> None:
    given = update_arguments() | {"W_enc": None}
    given["moments"] = given["moments"][2:]
    with pytest.raises(ValueError, match="got 3 tensors in added, expected none or 2: dW_dec, dpre"):
        ops.update_latents_(**given, added=[torch.ones(M, D), torch.ones(M, D), torch.ones(M)])


def test_dacts_are_like_acts() -> None:
    term = update_arguments()["terms"][0]
    with pytest.raises(ValueError, match=r"terms\[0\].dacts has shape \(6, 3\), expected \(6, 4\), that of codes.acts"):
        update(terms=[replace(term, dacts=torch.ones(N, K - 1))])
    with pytest.raises(TypeError, match=r"terms\[0\].dacts is torch.float64 but W_dec has torch.float32"):
        update(terms=[replace(term, dacts=torch.ones(N, K).double())])


@every_backend
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dacts": []}, ValueError, "1 acts, 1 indices, 1 offsets, 0 dacts, 1 xs, .* expected equal numbers of each"),
        ({"dacts": [torch.ones(N, 1)]}, ValueError, r"terms\[0\].dacts has shape \(6, 1\), expected \(6, 4\), that of"),
        (
            {"dacts": [torch.ones(N, K).double()]},
            TypeError,
            r"terms\[0\].dacts is torch.float64 but W_dec has torch.float32",
        ),
        ({"decoder_pull": torch.ones(M, 3)}, ValueError, "decoder_pull has shape"),
        ({"db_enc": torch.ones(M - 1)}, ValueError, "db_enc has shape"),
        ({"added": [torch.ones(M, D)]}, ValueError, "got 1 tensors in added"),
        ({"grad_scale": torch.tensor(1.0)}, ValueError, "grad_scale is torch.float32"),
        ({"skip": torch.tensor(1)}, ValueError, "skip is torch.int64 of shape .*, expected a 0-d torch.bool"),
        ({"optimizer": "sgd"}, ValueError, "optimizer is 'sgd'"),
        ({"optimizer": "signsgd"}, ValueError, "got 8 moments, expected 0"),
        ({"beta1": 1.0}, ValueError, "expected 0 <= beta < 1"),
        ({"weight_decay": 0.5}, ValueError, "weight_decay is 0.5, but optimizer 'adam'"),
        ({"clip_rows": -1.0}, ValueError, "clip_rows is -1.0"),
        ({"scales": [torch.zeros(M, 1)]}, ValueError, "got 1 scales, expected 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_raw_update_checks_its_parts(changes: dict, error: type[Exception], message: str, backend: str) -> None:
    given = update_arguments()
    term = given["terms"][0]
    arguments = {
        **{name: given[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "moments")},
        **{"scales": [], "screen": [], "acts": [term.codes.acts], "indices": [term.codes.indices]},
        **{"offsets": [torch.empty(0, dtype=torch.int64)], "dacts": [torch.empty(0)], "xs": [term.x]},
        **{"grads": [term.grad], "has_bias": [True], "decoder_pull": None, "db_enc": None, "added": []},
        **{"lr": given["lr"], "step": given["step"], "grad_scale": None, "skip": None, "optimizer": "adam"},
        **{"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_rows": None},
    }
    with pytest.raises(error, match=message):
        raw.update_latents_(*{**arguments, **changes}.values(), True, True, False, None, 0, backend)
