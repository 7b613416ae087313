"""How a model draws token by token: log-probs of given image tokens, and the decode loop, on the lean forward pass of llama.py.

Legend: B rows of a batch, P prompts, n pictures in flight, T image tokens a picture, V codebook size, L tokens of text,
R rows in flight (doubled by guidance), C hidden size, D head size.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.llama import KeyValueCache, Llama, additive
from families.logits import draw, guide, head_logps
from families.pretrained import reason

READ_STEP = 64  # a GPU's decode step, recorded or not, reads the cache up to the next multiple of this


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs of given tokens


class CausalBranch(nn.Module):
    """Log-probs of image tokens given prompts: the one differentiable path, all of it inside one module's forward.

    What draws token by token sets these and says how image tokens are read and predicted. One root module is what sharding
    wrappers need.
    """

    embed_tokens: nn.Module
    language_model: nn.Module
    codebook_size: int

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, T) -> what the language model reads (B, T, C)."""
        raise NotImplementedError

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits of the image tokens that they predict (..., V)."""
        raise NotImplementedError

    def forward(self, ids: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """ids (B, L), each row its prompt up to begin-of-image, `lengths` (B,) ids, then anything; tokens (B, T).

        Returns log-probs (B, T) float32. Hidden state k predicts image token k+1 and the last prompt position predicts token
        0, so the last image token is never fed in. Each row's image follows its own prompt and what is left over comes
        last, where causal attention never looks: no mask is needed, and flash attention takes none.
        """
        step = torch.arange(tokens.shape[1], device=ids.device)
        text = self.embed_tokens(ids)
        if torch.is_autocast_enabled(text.device.type):
            text = text.float()  # what the layers add to, also where frozen weights are bfloat16
        image = self.embed_image(tokens[:, :-1]).to(text.dtype)  # (B, T - 1, C)
        after = (lengths[:, None] + step[:-1])[..., None].expand_as(image)
        embeddings = F.pad(text, (0, 0, 0, len(step) - 1)).scatter(1, after, image)  # (B, L + T - 1, C)
        hidden = self.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        predicts = (lengths[:, None] - 1 + step)[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, predicts)  # (B, T, C)
        logps = head_logps(self.image_logits, hidden, tokens, self.codebook_size)
        return logps.clone()  # no view: sharding hangs its hook on it


# ---------------------------------------------------------------------------------------------------------------------
# The decode loop


def noise(seeds: list[int], n: int, length: int) -> np.ndarray:
    """Uniform numbers (P, n, length) float64, each row from (prompt's seed, candidate number) alone (Philox counters)."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed % 2**64, candidate])).random(length)
        for seed in seeds
        for candidate in range(n)
    ]
    return np.stack(rows).reshape(len(seeds), n, length)


