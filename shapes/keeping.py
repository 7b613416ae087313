"""Where a pretraining run stands, kept beside its --out, so that it goes on when its command is typed again.

OUT.pretraining/ holds
    settings.json     what is taught, and how; another run is refused here
    STAGE.pt          the newest state of each stage: what was learnt, optimizer, random numbers, step
    log.jsonl         a row now and then: stage, step, minutes, losses; at the end of a stage what was measured

To teach a stage anew, remove its file and those of the stages after it. Only files that this program wrote are read.
"""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

# What may change between two calls of one run: how long its stages are, and when something is told or kept.
FREE = ("joint_steps", "gap_steps", "watch_every", "save_every", "keep_states", "samples", "out")


class Kept:
    """The states of a run's stages, written whole or not at all."""

    def __init__(self, args: Any) -> None:
        """Raises ValueError, naming what differs, where the directory is of another run."""
        self.directory: Path = args.out.with_name(args.out.name + ".pretraining")
        self.every: int = args.save_every
        self.started = time.monotonic()
        self.seconds = 0.0  # of earlier calls
        settings = {name: value for name, value in sorted(vars(args).items()) if name not in FREE}
        file = self.directory / "settings.json"
        if file.is_file():
            found = json.loads(file.read_text())
            differing = [name for name in settings if found.get(name) != settings[name]]
            if differing:
                name = differing[0]
                told = f"{name} was {found.get(name)}, now {settings[name]}"
                raise ValueError(f"{self.directory}: is of another run ({told}); remove it, or choose another --out")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write(file, lambda temporary: temporary.write_text(json.dumps(settings, indent=2) + "\n"))

    def _write(self, file: Path, write: Any) -> None:
        temporary = file.with_name(file.name + ".tmp")
        write(temporary)
        os.replace(temporary, file)

    @property
    def minutes(self) -> float:
        """How long the run has taken, all its calls together, as far as they were kept."""
        return (self.seconds + time.monotonic() - self.started) / 60

    def load(self, stage: str) -> dict[str, Any] | None:
        """The newest state of a stage, or None."""
        file = self.directory / f"{stage.replace(' ', '-')}.pt"
        if not file.is_file():
            return None
        state: dict[str, Any] = torch.load(file, weights_only=True)
        self.seconds, self.started = state["seconds"], time.monotonic()
        return state

    def save(self, stage: str, network: nn.Module, step: int, **more: Any) -> None:
        """Keep where a stage is; more: what else it is to be given back."""
        state = {"network": network.state_dict(), "step": step, "seconds": 60 * self.minutes, "random": torch.get_rng_state()}
        file = self.directory / f"{stage.replace(' ', '-')}.pt"
        self._write(file, lambda temporary: torch.save(state | more, temporary))

    def log(self, stage: str, step: int, **numbers: Any) -> None:
        with open(self.directory / "log.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, "minutes": round(self.minutes, 1), **numbers}) + "\n")

    def remove(self) -> None:
        """What is of no use once the checkpoint is there: all but the log and the settings."""
        for file in self.directory.glob("*.pt"):
            file.unlink()


def random_state(rng: random.Random) -> list[Any]:
    """The state of Python's random numbers, as `torch.load` takes it."""
    version, numbers, following = rng.getstate()
    return [version, list(numbers), following]


def set_random_state(rng: random.Random, state: list[Any]) -> None:
    version, numbers, following = state
    rng.setstate((version, tuple(numbers), following))
