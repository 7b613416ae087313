"""One DPO step: ours against TRL's DPOTrainer on the same language model, sequence lengths, batch and optimizer.

    pip install trl
    python benchmarks/training.py --tiny
    python benchmarks/training.py --geometry janus-pro-7b --pairs 8 --no-trl

Both train the decoder layers and the final norm and nothing else, with reference log-probs computed beforehand, chosen and
rejected in one batch, fused AdamW, no gradient checkpointing unless asked for. TRL gets a LlamaForCausalLM of the same
layers whose vocabulary is the codebook; ours has Janus's two-layer head, a little more work. Without TRL installed, or with
--no-trl, ours is timed alone. MFU: 6 FLOPs a trained weight and token and 12 for attention's products, over the card's
measured rate; frozen parts and recomputation are not counted.
"""

import tempfile
from argparse import Namespace
from importlib.util import find_spec
from types import SimpleNamespace

import bench
import numpy as np
import torch

PROMPT = 30  # tokens


def flops_a_picture(geometry: bench.Geometry, tokens: int, a_weight: int = 6) -> float:
    """Forward and backward over one picture's sequence; a_weight: 4 where it is frozen and only passes gradients on."""
    return a_weight * geometry.layer_weights * tokens + 12 * geometry.layers * geometry.width * tokens**2 / 2


def settings(args, dpo: bool) -> Namespace:
    flags = {"beta": 0.1, "nll_weight": 1.0, "average_logps": False, "uncond_prob": 0.0, "micro_batch": args.pairs}
    flags |= {"batch_size": args.pairs, "train": "language-model", "gradient_checkpointing": args.gradient_checkpointing}
    flags |= {
        "layers": None,
        "lora_rank": args.lora_rank,
        "lora_alpha": 2.0 * args.lora_rank,
        "compile": args.compile,
        "seed": 0,
        "replicate": 1,
    }
    return Namespace(**flags)


class Memory:
    """Image tokens in memory where the scripts have records.Tokens."""

    def __init__(self, tokens: np.ndarray):
        self._tokens, self.length = tokens, tokens.shape[1]

    def __getitem__(self, rows) -> np.ndarray:
        return self._tokens[rows].astype(np.int64)


def our_step(make, tokens: np.ndarray, args, method: str):
    """A function that does one whole optimizer step with dpo.py's, or sft.py's, own functions.

    make: a model with its weights in a given type, such as bench.build's. `.policy` of what comes back is that model.
    """
    import dpo
    import sft
    from common import sharding, training
    from common.ranks import Ranks

    flags = settings(args, method == "dpo")
    ranks = Ranks()
    ranks.join(args.device)
    policy = make(sharding.weight_type(flags, torch.device(args.device)))
    trained = sharding.prepare(policy, flags, ranks, pictures=2 if method == "dpo" else 1)
    optimizer = training.make_optimizer(trained, 0.0)
    prompts = bench.prompts(policy, args.pairs, PROMPT)
    run = SimpleNamespace(args=flags, ranks=ranks, tokens=Memory(tokens))  # what accumulate wants of a TrainingRun
    dropped = np.zeros(args.pairs, bool)
    if method == "sft":
        rows = [{"id": str(i), "prompt": prompt, "row": 2 * i, "seed": 0} for i, prompt in enumerate(prompts)]

        def step() -> None:
            sft.accumulate(policy, rows, dropped, run)
            training.update(optimizer, trained, 1e-6, 1.0)

        step.policy = policy
        return step
    pairs = [{"id": str(i), "prompt": p, "chosen": 2 * i, "rejected": 2 * i + 1, "seed": 0} for i, p in enumerate(prompts)]
    with torch.no_grad():
        reference = dpo.pair_logps(policy, pairs, run.tokens).transpose(0, 1).cpu()

    def step() -> None:
        dpo.accumulate(policy, pairs, dropped, reference, run)
        training.update(optimizer, trained, 1e-6, 1.0)

    step.policy = policy
    return step


