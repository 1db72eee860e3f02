"""`Checkpoints`: what `fit` keeps in a folder, to go on from after whatever ended it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import fnn.train.checkpoint_tree as trees
from fnn import arguments
from fnn.train.checkpoint_files import CheckpointError, Damaged, Files, as_folder
from fnn.train.checkpoint_parts import WrongNumbers, read_onto, whole
from fnn.train.checkpoint_tree import Leaf
from fnn.train.configuration import versions
from fnn.train.result import FitResult
from fnn.train.state import State
from fnn.train.together import in_all_or_none, is_of_all

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and how often `fit` saves its work, so that the same call goes on from there.

        checkpoints = fnn.Checkpoints("runs/a", keep=3, best="validation_loss")
        result = fnn.fit(..., epochs=20, checkpoints=checkpoints)

    A process that ends in the midst of it, however it ends, is started again with the same call:
    that goes on where the newest checkpoint stands, and its parameters at the end are those of an
    uninterrupted run to the last bit (on the same devices, with the same versions). If the run is
    over, the call returns its result and trains no more; with more epochs, it trains those.

    A checkpoint holds the training state (parameters, optimiser's and network's state, ...), the
    place in the data, the history and the record of steps; what the call was (data's, optimiser's
    and key's digests, batch size, ...) and the versions of JAX and optax. It is written in the
    background by orbax, and is there whole or not at all. Every array carries a checksum, which is
    looked at when it is read; of an array that is divided among processes, each part does.

    Several processes write one checkpoint together, into a folder that all of them share. They save
    at epochs' ends and after `every_steps`, not when one of them is interrupted or fails.

    Besides at epochs' ends, `fit` saves when it ends, when Ctrl-C or SIGTERM ends it (it returns
    then, with `interrupted`: to end the process is the caller's), and when the data, a callback or
    a step raises: the work so far, in the midst of an epoch too.

    Fields:
        folder: of this run alone; made if need be. A second run in it at the same time is refused.
        every: save at the end of every so many epochs, and of the last. None: of each, but not so
            often that it would take more than a twentieth of the time.
        every_steps: and after so many steps within an epoch (or as soon after as the device returns
            to `fit`). None: ten minutes after the last one.
        keep: how many of the newest checkpoints to keep; None keeps all.
        best: the name of a number in the epoch's record, "validation_loss": the epoch with the
            best one is saved, too, and kept besides.
        higher: whether higher is better, as of an accuracy.
        allow_changed: what may differ from the call that made the checkpoints: of "data",
            "optimizer", "batch_size", "key", "shuffle", "start" (the first parameters), ... The
            error for a changed call says the names.

    Raises:
        ImportError: orbax-checkpoint isn't installed.
        TypeError, ValueError: an option is out of range.

    `fit` raises a CheckpointError for a folder that can't be written, a checkpoint that is
    damaged or of another call, and when the disk is full; nothing in the folder is changed then.
    """

    folder: Any
    every: int | None = None
    every_steps: int | None = None
    keep: int | None = 3
    best: str | None = None
    higher: bool = False
    allow_changed: Collection[str] = ()

    def __post_init__(self):
        where = "Checkpoints"
        settle = lambda name, value: object.__setattr__(self, name, value)
        settle("folder", as_folder(where, self.folder))
        for name in ("every", "every_steps", "keep"):
            if getattr(self, name) is not None:
                settle(name, arguments.integer(where, name, getattr(self, name), least=1))
        if self.best is not None and not isinstance(self.best, str):
            raise TypeError(
                f"{where}: best must be the name of a number in the epoch's record, such as "
                f"'validation_loss', but got {arguments.show(self.best)}."
            )
        arguments.flag(where, "higher", self.higher)
        given = self.allow_changed
        is_collection = isinstance(given, Collection) and not isinstance(given, str)
        if not is_collection or not all(isinstance(name, str) for name in given):
            raise TypeError(
                f"{where}: allow_changed must be a tuple of names, such as ('optimizer',), but got "
                f"{arguments.show(given)}."
            )
        settle("allow_changed", tuple(given))
        Files(self.folder)  # is orbax there?

    # ---------------------------------------------------------------------------- for the user

    def steps(self) -> list[int]:
        """The numbers of the checkpoints that are there: how many batches each had seen."""
        return Files(self.folder).steps()

    def best_step(self) -> int | None:
        """The number of the checkpoint with the best number in its record; None without any."""
        return self._best(self._scores(Files(self.folder)))

    def load(self, state: State, step: int | Literal["latest", "best"] = "latest") -> FitResult:
        """What `fit` would have returned when the checkpoint was written.

        Args:
            state: a training state of the same shapes and dtypes, as `train_step(loss,
                optimizer).init(params)` makes. What comes back is built as it is, and lies on the
                devices that it lies on: of a mesh other than the one that wrote it, for one.
            step: which checkpoint: one of `steps()`, or the latest, or the best.

        Returns:
            A FitResult; `interrupted` if training wasn't over.

        Raises:
            CheckpointError: there is none, it is damaged, or of other shapes.
            TypeError: state is no training state, or step is neither a number nor a name.
            ValueError: step is another name.
        """
        if not isinstance(state, State):
            raise TypeError(
                "load: state must be a training State, such as train_step(loss, optimizer).init("
                f"params), but got {arguments.show(state)}. (load_params wants parameters only.)"
            )
        files = Files(self.folder)
        return self._read(files, self._chosen("load", files, step), state).result()

    def load_params(self, params: Any, step: int | Literal["latest", "best"] = "latest") -> Any:
        """The parameters alone.

        Args:
            params: a tree of the same shapes and dtypes, of arrays or types: what `net.init(key,
                x)` makes, or `jax.eval_shape(net.init, key, x)`.
            step: as for `load`.

        Returns:
            A tree built as `params` is.

        Raises:
            CheckpointError, TypeError, ValueError: as `load`.
        """
        files = Files(self.folder)
        step = self._chosen("load_params", files, step)
        arguments.no_result("load_params", "params", params)
        return self._read(files, step, params, "state.params").state

    def discard(self, step: int) -> Path:
        """Set a checkpoint aside, so that the one before it is the latest.

        Args:
            step: its number.

        Returns:
            Its folder's new name, which ends in `.discarded`. Nothing is deleted.

        Raises:
            CheckpointError: there is none of that number.
            TypeError: step is no integer.
        """
        files = Files(self.folder)
        step = arguments.integer("discard", "step", step)
        return files.discard(self._chosen("discard", files, step))

    def __repr__(self) -> str:
        """The options, and the newest checkpoints, in a few lines."""
        options = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name != "folder" and getattr(self, field.name) != field.default
        ]
        lines = [f"Checkpoints({', '.join([repr(str(self.folder)), *options])})"]
        files = Files(self.folder)
        steps = files.steps()
        best = self.best_step()
        if len(steps) > 8:
            lines.append(f"  {len(steps) - 8} older ones")
        for step in steps[-8:]:
            try:
                about = files.about(step)
                score = about["scores"].get(self.best)
                line = f"step {step}, {about['epochs']} epochs over, {about['time']}"
                line += "" if score is None else f", {self.best} {score:.4g}"
            except (Damaged, KeyError, TypeError) as error:
                line = f"step {step}: damaged: {error}"
            lines.append(f"  {line}{' (best)' if step == best else ''}")
        return "\n".join(lines)

    # -------------------------------------------------------------------------------- inside

    def _chosen(self, where: str, files: Files, step: Any) -> int:
        steps = files.steps()
        if not steps:
            raise CheckpointError(f"there are no checkpoints in {self.folder}.", str(self.folder))
        if step == "latest":
            return steps[-1]
        if step == "best":
            if self.best is None:
                raise CheckpointError(
                    f"these checkpoints in {self.folder} aren't told what is best, so that none "
                    "is the best: Checkpoints(folder, best='validation_loss'), say.",
                    str(self.folder),
                )
            best = self._best(self._scores(files))
            if best is None:
                raise CheckpointError(
                    f"none of the checkpoints in {self.folder} has a number {self.best!r} in its "
                    "record, so that none is the best.",
                    str(self.folder),
                )
            return best
        if isinstance(step, str):
            arguments.choice(where, "step", step, ("latest", "best"))
        step = arguments.integer(where, "step", step)
        if step not in steps:
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.folder}: there are {steps}.",
                str(self.folder),
                step,
            )
        return step

    def _scores(self, files: Files) -> dict[int, float]:
        """Of each checkpoint that has one, the number that is to be best."""
        scores = {}
        for step in files.steps() if self.best is not None else ():
            try:
                score = files.about(step)["scores"].get(self.best)
            except (Damaged, KeyError, TypeError):
                continue
            if score is not None:
                scores[step] = score
        return scores

    def _best(self, scores: dict[Any, float]) -> Any:
        scores = {step: score for step, score in scores.items() if not math.isnan(score)}
        if not scores:
            return None
        # Of equals the first: later ones are no better.
        sign = -1 if self.higher else 1
        return min(scores, key=lambda step: (sign * scores[step], step))

    def _read(self, files: Files, step: int, like: Any, root: str = "state") -> Saved:
        """A checkpoint, checked.

        Raises:
            CheckpointError: it is damaged, or isn't built as `like` is.
        """
        if is_of_all(like):
            return in_all_or_none(lambda: self._read_here(files, step, like, root), CheckpointError)
        return self._read_here(files, step, like, root)

    def _read_here(self, files: Files, step: int, like: Any, root: str) -> Saved:
        try:
            return read(files, step, like, root)
        except Damaged as error:
            raise self._damaged(files, step, str(error)) from error
        except _Different as error:
            shown = "\n".join(f"  {line}" for line in error.lines)
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} is of another network or "
                f"optimiser:\n{shown}\nNothing was changed. Make them as they were, or give this "
                "run a folder of its own.",
                str(self.folder),
                step,
            ) from None

    def _damaged(self, files: Files, step: int, why: str) -> CheckpointError:
        message = (
            f"the checkpoint of step {step} in {self.folder} is damaged: {why}.\nNothing was "
            "changed. "
        )
        previous = next(
            (s for s in reversed(files.steps()) if s < step and _is_whole(files, s)), None
        )
        if previous is None:
            message += "There is no whole one before it"
            after = ", and training begins anew."
        else:
            message += f"The one of step {previous} is whole"
            after = f", and training goes on from step {previous}."
        message += (
            f": Checkpoints({str(self.folder)!r}).discard({step}) sets this one aside (it renames "
            f"it); then call again{after}"
        )
        return CheckpointError(message, str(self.folder), step, previous)


