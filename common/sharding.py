"""A loaded model made ready to be trained: what learns, in which precision, on which rank, and what that takes.

On a GPU forward passes run in bfloat16, and weights, gradients and the optimizer stay float32; on a CPU all is float32.
"""

import argparse
from typing import TYPE_CHECKING, Any

from common.command import BadInput
from common.memory import memory
from common.ranks import GLOO_PATIENCE, NCCL_PATIENCE, Ranks

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    import torch
    from torch import nn

    from model import UnifiedModel


def weight_type(args: argparse.Namespace, device: "torch.device") -> "torch.dtype":
    """The type to load a model in for training: float32, but bfloat16 for weights that a GPU only reads (--lora-rank)."""
    import torch

    return torch.bfloat16 if args.lora_rank and autocasts(device) else torch.float32


def prepare(policy: "UnifiedModel", args: argparse.Namespace, ranks: Ranks, pictures: int) -> dict[str, "nn.Parameter"]:
    """Freeze what does not learn, adapt, shard, recompute, compile, print the facts; returns the trained parameters by name.

    pictures: how many of them an example holds.
    """
    scope = args.train.replace("-", "_")
    if args.lora_rank:
        from common.lora import add_adapters

        add_adapters(policy.blocks, args.lora_rank, args.lora_alpha, args.seed)
        scope = "adapters"
    trained = only_layers(policy, policy.trainable_parameters(scope), args.layers)
    n_trained = sum(parameter.numel() for parameter in trained.values())
    n_all = sum(parameter.numel() for parameter in policy.model.parameters())
    if ranks.world > 1:
        shard(policy, ranks, args.replicate)
        trained = only_layers(policy, policy.trainable_parameters(scope), args.layers)  # the same names, now sharded
    if args.gradient_checkpointing is None:
        pictures *= args.micro_batch
        args.gradient_checkpointing = ranks.on_rank_0(
            must_recompute, policy, n_trained, pictures, ranks.world // args.replicate
        )
    if args.gradient_checkpointing:
        recompute_activations(policy)
    to_training(policy)
    if args.compile:
        for block in policy.blocks:  # one by one: they are alike, so one compilation serves them all
            block.compile()
    groups = f", {args.replicate} replicas" if args.replicate > 1 else ""
    what = f"adapters of rank {args.lora_rank}" if args.lora_rank else args.train
    what += f", layers {args.layers[0]} to {args.layers[1]}" if args.layers else ""
    recomputed = ", activations recomputed" if args.gradient_checkpointing else ""
    weights = " and ".join(sorted({str(one.dtype).removeprefix("torch.") for one in policy.branch.parameters()}))
    print(f"parameters     {n_trained:,} trained ({what}), {n_all - n_trained:,} frozen")
    print(
        f"device         {policy.device}, {'bf16 compute, ' if autocasts(policy.device) else ''}{weights} weights{recomputed}"
    )
    if policy.mask_draws:
        print(f"log-probs      estimated from {policy.mask_draws} masks a picture")
    print(f"ranks          {ranks.world}{groups}; micro-batch {args.micro_batch}, batch {args.batch_size} over all ranks")
    return trained


def to_training(policy: "UnifiedModel") -> None:
    """Training mode, in which alone transformers recomputes activations, without what dropout a checkpoint's config asks for.

    The families' own have none. Log-probs are to be those with which the model draws, and DPO's reference no random draw.
    """
    policy.branch.train()
    for module in policy.branch.modules():
        for name in ("p", "attention_dropout"):  # nn.Dropout's, and what attention modules call theirs
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def only_layers(
    policy: "UnifiedModel", trained: dict[str, "nn.Parameter"], layers: list[int] | None
) -> dict[str, "nn.Parameter"]:
    """Those of the trained parameters that lie in decoder layers first .. last, the others being frozen; all for None."""
    if layers is None:
        return trained
    first, last = layers
    if last >= len(policy.blocks):
        raise BadInput(f"--layers {first}-{last}: {policy.name} has layers 0 to {len(policy.blocks) - 1}")
    kept = {id(parameter) for block in policy.blocks[first : last + 1] for parameter in block.parameters()}
    for parameter in trained.values():
        parameter.requires_grad_(id(parameter) in kept)
    return {name: parameter for name, parameter in trained.items() if id(parameter) in kept}


