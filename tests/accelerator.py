"""A pretended accelerator, for machines without one: its tensors compute on the processor and, as a GPU's do, refuse to meet others.

As a program it runs commands of `caprefine` there: the argument is a JSON list of their arguments.
"""

import json
import os
import sys
from typing import Any

import accelerate
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

backend_registration._setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
torch.get_device_module(DEVICE).manual_seed = torch.default_generator.manual_seed
MEET = ("aten::_to_copy", "aten::copy_")
"""What may have tensors of both."""
INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Of these the second argument, the indices, may be the processor's."""
counted = {"computed": 0}
"""Operations done here."""
FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "empty.memory_format", "empty_strided")
"""What makes a tensor from numbers; without a tensor there is nothing by which PyTorch would find its way here."""


class There(Tensor):
    """A tensor on the accelerator; `raw` is its content."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "There":
        shape = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        there = Tensor._make_wrapper_subclass(cls, raw.shape, device=DEVICE, **shape)
        there.raw = raw
        return there

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return return_and_correct_aliasing(op, args, kwargs or {}, run(op, args, kwargs or {}))

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # tells modules to swap their parameters when they move
        return ["raw"], None

    # What PyTorch does with a GPU's tensors without asking any dispatcher

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(indices(index), value)


def indices(index: Any) -> Any:
    """Lists as tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the processor. Raises RuntimeError where a GPU would."""
    name, tensors = op.name(), [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not name.startswith(MEET):
        indexed = name.startswith(INDEXED) and isinstance(args[0], There)
        must = tree_leaves((args[0], args[2:])) if indexed else tensors
        here = [t for t in must if isinstance(t, Tensor) and not isinstance(t, There) and t.dim() > 0]  # a number may be anywhere
        if here and any(isinstance(t, There) for t in tensors):
            raise RuntimeError(f"{name}: one tensor on {DEVICE}, another on {here[0].device}")
    known = {id(t.raw): t for t in tensors if isinstance(t, There)}
    args, kwargs = tree_map_only(There, lambda t: t.raw, (args, dict(kwargs)))
    kwargs.pop("pin_memory", None)
    device = kwargs.get("device", DEVICE if known else torch.device("cpu"))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    found = op(*args, **kwargs)
    counted["computed"] += bool(known)
    if device.type == "cpu" or (name == "aten::copy_" and not isinstance(tensors[0], There)):
        return found
    return tree_map_only(Tensor, lambda t: known.get(id(t)) if id(t) in known else There(t), found)


def make_there(op: Any) -> Any:
    return lambda *args, **kwargs: run(op, args, {"device": DEVICE, **kwargs})


def moved(make: Any) -> Any:
    """torch.tensor and torch.as_tensor, which copy behind the dispatcher's back."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = make(data, *args, **kwargs)
        return found if device is None else found.to(device)

    return made


library = torch.library.Library("aten", "IMPL")
for factory in FACTORIES:
    packet, _, overload = factory.partition(".")
    library.impl(factory, make_there(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
torch.tensor, torch.as_tensor = moved(torch.tensor), moved(torch.as_tensor)


def main(commands: list[list[str]]) -> None:
    from hierarchical_diffusion_rlhf_caption_refinement import cli
    from hierarchical_diffusion_rlhf_caption_refinement.evaluation import summary
    from hierarchical_diffusion_rlhf_caption_refinement.utils import seeding

    accelerate.Accelerator.device = property(lambda self: DEVICE)  # type: ignore[assignment, method-assign]
    seeding.usable_device = summary.usable_device = lambda: DEVICE
    for command in commands:
        before = counted["computed"]
        if code := cli.main(command):
            sys.exit(f"{command}: {code}")
        if counted["computed"] - before < 1000:
            sys.exit(f"{command}: was not done on {DEVICE}")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