def check_checkpoints(value: Any, has_validation: bool) -> None:
    """Raise unless `fit` can keep its work by it."""
    if not isinstance(value, Checkpoints):
        raise TypeError(
            "fit: checkpoints must be an fnn.Checkpoints such as fnn.Checkpoints('runs/a'), but "
            f"got {arguments.show(value)}."
        )
    if value.best is not None and value.best.startswith("validation_") and not has_validation:
        raise ValueError(
            f"fit: the best of the checkpoints is that of {value.best!r}, but there are no data "
            "for it: validation=..."
        )


# ------------------------------------------------------------------------------------- checkpoints


class _Different(Exception):
    def __init__(self, lines: list[str]):
        super().__init__(lines)
        self.lines = lines


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Fields:
        state: the training state.
        history: as in FitResult.
        steps: as in FitResult.
        sizes: how many examples the batch of each step had.
        about: all else.
        best: as in FitResult.
    """

    state: State
    history: dict[str, list]
    steps: dict[str, np.ndarray]
    sizes: np.ndarray
    about: dict[str, Any]
    best: State | None = None

    def result(self) -> FitResult:
        """As `fit` would return it."""
        interrupted = not self.about["stopped"] and self.about["epochs"] < self.about["last_epoch"]
        state = self.state
        return FitResult(state.params, self.history, self.steps, state, interrupted, best=self.best)


def write(files: Files, step: int, saved: Saved) -> None:
    """Begin to write a checkpoint.

    Raises:
        CheckpointError: this one, or the one before, can't be written.
    """
    state, arrays = trees.taken_apart(saved.state, "state")
    best, of_best = trees.taken_apart(saved.best, "best")
    record = {f"history {name}": np.asarray(values) for name, values in saved.history.items()}
    record |= {f"steps {name}": np.asarray(values) for name, values in saved.steps.items()}
    record["sizes"] = np.asarray(saved.sizes, np.int64)
    rows, more = trees.taken_apart(list(record.values()), "record")
    rows = [leaf._replace(path=name) for name, leaf in zip(record, rows, strict=True)]
    about = {
        "format": _FORMAT,
        "versions": versions(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "state": [leaf._asdict() for leaf in state],
        "best": [leaf._asdict() for leaf in best],
        "record": [leaf._asdict() for leaf in rows],
        **saved.about,
    }
    files.write(step, about, arrays | of_best | more)


def read(files: Files, step: int, like: Any, root: str = "state") -> Saved:
    """Read a checkpoint, and check it.

    Args:
        files: the folder.
        step: its number.
        like: a state of the same leaves, or a part of one.
        root: which part: "state.params".

    Raises:
        Damaged: it can't be read, or isn't what was written.
        _Different: it isn't built as `like` is.
    """
    about = files.about(step)
    record = _leaves(about, "record")
    state = [leaf for leaf in _leaves(about, "state") if _is_of(leaf, root)]
    best = _leaves(about, "best") if root == "state" else []  # built as the state is
    lines = trees.differences(trees.described(like, root), state)
    if lines:
        raise _Different(lines)
    targets = jax.tree.leaves(like)
    pairs = [*zip(state, targets, strict=True), *zip(best, targets, strict=bool(best))]
    parts = {leaf.name: _in_parts(t, leaf) for leaf, t in pairs if leaf.name and _is_divided(t)}
    named = [leaf.name for leaf in (*state, *best, *record) if leaf.name]
    arrays = files.arrays(step, [name for name in named if name not in parts], parts)
    wrong = trees.damaged([*state, *best, *record], arrays)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Damaged(f"the numbers of {', '.join(wrong[:3])}{more} haven't their checksum")
    history: dict[str, list] = {}
    steps: dict[str, np.ndarray] = {}
    for leaf in record:
        kind, _, name = leaf.path.partition(" ")
        array = trees.as_numpy(leaf, arrays)
        if kind == "history":
            history[name] = array.tolist() if array.ndim == 1 else list(array)
        elif kind == "steps":
            steps[name] = array
    sizes = trees.as_numpy(record[-1], arrays)
    put = lambda leaves: trees.put_together(like, leaves, arrays)
    return Saved(put(state), history, steps, sizes, about, put(best) if best else None)


def _leaves(about: dict[str, Any], name: str) -> list[Leaf]:
    """What a checkpoint tells of the leaves of a tree."""
    try:
        form = about["format"]
        if form != _FORMAT:
            raise Damaged(f"it has format {form}, and this version of fnn reads {_FORMAT}")
        return [Leaf(**(leaf | {"shape": tuple(leaf["shape"])})) for leaf in about[name]]
    except (KeyError, TypeError) as error:
        raise Damaged("its about/metadata isn't fnn's") from error


def _is_of(leaf: Leaf, root: str) -> bool:
    rest = leaf.path.removeprefix(root)
    return rest != leaf.path and (not rest or rest[0] in ".[")


def _is_divided(target: Any) -> bool:
    """Whether this process needs only a part of an array."""
    sharding = getattr(target, "sharding", None)
    if sharding is None or trees.is_key(target):
        return False
    return not (sharding.is_fully_addressable or sharding.is_fully_replicated)


def _in_parts(target: Any, leaf: Leaf) -> Callable[[Callable], jax.Array]:
    """What makes an array, of which this process needs a part, of a function that reads parts."""
    written: Sequence = leaf.parts or [(whole(leaf.shape), leaf.checksum)]

    def make(read):
        of_its_dtype = lambda slices: trees.of_its_dtype(leaf, read(slices))
        try:
            return read_onto(target.sharding, leaf.shape, written, of_its_dtype)
        except WrongNumbers:
            raise Damaged(f"the numbers of {leaf.path} haven't their checksum") from None

    return make


def _is_whole(files: Files, step: int) -> bool:
    """Can a checkpoint be read, and is it what was written?"""
    try:
        about = files.about(step)
        leaves = [leaf for name in ("state", "best", "record") for leaf in _leaves(about, name)]
        arrays = files.arrays(step, [leaf.name for leaf in leaves if leaf.name])
    except Damaged:
        return False
    return not trees.damaged(leaves, arrays)
