"""GPT-2 as the denoiser's start: its published weights under our names, and low-rank adapters (LoRA) on them."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, GPT2Model

from ..utils.config import ConfigError
from .denoiser import DiffusionCaptionModel
from .vision import quiet

BLOCK: dict[str, Any] = {
    "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
"""What our block has in common with GPT-2's; a relative that differs here is another function."""


def load_gpt2(name: str) -> GPT2Model:
    """A GPT-2 of any size by id or directory. Raises ConfigError."""
    try:
        with quiet():
            gpt2, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"base.backbone={name}: not to be had: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(gpt2, GPT2Model):
        raise ConfigError(f"base.backbone={name}: is a {type(gpt2).__name__}, not a GPT-2")
    if report["missing_keys"]:
        raise ConfigError(f"base.backbone={name}: {len(report['missing_keys'])} weights are missing, one is {min(report['missing_keys'])}")
    config: Any = gpt2.config
    wrong = [key for key, value in BLOCK.items() if getattr(config, key) != value]
    if wrong or config.n_inner not in (None, 4 * config.n_embd):
        raise ConfigError(f"base.backbone={name}: its blocks are not GPT-2's: {', '.join(wrong) or 'n_inner'}")
    return gpt2


def denoiser_weights(state: dict[str, Tensor], vocabulary: int, max_length: int) -> dict[str, Tensor]:
    """GPT-2's weights under our names, which are its own: its Conv1D weights transposed, the first rows of its embeddings.

    The new parts start so that training starts from GPT-2's function: cross-attention adds nothing (as in Flamingo and ControlNet, the
    zeros learn from the first update on), nor do the tokens still to come; the mask is the mean token, which GPT-2 finds least surprising.
    """
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    own = {name: value.T.contiguous() if name.endswith(linear) else value for name, value in state.items()}
    own |= {"wte.weight": state["wte.weight"][:vocabulary], "wpe.weight": state["wpe.weight"][:max_length]}
    width, layers = state["wte.weight"].shape[1], 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    silent = {f"h.{i}.crossattention.c_proj.weight": torch.zeros(width, width) for i in range(layers)}
    return own | silent | {"remaining.weight": torch.zeros(max_length, width), "mask": own["wte.weight"].mean(0)}


def start_from_gpt2(model: DiffusionCaptionModel, gpt2: GPT2Model) -> None:
    """Put GPT-2's weights into a denoiser of its shape. Raises ConfigError if it knows fewer tokens or places."""
    asked, there = (model.wte.weight.shape[0], model.max_length), (gpt2.wte.weight.shape[0], gpt2.wpe.weight.shape[0])
    if asked[0] > there[0] or asked[1] > there[1]:
        raise ConfigError(f"base.backbone has {there[0]} tokens and {there[1]} places, the tokenizer and data.max_words need {asked}")
    model.load_state_dict(model.state_dict() | denoiser_weights(gpt2.state_dict(), *asked))


def add_lora(model: DiffusionCaptionModel, gpt2: GPT2Model, rank: int) -> None:
    """Freeze what GPT-2 brought, and adapt the projections of its attention and MLP at this rank; the new parts train in full."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError('base.lora_rank needs peft: pip install ".[peft]"') from None
    new = [parameter for name, parameter in model.named_parameters() if name not in gpt2.state_dict()]
    targets = r"h\.\d+\.(attn|mlp)\.c_\w+"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    for parameter in new:
        parameter.requires_grad_(True)


def merged_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a plain denoiser with the same function: adapters added to what they adapt. The model itself stays as it is."""
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer: Any = module
            state[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight("default")
    return state
