"""Where a run stands, and how it gets there: from its newest valid checkpoint, as all ranks agree."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich.console import Console
from torch import Tensor

from xiangxin_fast.errors import InputError

from . import checkpoint
from .config import TrainConfig
from .guards import Guards
from .mixture import same_past
from .parallel import Team, begun_at, note_begun


@dataclass
class Position:
    """How far a run is; beside the tensors, all that a checkpoint keeps."""

    step: int = 0  # optimizer steps made, those counted whose update was left out
    updates: int = 0  # those that changed parameters
    sample: int = 0  # global index of the next sample
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # spent in the loop, over all starts of the run
    guards: Guards = field(default_factory=Guards)

    def progress(self, config: TrainConfig, step: int = 0) -> float:
        """The part of the run, 0..1, that lies behind `step` steps after this position."""
        elapsed = self.seconds / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max((self.step + step) / config.steps, elapsed))

    def to_json(self) -> dict:
        """The fields as JSON values that no later change of the position reaches."""
        return asdict(self)

    @staticmethod
    def from_json(state: dict) -> "Position":
        """The position in the state of a checkpoint."""
        values = {entry.name: state[entry.name] for entry in fields(Position)}
        return Position(**values | {"guards": Guards(**state["guards"])})


@dataclass(frozen=True)
class Start:
    """Where a run goes on: at which position, and from which checkpoint (None: the start)."""

    position: Position
    path: Path | None
    rejected: list[str]  # newer checkpoints that were not used, and why


def resume(
    config: TrainConfig, description: list[dict], tensors: dict[str, Tensor], team: Team, console: Console
) -> Start:
    """Reads the checkpoint that --resume asks for into `tensors`; rank 0 chooses, and all read the same.

    Raises InputError where it is damaged, was made of other samples up to there, or of another model; and where all
    checkpoints of the run are damaged, since to begin anew in silence would be worse.
    """
    found = team.first(lambda: _choice(config, description))
    for reason in found["rejected"]:
        console.print(f"not used: {reason}", markup=False)
    if found["path"] is None:
        team.first(lambda: note_begun(0))
        return Start(Position(), None, found["rejected"])
    path, state = Path(found["path"]), found["state"]
    _read(path, state, tensors, config, team, console)
    team.first(lambda: note_begun(state["step"]))
    for name, value in config.to_json().items():
        if name not in ("resume", "data", "out") and (before := state["config"].get(name)) != value:
            console.print(f"with another {name}: {before} -> {value}", markup=False)
    return Start(Position.from_json(state), path, found["rejected"])


def rewind(config: TrainConfig, before: int, tensors: dict[str, Tensor], team: Team, console: Console) -> Start | None:
    """Reads the newest valid checkpoint of a step before `before`; None where there is none."""

    def choose() -> dict | None:
        path, state, rejected = checkpoint.newest_valid(config.out / "checkpoints", before)
        return path and {"path": str(path), "state": state, "rejected": [str(reason) for reason in rejected]}

    found = team.first(choose)
    if found is None:
        return None
    path, state = Path(found["path"]), found["state"]
    _read(path, state, tensors, config, team, console)
    return Start(Position.from_json(state), path, found["rejected"])


def _choice(config: TrainConfig, description: list[dict]) -> dict:
    folder = config.out / "checkpoints"
    present = checkpoint.checkpoints(folder)
    nothing = {"path": None, "state": None, "rejected": []}
    asked, begun = config.resume, begun_at()
    if begun is not None and any(checkpoint.step_of(path) > begun for path in present):
        asked = "auto"  # torchrun has started the ranks again: what they were asked for they have done
    if asked == "never":
        if present:
            raise InputError(f"{folder}: expected none with --resume never, got {present[0].name}: take another --out")
        return nothing
    if asked == "auto":
        path, state, rejected = checkpoint.newest_valid(folder)
        if path is None and rejected:
            raise InputError(
                f"{folder}: expected a valid checkpoint, got {len(rejected)} damaged, the newest {rejected[0]}: take "
                "another --out to begin anew"
            )
        if path is None:
            return nothing
    else:
        path, rejected = Path(asked), []
        state = checkpoint.verify(path)
    for name, value in {"seed": config.seed, "context": config.context}.items():
        if state[name] != value:
            raise InputError(f"{path}: expected {name} {state[name]} as it was begun with, got {value}")
    if not same_past(state["data"], description, state["sample"]):
        raise InputError(
            f"{path}: expected the samples before number {state['sample']} as it was begun with ({state['data']}), "
            f"got others with --data {config.data} ({description})"
        )
    return {"path": str(path), "state": state, "rejected": [str(reason) for reason in rejected]}


def _read(path: Path, state: dict, tensors: dict[str, Tensor], config: TrainConfig, team: Team, console: Console):
    """Loads a checkpoint on all ranks and sets those aside that the run, going on from it, no longer follows."""
    checkpoint.load(path, state, tensors, team)

    def set_newer_aside() -> list[str]:
        newer = [p for p in checkpoint.checkpoints(config.out / "checkpoints") if checkpoint.step_of(p) > state["step"]]
        return [f"{p}: renamed to {checkpoint.set_aside(p).name}" for p in newer]

    for line in team.first(set_newer_aside):
        console.print(line, markup=False)
    console.print(f"Going on from {path}", markup=False)
