"""The one table for operations: a row of OPERATIONS puts an operation through the tests of this folder.

    test_operations.py       values, gradients, states, documents, sizes and dtypes on every backend
    test_transformations.py  vmap, forward mode, second derivatives
    test_sharding.py         eight devices
    test_export.py           one function lowered for three platforms, and what `explain` says of it
    test_bad_input.py        errors
    test_deviceless.py       compilers of chips that are not here

A case is a dict of sizes and flags. `row.arguments` makes it the keyword arguments of the public function:
numpy arrays, trees of them, static values. Keys that it doesn't know go on to the function, with lists as
int32 arrays: {"T": 9, "lengths": [9, 4], "reverse": True} needs no code of its own.

    row = OPERATIONS["rnn"]
    arguments = row.arguments(row.small)  # a small call with a state and documents; or of any other case
    results, gradients = value_and_gradients(row, arguments, "xla")  # of the float arguments, by name
    results, gradients = expected(row, row.small)  # the same from the definition in float64
    row.axes_of("gates", arguments)  # "b t h g d"; an argument's tokens lie along "t"
    list(row.cases)  # the backends that it has to serve; None picks by the platform
    row.small_on("pallas_gpu")  # `small` in the dtypes and sizes that a backend serves

One program is compiled for each row, backend, set of static values and shapes; a process's tests share it.
"""

from collections.abc import Callable
from typing import Any

import pytest

import frugax
from tests.cases import served

from .causal_conv1d import calls as conv_calls
from .causal_conv1d import definition as conv_definition
from .draws import sizes
from .grouped_matmul import calls as grouped_calls
from .grouped_matmul import definition as grouped_definition
from .linear_attention import calls as attention_calls
from .linear_attention import definition as attention_definition
from .linear_recurrence import calls as recurrence_calls
from .linear_recurrence import definition as recurrence_definition
from .lmu import calls as lmu_calls
from .lmu import definition as lmu_definition
from .quantized_matmul import calls as matmul_calls
from .quantized_matmul import definition as matmul_definition
from .quantized_update import calls as update_calls
from .quantized_update import definition as update_definition
from .rnn import calls as rnn_calls
from .rnn import definition as rnn_definition
from .row import (
    Arguments,
    Case,
    Row,
    both_passes,
    expected,
    narrowest,
    parts,
    program,
    run,
    structs,
    text,
    value_and_gradients,
    widened,
)
from .selective_scan import calls as scan_calls
from .selective_scan import definition as scan_definition
from .selective_scan_2d import calls as scan_2d_calls
from .selective_scan_2d import definition as scan_2d_definition
from .ssd import calls as ssd_calls
from .ssd import definition as ssd_definition
from .ssd import trapezoidal_calls

__all__ = [
    "OPERATIONS",
    "Arguments",
    "Case",
    "Row",
    "both_passes",
    "every_case",
    "expected",
    "narrowest",
    "over",
    "parts",
    "program",
    "run",
    "structs",
    "text",
    "value_and_gradients",
    "widened",
]


def over(has: Callable[[Row], Any] = lambda row: True) -> list[str]:
    """Return the names of the rows that have something."""
    return [row.name for row in OPERATIONS.values() if has(row)]


def every_case() -> list:
    """Return (operation, backend, case) as parameters, of which `served` chooses the default tier's.

    What an operation composed of others has of kernels is theirs, and tried in the full tier.
    """
    return [
        pytest.param(
            *(row.name, *param.values),
            id=f"{row.name}-{param.id}",
            marks=pytest.mark.full if row.composed and param.values[0] in KERNELS else param.marks,
        )
        for row in OPERATIONS.values()
        for param in served(row.cases, getattr(row.calls, "has", sizes), text)
    ]


KERNELS = ("pallas_tpu", "pallas_gpu")
TOKENS_OF_HEADS = {"x": "b t h p", "dt": "b t h", **dict.fromkeys("BC", "b t groups n"), "segment_ids": "b t"}
ROUTES = ("gather", "scatter", "weights")
CHANNELS = dict.fromkeys(("x", "dt", "z"), "b t d") | dict.fromkeys("BC", "b t n")

