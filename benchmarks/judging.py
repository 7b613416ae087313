"""Judging: a picture's own prompt, its foil and a paraphrase in one pass, against one full forward per question; and replies.

    python benchmarks/judging.py --tiny
    python benchmarks/judging.py --geometry janus-pro-7b --batches 32

Both sides get pixels; the VQ decoder, which both need once, is timed by itself. The floor is the arithmetic of one picture
with all its questions at the card's measured rate; it is stated for GPU runs only.

Replies (score.py --answer reply) are of --reply-tokens tokens, none of which ends one: own prompt and foil side by side,
against the same two questions answered by P(yes), and against transformers' generate, a question at a time; texts must agree.
"""

import sys

import bench
import torch

from families.pretrained import quiet

TEXT = 60  # tokens of text in a question, its chat template counted in


def question_like(policy, words: int) -> str:
    """A question of which prefix and rest make TEXT tokens beside the picture."""
    prefix, rest = policy.question_ids("red " * words)
    return question_like(policy, words + 1) if len(prefix) + len(rest) - policy.image_tokens < TEXT else "red " * words


def flops(geometry: bench.Geometry, tokens: int) -> float:
    """Of the vision tower and the language model over `tokens` positions, attention's products left out of the tower's."""
    vision = 2 * geometry.image_tokens * geometry.vision_layers * 12 * geometry.vision_width**2
    attention = 2 * 2 * tokens**2 / 2 * geometry.width * geometry.layers
    return vision + 2 * tokens * geometry.layer_weights + attention


def full_forward(policy, pixels: torch.Tensor, question: str) -> torch.Tensor:
    """P(yes) of each picture by transformers' own forward over prefix and question, as one would write it: (B,)."""
    prefix, rest = policy.question_ids(question)
    ids = torch.tensor([prefix + rest] * len(pixels), device=policy.device)
    logits = policy.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits
    p = logits[:, -1].float().softmax(-1)
    yes, no = p[:, policy._yes].sum(-1), p[:, policy._no].sum(-1)
    return yes / (yes + no)


def library_replies(policy, pixels: torch.Tensor, question: str, n_tokens: int) -> list[list[int]]:
    """What transformers' own generate writes of each picture, greedily."""
    prefix, rest = policy.question_ids(question)
    ids = torch.tensor([prefix + rest] * len(pixels), device=policy.device)
    length = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "eos_token_id": None}
    with quiet():
        made = policy.model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=False, **length
        )
    return made[:, ids.shape[1] :].tolist()


@torch.inference_mode()
def measure(geometry: bench.Geometry, n: int, args) -> dict:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    policy = bench.build(geometry, args.device, dtype)
    question = question_like(policy, 1)
    questions = [question, question.replace("red", "blue"), question.replace("red", "green")]
    size = policy.model.config.vision_config.image_size
    pictures = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, device=args.device)
    pixels = policy._pixels(pictures)
    tokens = torch.randint(0, geometry.codebook, (n, geometry.image_tokens), device=args.device)
    ours = policy.judge(pictures, [questions] * n, batch=n)[0]
    theirs = torch.stack([full_forward(policy, pixels, question) for question in questions], dim=1)
    if (worst := (ours - theirs).abs().max().item()) > (0.05 if args.device == "cuda" else 1e-4):
        sys.exit(f"the answers differ by {worst:.2g}")
    policy._ends, asked, most = [], questions[:2], args.reply_tokens  # no token ends a reply
    written = [row[0].text for row in policy.reply(pictures, [asked] * n, most, batch=n)]
    expected = [
        policy.tokenizer.decode(ids, skip_special_tokens=True).strip()
        for ids in library_replies(policy, pixels, asked[0], most)
    ]
    if args.device == "cpu" and written != expected:  # bfloat16 may part them at a near tie
        sys.exit("the replies differ")
    seconds = bench.alternate(
        {
            "replies": lambda: policy.reply(pictures, [asked] * n, most, batch=n),
            "two": lambda: policy.judge(pictures, [asked] * n, batch=n),
            "generate": lambda: [library_replies(policy, pixels, question, most) for question in asked],
            "three": lambda: policy.judge(pictures, [questions] * n, batch=n),
            "one": lambda: policy.judge(pictures, [questions[:1]] * n, batch=n),
            "full": lambda: [full_forward(policy, pixels, question) for question in questions],
            "decode": lambda: policy.decode(tokens, min(n, 16)),
        },
        args.repeats,
        args.device,
    )
    row = {
        "batch": n,
        "picture tokens": geometry.image_tokens,
        "text tokens": TEXT,
        "three questions, images/s": n / seconds["three"],
        "three against one": seconds["three"] / seconds["one"],
        "full forwards against ours": seconds["full"] / seconds["three"],
        "VQ decode, images/s": n / seconds["decode"],
        "reply tokens": most,
        "two replies, images/s": n / seconds["replies"],
        "two replies against two P(yes)": seconds["replies"] / seconds["two"],
        "generate against ours": seconds["generate"] / seconds["replies"],
    }
    if args.device == "cuda":
        rest = len(policy.question_ids(question)[1])
        wanted = flops(geometry, geometry.image_tokens + TEXT + 2 * rest)
        row |= {
            "of peak arithmetic": n * wanted / seconds["three"] / bench.limits(args.device).flops_per_s,
            "peak GB": bench.peak_gb(args.device),
        }
    return row


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="pictures at a time (default 32; tiny: 2)")
    parser.add_argument("--reply-tokens", type=int, default=32, help="tokens of a reply (default 32: The score is 1, and why)")
    args = parser.parse_args()
    batches = args.batches or ((2,) if args.tiny else (32,))
    bench.table("judging", (measure(bench.GEOMETRIES[args.geometry], n, args) for n in batches), args)


if __name__ == "__main__":
    main()
