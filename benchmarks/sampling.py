"""Sampling: ours against transformers' own `generate(generation_mode="image")`, same weights, same prompts, greedy.

    python benchmarks/sampling.py --tiny
    python benchmarks/sampling.py --geometry janus-pro-1b --batches 16 128 --theirs 1 8 16 64

The floor of a step is the time to read the weights (or to do the arithmetic, whichever is longer) plus the time to read the
used part of the cache, at the card's measured limits. On a CPU it is the time to read the weights alone, from its own cache.
"""

import inspect
import sys

import bench
import torch
from transformers import StaticCache


def floor_s(
    geometry: bench.Geometry, n: int, prompt: int, limits: bench.Limits, passes: int | None = None, window: int = 1
) -> float:
    """Seconds for n guided pictures at a card's limits, in bfloat16: 2 n rows, T passes, half the cache on average.

    passes, window: fewer of them, each over `window` tokens a row, as speculative decoding has it.
    """
    weights = geometry.layer_weights + 2 * geometry.width * geometry.codebook  # the head is read, and multiplied with, too
    rows = 2 * n
    read = 2 * weights / limits.bytes_per_s
    multiply = 2 * weights * rows * window / limits.flops_per_s
    cache = 2 * rows * (prompt + geometry.image_tokens / 2) * geometry.cache_numbers / limits.bytes_per_s
    return (passes or geometry.image_tokens) * (max(read, multiply) + cache)


def cpu_floor_s(policy, steps: int, repeats: int) -> float:
    """Seconds to read the float32 weights once in each of `steps` decode steps, at what this machine's cache gives."""
    layers = policy.llama.layers.parameters()
    weights = [parameter.detach() for parameter in (*layers, *policy.model.model.generation_head.parameters())]
    total = sum(weight.numel() for weight in weights)
    buffer = torch.ones(total)  # a sum of it reads as many bytes, and does next to nothing else
    return steps * bench.alternate({"read": buffer.sum}, 5 * repeats, "cpu")["read"]


def static_cache(policy, length: int) -> dict[str, StaticCache]:
    """transformers' cache for prompts of `length` tokens and a picture, under the name that this version calls it by."""
    llama = policy.model.model.language_model
    names = inspect.signature(type(llama).forward).parameters
    cache = StaticCache(config=llama.config, max_cache_len=length + policy.image_tokens)
    return {"cache" if "cache" in names else "past_key_values": cache}


def generate(policy, ids: torch.Tensor, guidance: float) -> torch.Tensor:
    """Prompts (n, L) -> greedy tokens (n, T) by transformers' own loop, given the cache that it makes itself (not in 5.17)."""
    mask, cache = torch.ones_like(ids), static_cache(policy, ids.shape[1])
    return policy.model.generate(
        ids, attention_mask=mask, generation_mode="image", do_sample=False, guidance_scale=guidance, **cache
    )


class CompiledLoop:
    """The other side at its best: transformers' language model and head, its static cache, a token's whole step compiled.

    What somebody who knows torch.compile writes around the model in an hour. `generate` with its language model compiled does
    less: head, guidance, choice and the mask of each token stay Python there. Greedy, for n prompts of one length.
    """

    def __init__(self, policy, n: int, length: int, guidance: float) -> None:
        self.model, self.image_tokens, self.guidance = policy.model, policy.image_tokens, guidance
        self.llama = policy.model.model.language_model
        self.cache = static_cache(policy, length)
        how = {"mode": "reduce-overhead"} if policy.device.type == "cuda" else {"backend": "aot_eager"}
        self.step = torch.compile(self._step, fullgraph=True, dynamic=False, **how)

    def _choose(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (2 n, S, C), unconditional ones last -> the next tokens (n, 1)."""
        hidden = self.llama(inputs_embeds=embeddings, use_cache=True, **self.cache).last_hidden_state[:, -1]
        given, free = self.model.model.generation_head(hidden).chunk(2)
        return (free + self.guidance * (given - free)).argmax(-1, keepdim=True)

    def _step(self, token: torch.Tensor) -> torch.Tensor:
        return self._choose(self.model.prepare_embeddings_for_image_generation(token).repeat(2, 1, 1))

    @torch.no_grad()
    def draw(self, ids: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """Prompts (n, L), and what guidance contrasts them with -> tokens (n, T)."""
        next(iter(self.cache.values())).reset()
        tokens = [self._choose(self.model.get_input_embeddings()(torch.cat([ids, unconditional])))]  # not compiled: once
        for _ in range(self.image_tokens - 1):
            torch.compiler.cudagraph_mark_step_begin()
            tokens.append(self.step(tokens[-1]).clone())  # the next replay writes over what this one returned
        return torch.cat(tokens, dim=1)


def check_equal(policy, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of equal tokens: all of them in float32; in bfloat16 near ties fall either way, and what follows differs."""
    same = (ours == theirs[:, -ours.shape[1] :]).float().mean().item()
    if policy.model.dtype == torch.float32 and same < 1:
        sys.exit(f"the tokens differ: {same:.3f} are equal")
    return same


def measure(geometry: bench.Geometry, n: int, compare: bool, args) -> dict:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    policy = bench.build(geometry, args.device, dtype)
    prompts = bench.prompts(policy, n)
    ids = torch.tensor([policy.prompt_ids(prompt) for prompt in prompts], device=args.device)
    drawn = {}

    def ours() -> None:
        drawn["ours"] = policy.sample(prompts, 1, 5.0, 0.0, batch=n)[:, 0]

    def theirs() -> None:
        drawn["theirs"] = generate(policy, ids, 5.0)

    seconds = bench.alternate({"ours": ours} | ({"theirs": theirs} if compare else {}), args.repeats, args.device)
    row = {
        "layers": geometry.layers,
        "width": geometry.width,
        "codebook": geometry.codebook,
        "image tokens": geometry.image_tokens,
        "batch": n,
        "ours, images/s": n / seconds["ours"],
        "generate, images/s": n / seconds["theirs"] if compare else None,
        "ratio": seconds["theirs"] / seconds["ours"] if compare else None,
        "tokens equal": check_equal(policy, drawn["ours"], drawn["theirs"]) if compare else None,
    }
    if args.device == "cpu":
        floor = cpu_floor_s(policy, geometry.image_tokens, args.repeats)
        row |= {"floor, images/s": n / floor, "of the floor": floor / seconds["ours"]}
    if args.device == "cuda":
        floor = floor_s(geometry, n, ids.shape[1], bench.limits(args.device))
        row |= {"floor, images/s": n / floor, "of the floor": floor / seconds["ours"], "peak GB": bench.peak_gb(args.device)}
    return row


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="pictures at a time (default 1 8 64; tiny: see the table)")
    parser.add_argument("--theirs", type=int, nargs="*", help="batches at which generate runs too (default: all)")
    args = parser.parse_args()
    geometry = bench.GEOMETRIES[args.geometry]
    if args.tiny:
        small = geometry._replace(side=12)
        cases = [(geometry._replace(layers=2), 1), (small, 4), (small._replace(codebook=16384), 4)]
    else:
        cases = [(geometry, n) for n in args.batches or (1, 8, 64)]
    rows = (measure(case, n, args.theirs is None or n in args.theirs, args) for case, n in cases)
    bench.table("sampling", rows, args)


if __name__ == "__main__":
    main()