OPERATIONS = {
    row.name: row
    for row in (
        Row(
            frugax.kernels.linear_attention,
            attention_calls,
            attention_definition.linear_attention,
            dict.fromkeys("qk", "b t h k")
            | {"v": "b t h v", "log_decay": "h | b t h | b t h k", "bonus": "h k"}
            | {"initial_state": "b h k v", "segment_ids": "b t"},
            small={"T": 9, "K": 4, "V": 3} | attention_calls.EVERYTHING,
            changed={"pallas_gpu": {"dtype": "bfloat16", "K": 64, "V": 64}},
            defined=attention_calls.DEFINED,
            like="v",
            split=("b", "h"),
            placed={"T": 9, "heads": (4, 2, 2), "K": 8, "V": 8, "B": 4, "decay": "bth", "state": True},
            exported={"T": 16, "K": 64, "V": 64, "decay": "bthk", "dtype": "bfloat16"},
            on_tpu=attention_calls.ON_TPU,
            on_gpu=attention_calls.ON_GPU,
            spilled=160,
            kernels=(3, 6),
            wgmma=True,
            summed=("log_decay",),
        ),
        Row(
            frugax.kernels.selective_scan,
            scan_calls,
            scan_definition.selective_scan,
            CHANNELS | {"A": "d n", "D": "d", "dt_bias": "d", "initial_state": "b d n", "segment_ids": "b t"},
            small={"T": 9, "D": 5, "N": 3} | scan_calls.WHOLE,
            defined=scan_calls.DEFINED,
            like="x",
            split=("b", "d"),
            placed={"T": 9, "D": 256, "N": 4, "B": 4} | scan_calls.WHOLE,
            exported={"T": 16, "D": 128, "N": 4},
            on_tpu=scan_calls.COMPILED,
            on_gpu=scan_calls.COMPILED,
            kernels=(2, 3),
            exact_state=True,
        ),
        Row(
            frugax.kernels.linear_recurrence,
            recurrence_calls,
            recurrence_definition.linear_recurrence,
            dict.fromkeys("ab", "b t d") | {"initial_state": "b d", "segment_ids": "b t"},
            small={"T": 9, "D": 5, "packed": True} | recurrence_calls.BACK,
            defined=[{"T": 9, "D": 5} | recurrence_calls.PACKED],
            like="b",
            split=("b", "d"),
            placed={"T": 9, "D": 256, "B": 4} | recurrence_calls.PACKED,
            exported={"T": 16, "D": 128},
            quick=True,
            on_tpu=recurrence_calls.COMPILED,
            on_gpu=recurrence_calls.COMPILED,
            exact_state=True,
        ),
        Row(
            frugax.kernels.causal_conv1d,
            conv_calls,
            conv_definition.causal_conv1d,
            {"x": "b t d", "weight": "w d", "bias": "d", "initial_state": "b s d", "segment_ids": "b t"},
            small={"T": 9, "D": 5, "W": 4} | conv_calls.PACKED,
            defined=[{"T": 9, "D": 1, "W": 1} | conv_calls.PLAIN, {"T": 1, "D": 5, "W": 4, "state": True}],
            like="x",
            states=("x",),
            split=("b", "d"),
            placed={"T": 9, "D": 256, "W": 4, "B": 4} | conv_calls.PACKED,
            exported={"T": 16, "D": 128, "W": 4},
            on_tpu=conv_calls.COMPILED,
            on_gpu=conv_calls.ON_GPU,
            quick=True,
        ),
        Row(
            frugax.kernels.rnn,
            rnn_calls,
            rnn_definition.rnn,
            {"gates": "b t h g d", "recurrent": "h g i d", "bias": "h g d", "initial_state": "b s h d"}
            | {"segment_ids": "b t"},
            small={"cell": "lstm", "B": 2, "T": 9, "H": 2, "D": 3} | rnn_calls.PACKED,
            defined=rnn_calls.DEFINED,
            like="gates",
            split=("b", "h"),
            placed={"cell": "lstm", "B": 4, "T": 6, "H": 2, "D": 8} | rnn_calls.PACKED,
            exported={"cell": "gru", "B": 1, "T": 16, "H": 2, "D": 64, "dtype": "bfloat16"},
            on_tpu=rnn_calls.ON_TPU,
            on_gpu=rnn_calls.ON_GPU,
            spilled=200,
            wgmma=True,
            quick=True,
        ),
        Row(
            frugax.kernels.quantized_matmul,
            matmul_calls,
            matmul_definition.quantized_matmul,
            {"x": "b k | b t k", "w": "k n", "bias": "n"},
            small={"format": "int4", "B": 2, "T": 3, "K": 64, "N": 24, "group": 32, "bias": True},
            changed={"pallas_gpu": matmul_calls.ON_GPU[0]},
            defined=[matmul_calls.PLAIN[n] for n in (2, 3, 5, 7, 8)],
            like="x",
            states=(),
            split=("b", "n"),
            placed={"format": "int4", "B": 4, "T": 3, "K": 64, "N": 256, "group": 32, "bias": True},
            exported=matmul_calls.COMPILED[0],
            on_tpu=matmul_calls.COMPILED,
            on_gpu=matmul_calls.COMPILED,
        ),
        Row(
            frugax.kernels.grouped_matmul,
            grouped_calls,
            grouped_definition.grouped_matmul,
            {"lhs": "t k", "rhs": "e k n", "group_sizes": "e", **dict.fromkeys(ROUTES, "b")},
            small={"sizes": [4, 0, 6], "K": 3, "N": 5, "B": 11} | grouped_calls.ROUTED,
            changed={"pallas_gpu": {"K": 64, "N": 64, "dtype": "bfloat16"}},
            defined=[grouped_calls.PLAIN[1], grouped_calls.PACKED[0]],
            like="lhs",
            states=(),
            split=("none", "n"),
            placed={"sizes": [4, 0, 6], "K": 8, "N": 4, "B": 11} | grouped_calls.ROUTED,
            exported=grouped_calls.COMPILED[0],
            on_tpu=grouped_calls.COMPILED,
            on_gpu=grouped_calls.COMPILED,
            kernels=(3, 3),
            wgmma=True,
        ),
        Row(
            frugax.kernels.quantized_update,
            update_calls,
            None,
            {},
            small=update_calls.LIST[0],
            like="grad",
            exported=update_calls.LIST[0],
            on_tpu=update_calls.COMPILED,
            on_gpu=update_calls.COMPILED,
            kernels=(1, 1),
            check=update_definition.check_call,
        ),
        Row(
            frugax.kernels.ssd,
            ssd_calls,
            ssd_definition.ssd,
            TOKENS_OF_HEADS
            | {"A": "h", "D": "h | h p", "z": "b t h p", "dt_bias": "h", "initial_state": "b h n p"},
            small={"T": 9},
            defined=[{"T": 9, "G": 1} | ssd_calls.PLAIN, {"T": 1, "G": 4, "skip": "hp"}],
            like="x",
            split=("b", "h"),
            placed={"T": 9, "B": 4},
            exported={"T": 16, "P": 64, "N": 64, "dtype": "bfloat16"},
            summed=("dt",),
            narrow=6,  # x, B, C, z, dt x, and what linear_attention returns before D and z
        ),
        Row(
            frugax.kernels.trapezoidal_ssd,
            trapezoidal_calls,
            ssd_definition.trapezoidal_ssd,
            TOKENS_OF_HEADS | {"A": "b t h", "mix": "b t h", "D": "h", "initial_state": "of three arrays"},
            small={"T": 9},
            defined=[{"T": 1, "skip": False}],
            like="x",
            states=(None, "B", "x"),
            split=("b", "h"),
            placed={"T": 9, "B": 4, "state": False},
            meshes=("Auto",),
            summed=("dt", "A"),
            exported={"T": 16, "P": 64, "N": 64, "dtype": "bfloat16"},
        ),
        Row(
            frugax.kernels.lmu,
            lmu_calls,
            lmu_definition.lmu,
            {"u": "b t d", "initial_state": "b d n", "segment_ids": "b t"},
            small={"T": 9, "state": True, "packed": True},
            like="u",
            split=("b", "d"),
            placed={"T": 9, "B": 4, "D": 2, "state": True, "packed": True},
            changed={"chunks": {"packed": False}, "fft": {"packed": False}},
            choice="method",
            twice=("fft", "recurrent"),
            reference="recurrent",
        ),
        Row(
            frugax.kernels.selective_scan_2d,
            scan_2d_calls,
            scan_2d_definition.selective_scan_2d,
            {"x": "b h w d", "dt": "p b t d", "A": "p d n", **dict.fromkeys("BC", "p b t n")}
            | {"D": "p d", "dt_bias": "p d"},
            small={"size": (3, 2)},
            defined=[{"size": (3, 5), "scan": "atrous"}, {"size": (5, 3), "scan": "atrous", "step": 3}],
            like="x",
            states=(),
            split=("b", "d"),
            placed={"size": (3, 2), "B": 4, "D": 256},
            meshes=("Auto",),
            exported={"size": (4, 4), "D": 128, "N": 4},
        ),
    )
}