class Drawing:
    """The decode loop of one batch shape: everything that a step reads or writes has its place, allocated once.

    A step is plain tensor work that never waits for the device. On a GPU it is recorded as a CUDA graph, one for each
    READ_STEP tokens of cache to be read, and replayed: no Python, no launches, and short caches are not read as long ones.
    Where a prompt ends is a number on the device, so recorded steps hold for every prompt that fits in.
    On a CPU it runs as it stands and reads what is there.
    """

    def __init__(
        self,
        branch: CausalBranch,
        llama: Llama,
        longest: int,
        n: int,
        image_tokens: int,
        guidance: float,
        temperature: float,
        record: bool,
    ) -> None:
        """n pictures at a time, of `image_tokens` tokens, after prompts of at most `longest` tokens with their padding.

        record: replay steps, until that fails; then, and without it, each is run as it stands, in the same sizes.
        """
        self.branch, self.llama, self.shape = branch, llama, (n, image_tokens, guidance, temperature, record)
        self.guidance, self.temperature, self.record = guidance, temperature, record
        self.weights = llama.layers()  # recorded steps read these very tensors
        rows = 2 * n if guidance != 1 else n
        self.grain = READ_STEP if record or self.weights[0].to_out.is_cuda else 1
        self.cache = llama.cache(rows, self._reads(longest + image_tokens - 1))
        room, device = self.cache[0].shape[2], self.cache[0].device
        self.longest = room - image_tokens + 1
        self.length = torch.zeros(1, dtype=torch.int64, device=device)  # of the prompts with their padding
        self.angles = llama.angles(torch.arange(room, device=device))  # two of (room, D)
        self.added = torch.zeros(rows, 1, 1, room, dtype=self.cache[0].dtype, device=device)  # to attention's scores
        self.first = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # the position of image token 0
        self.uniforms = torch.zeros(n, image_tokens, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(n, image_tokens, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # the image token that is chosen next
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(device) if record else None

    def serves(self, shape: tuple, length: int) -> bool:
        """Whether (n, image tokens, guidance, temperature, record) are this one's, with room for prompts of `length` tokens."""
        return shape == self.shape and length <= self.longest and self.weights is self.llama.layers()

    def draw(
        self,
        prefix: KeyValueCache,
        rows: Tensor,
        mask: Tensor,
        hidden: Tensor,
        uniforms: Tensor,
        advance: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Continue prompts to pictures: tokens (n, T).

        prefix: the cache of all prompts; rows (R,): which of them each row continues; mask (R, L) bool and hidden (R, C):
        their real tokens and last hidden states; uniforms (n, T) float64. What lies behind L is of an earlier batch: masked,
        and written over.
        """
        length = mask.shape[1]
        self.length.fill_(length)
        for mine, theirs in zip(self.cache, prefix, strict=True):
            mine[:, :, :length] = theirs[rows]
        self.first.copy_(mask.sum(dim=-1, keepdim=True))
        self.uniforms.copy_(uniforms)
        self.added.fill_(float("-inf"))
        self.added[:, 0, 0, :length] = additive(mask, self.added.dtype)
        self.masked = self.grain > 1 or not mask.all()  # without padding, a CPU's exact reading needs no mask
        self.step.zero_()
        with torch.inference_mode():  # nothing of it is differentiated: cheaper still than no_grad
            self._choose(hidden)
            for position in range(length, length + self.tokens.shape[1] - 1):
                self._advance(self._reads(position + 1))
                if advance is not None:
                    advance(len(self.tokens) / self.tokens.shape[1])
        return self.tokens.clone()

    def _reads(self, used: int) -> int:
        """How much of the cache a step reads of which `used` places are filled."""
        return -(-used // self.grain) * self.grain

    def _advance(self, end: int) -> None:
        """One step: replayed where it has been recorded; the first of its kind runs, then is recorded for the next."""
        if end in self._graphs:
            self._graphs[end].replay()
        elif self._stream is None:
            self._feed_and_choose(end)
        else:
            self._run_and_record(end, self._stream)

    def _run_and_record(self, end: int, stream: "torch.cuda.Stream") -> None:
        """The first step of its kind: run, record, and go back to replay it once, which has to choose the same tokens.

        Run and recorded on one stream of this drawing's own device, as CUDA's libraries keep their workspaces by stream. Where
        recording fails, or a replay goes wrong, a line on stderr says so and this step and all others are run as they stand.
        """
        device = self.tokens.device
        before = self.tokens.clone(), self.step.clone()
        with torch.cuda.device(device):
            outside = torch.cuda.current_stream()
            stream.wait_stream(outside)
            with torch.cuda.stream(stream):  # and no longer, also where a failed recording leaves it current
                self._feed_and_choose(end)
                try:
                    self._graphs[end] = self._recorded(end, stream)
                    chosen = self.tokens.clone(), self.step.clone()
                    self._go_to(before)
                    self._graphs[end].replay()
                    if not (torch.equal(self.tokens, chosen[0]) and torch.equal(self.step, chosen[1])):
                        raise RuntimeError("replayed, the step chose other tokens")
                except torch.OutOfMemoryError:  # a smaller batch will do
                    raise
                except RuntimeError as error:
                    self._stop_recording(error)
                    self._go_to(before)
                    self._feed_and_choose(end)
            outside.wait_stream(stream)

    def _recorded(self, end: int, stream: "torch.cuda.Stream") -> "torch.cuda.CUDAGraph":
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # graphs never run at once: one pool
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._feed_and_choose(end)
        return graph

    def _go_to(self, state: tuple[Tensor, Tensor]) -> None:
        """Set tokens and step; what a step writes besides them, it writes again when it is run again."""
        self.tokens.copy_(state[0])
        self.step.copy_(state[1])

    def _stop_recording(self, error: RuntimeError) -> None:
        self.record, self._stream = False, None
        self._graphs.clear()
        told = f"decode steps cannot be recorded on {self.tokens.device} ({reason(error)}); drawing goes on without, slower"
        print(f"warning        {told}", file=sys.stderr)

    def _feed_and_choose(self, end: int) -> None:
        """Run the token chosen last through the language model and choose the next; `end` places of the cache are read."""
        place = self.length + self.step  # (1,)
        x = self.branch.embed_image(self.tokens.index_select(1, self.step))  # (n, 1, C)
        if len(self.first) > len(x):
            x = x.repeat(2, 1, 1)  # (R, 1, C)
        cos, sin = (table[self.first + self.step] for table in self.angles)  # (R, 1, D)
        mask = self.added.index_fill_(-1, place, 0.0)[..., :end] if self.masked else None
        hidden = self.llama.forward(x, (cos, sin), self.cache, place, end, mask)
        self.step += 1
        self._choose(hidden[:, -1])

    def _choose(self, hidden: Tensor) -> None:
        """Draw image token number `step` from the hidden states (R, C) that predict it."""
        logits = self.branch.image_logits(hidden).float()  # (R, V)
        if len(logits) > len(self.tokens):
            logits = guide(logits, self.guidance)  # (n, V)
        token = draw(logits, self.temperature, self.uniforms.index_select(1, self.step)[:, 0])
        self.tokens.index_copy_(1, self.step, token[:, None])