def their_step(geometry: bench.Geometry, tokens: np.ndarray, args):
    """The same step as TRL takes it: its trainer's training_step, clipping and optimizer, reference log-probs precomputed."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # ours are tokens already, no text

    tokenizer = AutoTokenizer.from_pretrained(bench.ROOT / "shapes" / "base")
    vocabulary = geometry.codebook + len(tokenizer)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=geometry.width,
        intermediate_size=geometry.mlp,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    rng = np.random.default_rng(0)
    images = (tokens.astype(np.int64) + len(tokenizer)).tolist()
    columns = {
        "prompt_ids": [rng.integers(10, len(tokenizer), PROMPT).tolist() for _ in range(args.pairs)],
        "chosen_ids": images[0::2],
        "rejected_ids": images[1::2],
    }
    data = Dataset(InMemoryTable.from_pydict(columns), fingerprint="benchmark")
    out = tempfile.TemporaryDirectory()
    about = DPOConfig(
        output_dir=out.name,
        per_device_train_batch_size=args.pairs,
        max_length=None,
        beta=0.1,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 1.0],
        precompute_ref_log_probs=True,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
    )
    trainer = OfTokens(model=model, args=about, train_dataset=data, processing_class=tokenizer)
    trainer.train()  # one step of its own: everything is set up as TRL sets it up
    batch = next(iter(trainer.get_train_dataloader()))

    def step(keep=out) -> None:
        trainer.model.train()
        trainer.training_step(trainer.model_wrapped, dict(batch))
        torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0).item()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def measure(geometry: bench.Geometry, method: str, args) -> dict:
    tokens = np.random.default_rng(0).integers(0, geometry.codebook, (2 * args.pairs, geometry.image_tokens)).astype(np.uint16)
    contestants = {"ours": our_step(lambda dtype: bench.build(geometry, args.device, dtype), tokens, args, method)}
    compare = method == "dpo" and not args.no_trl and find_spec("trl") is not None
    if compare:
        contestants["trl"] = their_step(geometry, tokens, args)
    if args.profile:
        contestants["ours"]()
        with torch.profiler.profile() as profile:
            contestants["ours"]()
        print(profile.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=20, max_name_column_width=50))
    bench.peak_gb(args.device)
    seconds = bench.alternate(contestants, args.repeats, args.device)
    pictures = args.pairs * (2 if method == "dpo" else 1)
    row = {
        "step": method,
        "width": geometry.width,
        "codebook": geometry.codebook,
        "image tokens": geometry.image_tokens,
        "pictures a step": pictures,
        "ours, images/s": pictures / seconds["ours"],
        "TRL, images/s": pictures / seconds["trl"] if compare else None,
        "ratio": seconds["trl"] / seconds["ours"] if compare else None,
    }
    if args.device == "cuda":
        wanted = flops_a_picture(geometry, PROMPT + geometry.image_tokens - 1) * pictures
        row |= {"MFU": wanted / seconds["ours"] / bench.limits(args.device).flops_per_s, "peak GB": bench.peak_gb(args.device)}
    return row


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=4, help="pairs, or pictures for sft, in one forward pass (default 4)")
    parser.add_argument("--methods", nargs="+", choices=["sft", "dpo"], default=["dpo"], help="which steps (default dpo)")
    parser.add_argument("--lora-rank", type=int, default=0, help="as in dpo.py (default 0)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--compile", action="store_true", help="compile our decoder layers")
    parser.add_argument("--no-trl", action="store_true", help="time ours alone")
    parser.add_argument("--profile", action="store_true", help="first print what one of our steps takes, by operation")
    args = parser.parse_args()
    geometry = bench.GEOMETRIES[args.geometry]
    small = geometry._replace(side=12)
    cases = [small, small._replace(codebook=16384)] if args.tiny else [geometry]
    bench.table("training", (measure(case, method, args) for case in cases for method in args.methods), args)


if __name__ == "__main__":
    main()