def must_recompute(policy: "UnifiedModel", n_trained: int, pictures: int, group: int) -> bool:
    """Whether a GPU's free memory cannot hold the activations of so many pictures beside what training them takes.

    A trained weight takes 12 bytes for its gradient and AdamW's moments, shared among the `group` ranks that hold the model
    together, and 2 for its bfloat16 copy. A tenth is left free.
    """
    found = memory(policy.device) if autocasts(policy.device) else None
    return found is not None and pictures * policy.activation_bytes + n_trained * (12 / group + 2) > 0.9 * found[0]


def recompute_what_does_not_fit(policy: "UnifiedModel", n_trained: int, pictures: int) -> None:
    """Have one process recompute activations, and say so, where `must_recompute`."""
    if must_recompute(policy, n_trained, pictures, 1):
        recompute_activations(policy)
        to_training(policy)
        print("activations    recomputed: they would not fit")


def recompute_activations(policy: "UnifiedModel") -> None:
    """Have training's backward pass compute each layer anew instead of keeping what it computed, by transformers' own switch.

    Its name changed in transformers 5. Raises BadInput for a model that has none.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    switches = []
    for module in policy.branch.modules():
        switches += [getattr(module, name) for name in names if hasattr(module, name)][:1]
    if not switches:
        raise BadInput(f"--gradient-checkpointing: {policy.name} has no layers that transformers can recompute")
    for enable in switches:
        enable({"use_reentrant": False})


def shard(policy: "UnifiedModel", ranks: Ranks, replicate: int) -> None:
    """FSDP2 over all ranks: each keeps a part of every trained weight, its gradient and its moments, in float32.

    A block's weights are gathered (in bfloat16 on a GPU) when it runs. Frozen weights stay whole everywhere. With
    `replicate` groups, each group holds the whole model between its ranks. Gradients are summed over all ranks.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape = {"replicate": replicate, "shard": ranks.world // replicate} if replicate > 1 else {"shard": ranks.world}
    mesh = init_device_mesh(policy.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    for name in shape:  # groups of a part of the ranks would wait for ten minutes only, and compilation takes longer
        _set_pg_timeout(NCCL_PATIENCE if policy.device.type == "cuda" else GLOO_PATIENCE, mesh.get_group(name))
    bfloat16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision: dict[str, Any] = (
        {"mp_policy": bfloat16} if autocasts(policy.device) else {}
    )  # the activations' types stay autocast's
    frozen = {parameter for parameter in policy.branch.parameters() if not parameter.requires_grad}
    sharded = [fully_shard(block, mesh=mesh, ignored_params=frozen, **precision) for block in policy.blocks]
    sharded += [fully_shard(policy.branch, mesh=mesh, ignored_params=frozen, reshard_after_forward=True, **precision)]
    for module in sharded:  # sum gradients over the ranks: the loss is divided once, in the loop
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def disk_bytes(policy: "UnifiedModel", trained: dict[str, "nn.Parameter"], args: argparse.Namespace) -> int:
    """What a run needs on the disk: the trained model, and two states while one takes the other's place."""
    n_all = sum(parameter.numel() for parameter in policy.model.parameters())
    states = 2 * 3 * 4 * sum(parameter.numel() for parameter in trained.values()) if args.save_every else 0
    return n_all * {"float32": 4, "bfloat16": 2, "float16": 2}[args.save_dtype] + states


def memory_hint(args: argparse.Namespace) -> str:
    """What to try when a training step does not fit."""
    smaller = f"--micro-batch {args.micro_batch // 2}" if args.micro_batch > 1 else "more ranks"
    return smaller if args.gradient_checkpointing else f"{smaller} or --gradient-checkpointing"


def autocasts(device: "torch.device") -> bool:
    """Whether forward passes run in bfloat16: on a GPU. Weights, gradients and the optimizer stay float32."""
    return device.type == "cuda"


def compute_type(device: "torch.device") -> "torch.autocast":
    """The context for forward passes: bfloat16 on a GPU, unchanged float32 on a CPU."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts(device))
