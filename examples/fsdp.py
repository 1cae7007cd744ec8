"""A GPT of characters over many devices, cut by path: FSDP, tensor parallelism, or both.

Here on eight devices that are simulated on this CPU:

    python examples/fsdp.py
    python examples/fsdp.py --tensor 2 --zero --steps 200

In two processes of four devices each, started by hand, or by Slurm on two machines with the GPUs that they have:

    export JAX_COORDINATOR_ADDRESS=localhost:12355 JAX_NUM_PROCESSES=2
    for i in 0 1; do JAX_PROCESS_ID=$i python examples/fsdp.py --devices 4 & done; wait

    srun --nodes 2 --ntasks-per-node 1 python examples/fsdp.py --devices 0

With `--runs folder` the same command goes on where it was ended or killed, on another mesh and in another number of
processes too.
"""

import argparse
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import PartitionSpec as P

import functrain as ft

LENGTH, CHARACTERS = 64, 128  # Of a line, and how many there are in ASCII.


def init(key: jax.Array, width: int, depth: int, heads: int) -> dict:
    keys = iter(jax.random.split(key, 2 + 4 * depth))

    def normal(*shape: int, inputs: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * inputs**-0.5

    def block() -> dict:
        return {
            "norm1": jnp.ones(width),
            "qkv": {"kernel": normal(width, 3, heads, width // heads, inputs=width)},
            "out": {"kernel": normal(heads, width // heads, width, inputs=width)},
            "norm2": jnp.ones(width),
            "up": {"kernel": normal(width, 4 * width, inputs=width)},
            "down": {"kernel": normal(4 * width, width, inputs=4 * width)},
        }

    embed = {"token": normal(CHARACTERS, width, inputs=width), "position": normal(LENGTH, width, inputs=width)}
    return {"embed": embed, "blocks": [block() for _ in range(depth)], "norm": jnp.ones(width)}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def block(x: jax.Array, layer: dict) -> jax.Array:
    q, k, v = jnp.einsum("btd,dchk->cbthk", norm(x, layer["norm1"]), layer["qkv"]["kernel"])
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("bthk,hkd->btd", attended, layer["out"]["kernel"])
    return x + jax.nn.gelu(norm(x, layer["norm2"]) @ layer["up"]["kernel"]) @ layer["down"]["kernel"]


def losses(params: dict, batch: dict) -> jax.Array:
    """The cross-entropy of each next character, (batch, length)."""
    x = params["embed"]["token"][batch["text"][:, :-1]] + params["embed"]["position"]
    for layer in params["blocks"]:
        x = jax.checkpoint(block)(x, layer)
    logits = norm(x, params["norm"]) @ params["embed"]["token"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["text"][:, 1:])


def loss_fn(params: dict, batch: dict) -> ft.Loss:
    return ft.Loss(losses(params, batch).mean(), weight=len(batch["text"]))


def eval_step(params: dict, batch: dict) -> dict:
    return {"loss": losses(params, batch).mean(axis=1)}


def lines(files: int) -> np.ndarray:
    """Text that is on every machine: modules of Python's standard library, in lines of `LENGTH + 1` characters."""
    paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    text = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)
    text = text[text < CHARACTERS]
    return text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="to simulate in each process; 0: those of the machine")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share each matrix product")
    parser.add_argument("--zero", action="store_true", help="whole parameters on each device, only their state is cut")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64, help="lines in a batch, over all devices")
    parser.add_argument("--runs", help="a folder for checkpoints, to go on from")
    args = parser.parse_args()
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    ft.start()  # Does nothing for a process that no launcher has started beside others.
    is_first = jax.process_index() == 0

    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((jax.device_count() // args.tensor, args.tensor), ("data", "tensor"), axis_types=(auto, auto))
    data = None if args.zero else "data"
    rules = {
        "**/qkv/kernel": P(data, None, "tensor"),  # Heads,
        "**/out/kernel": P("tensor", None, data),
        "**/up/kernel": P(data, "tensor"),  # and what lies between two products, stay on a device.
        "**/down/kernel": P("tensor", data),
        ...: P() if args.zero else ft.largest("data"),
    }
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda key: init(key, args.width, args.depth, heads=4), key)
    layout = ft.layout(shapes, mesh, rules, batch=P("data"), zero="data" if args.zero else None)
    parts = ft.partition(shapes, {"matrices": ["**/up/kernel", "**/down/kernel"], "rest": ...})
    muon = ft.stacked(ft.with_lr(optax.contrib.muon, 0.01), layout)
    transforms = {"matrices": muon, "rest": ft.with_lr(optax.adam, 3e-3)}
    optim = ft.Optimizer(parts, transforms, clip_norm=1.0, layout=layout)
    update = ft.make_update(loss_fn, optim)

    rows = lines(files=20)
    test, train = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    batch = {"text": jax.ShapeDtypeStruct((args.batch, LENGTH + 1), np.uint8)}
    if is_first:
        print(f"{layout}\n\n{ft.audit(loss_fn, parts, shapes, batch)}\n\n{ft.plan(update, layout, shapes, batch)}\n")

    params = layout.init(lambda key: init(key, args.width, args.depth, heads=4), key)  # Never whole on any device.
    batches = ft.from_arrays({"text": train}, batch_size=args.batch, seed=0, last="drop")
    evaluation = ft.Evaluation(
        eval_step, ft.from_arrays({"text": test}, batch_size=args.batch, last="pad"), every=ft.Every(updates=20)
    )
    result = ft.fit(
        update, update.init(params), batches, steps=args.steps, evaluation=evaluation,
        checkpoints=ft.Checkpoints(args.runs, every=ft.Every(updates=20)) if args.runs else None,
    )  # fmt: skip
    if is_first:
        loss = result.results["valid/loss"]
        print(f"\nafter {int(result.state.step)} steps a character of other text costs {loss:.3f} nats")


if __name__ == "__main__":
    main()
