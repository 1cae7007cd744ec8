"""Tensors of PyTorch are read in their own memory, and PyTorch is not imported for it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import warm

import functrain as ft
from functrain.loop.tensors import arrays_of

torch = pytest.importorskip("torch")

DTYPES = ["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64"]
NOT_NUMPYS = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("name", [*DTYPES, *NOT_NUMPYS])
def test_a_tensor_is_an_array_of_its_dtype_in_the_same_memory(name):
    tensor = torch.tensor([[0, 1, 2], [1, 0, 2]]).to(getattr(torch, name))[:, 1:]
    array = arrays_of({"x": tensor})["x"]
    assert (type(array), array.dtype) == (np.ndarray, jnp.dtype(name))
    assert array.astype(np.float32).tolist() == tensor.float().tolist()
    tensor[0, 0] = 0
    assert array.astype(np.float32).tolist() == tensor.float().tolist()


def test_what_is_no_tensor_stays_what_it_is():
    batch = {"x": np.zeros(2), "y": [jnp.zeros(2), 3.0]}
    assert arrays_of(batch) is batch
    mixed = arrays_of({**batch, "z": torch.zeros(2)})
    assert mixed["x"] is batch["x"]
    assert mixed["y"] == batch["y"]


def test_arrays_of_tensors_are_batched_without_a_copy_of_them():
    tensors = {"x": torch.arange(6.0), "half": torch.arange(12).reshape(6, 2).to(torch.bfloat16)}
    data = ft.from_arrays(tensors, 4, shuffle=False)
    tensors["x"][5] = 9
    batches = list(data)
    assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 9]]
    assert [batch["half"].dtype for batch in batches] == [jnp.bfloat16] * 2
    assert batches[1]["half"].tolist() == [[8, 9], [10, 11]]


def losses(params, batch):
    x, y = batch["x"], batch["y"]
    return (x @ params["w"] - y) ** 2


@pytest.mark.parametrize("options", [{}, {"unroll": 2}, {"prefetch": 2}])
def test_a_loader_of_pytorch_trains_and_evaluates(options):
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 3.0])
    loader = torch.utils.data.DataLoader([{"x": x[i], "y": y[i]} for i in range(32)], batch_size=4)
    params = {"w": jnp.zeros(3)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(lambda params, batch: losses(params, batch).mean(), optim)
    evaluation = ft.Evaluation(lambda params, batch: {"loss": losses(params, batch)}, loader)
    result = ft.fit(update, update.init(params), loader, epochs=20, evaluation=evaluation, **options)
    assert int(result.state.step) == 160
    assert result.results["valid/loss"] < 1e-6


def test_a_function_of_examples_may_return_tensors():
    data = ft.from_arrays({"x": np.arange(4)}, 2, shuffle=False)
    mapped = data.map_examples(lambda example: {"x": torch.tensor(int(example["x"]), dtype=torch.bfloat16)})
    assert [(batch["x"].dtype, batch["x"].tolist()) for batch in mapped] == [
        (jnp.bfloat16, [0, 1]),
        (jnp.bfloat16, [2, 3]),
    ]
    whole = data.map_batches(lambda batch: {"x": torch.from_numpy(batch["x"]) * 2})
    assert [batch["x"].tolist() for batch in whole] == [[0, 2], [4, 6]]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            lambda: torch.zeros(2, requires_grad=True),
            "'image' is a tensor of PyTorch that requires a gradient: write tensor.detach()",
        ),
        (lambda: torch.zeros(2, device="meta"), "'image' is a tensor of PyTorch on meta: write tensor.cpu()"),
        (
            lambda: torch.zeros(2, 3).to_sparse(),
            "'image' is a tensor of PyTorch, float32 (2, 3), that is no NumPy array",
        ),
    ],
)
def test_a_tensor_that_cannot_be_read_is_named(tensor, message):
    with pytest.raises(ft.DataError) as raised:
        ft.from_arrays({"label": torch.zeros(2), "image": tensor()}, 2)
    assert str(raised.value).startswith(message)
    assert "write tensor." in str(raised.value)
    optim = ft.Optimizer(ft.partition({"w": jnp.zeros(2)}, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(lambda params, batch: jnp.sum(params["w"] * batch["image"]), optim)
    with pytest.raises(ft.DataError) as raised:
        ft.fit(update, update.init({"w": jnp.zeros(2)}), [{"image": tensor()}], epochs=1)
    assert str(raised.value).startswith(message)


def test_pytorch_is_not_imported_for_those_who_do_not_use_it():
    program = (
        "import sys, numpy as np, functrain as ft\n"
        "data = ft.from_arrays({'x': np.arange(4)}, 2).map_examples(lambda example: example)\n"
        "print(len(list(data)), 'torch' in sys.modules)"
    )
    output, errors = warm.Process(program).communicate(timeout=120)
    assert output == "2 False\n", errors
