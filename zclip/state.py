"""The statistics of a rule while it runs: made for parameters, moved to their device, replaced after each step."""

import weakref
from collections.abc import Iterable, Mapping, Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from zclip.apply import listed_optimizers
from zclip.arguments import ArgumentError
from zclip.decision import State
from zclip.norm import Parameters, Shard, device_of, listed, parameters_of, statistics_dtype
from zclip.scope import check_scope, check_split, group_names, patterns_of, plain_scope, split_by_scope
from zclip.stateful import Stateful
from zclip.tensors import TensorId, find, identify, parameter_names


class Statistics(Stateful):
    """Statistics of a rule, counters and telemetry. Base of `ClippingStrategy` and of `zclip.updates.OptimizerRule`."""

    #: Whether the statistics can be of some of the parameters only.
    takes_scope = True

    def __init__(self) -> None:
        super().__init__()
        self.telemetry: dict[str, Tensor] = {}  # 0-dim, of the last step; the first is its norm
        self._naming_module: nn.Module | None = None  # names parameters that `step` gets without their module
        self._scope_is_checked = False

    @property
    def scope(self) -> str | Sequence[str] | None:
        """Patterns of the names or groups of the parameters that the statistics are of; `None`: all."""
        return self._scope

    @scope.setter
    def scope(self, scope: str | Sequence[str] | None) -> None:
        """Change the scope between two steps. The statistics stay, and `changes` records it.

        The next step raises if it matches nothing. `changes` then does not list it.

        Raises:
            ArgumentError: it is not a pattern, or a list of patterns; or a rule over updates, or a strategy in
                DeepSpeed's engine, is to have one.
            ValueError: there are statistics of tensors without names.
        """
        check_scope(scope)
        if scope is not None:
            self._check_takes_scope(scope)
        before = self._patterns()
        if before != (None if scope is None else patterns_of(scope)):
            self._check_named(self.tensors)
        self._scope = plain_scope(scope)
        self._scope_is_checked = False
        if self.__dict__.get("counters"):  # it runs
            self._record_scope(before)

    def _record_scope(self, before: list[str] | None) -> None:
        """Record the change from a scope, or from the one before, if no step has used that scope."""
        if self._unused_scope is not None:
            before, _ = self._unused_scope
            self._unrecord_scope()
        after = self._patterns()
        self._record_changes({"scope": before}, {"scope": after})
        self._unused_scope = (before, self.changes[-1] if before != after else None)

    def _unrecord_scope(self) -> None:
        """Remove the change to a scope that no step has used from the record."""
        if self._unused_scope is not None:
            _, unused = self._unused_scope
            self.changes = [change for change in self.changes if change is not unused]

    def _check_takes_scope(self, scope: object) -> None:
        """Raise `ArgumentError` if the statistics cannot be of some of the parameters only."""
        if not self.takes_scope:
            problem = f"is not possible: {type(self).__name__} acts on all parameters of its optimizer"
            raise ArgumentError("scope", scope, problem)

    def prepare(
        self,
        *models: Parameters,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Create the statistics for these parameters, as the first `step` on them would; keep existing statistics.

        `torch.distributed.checkpoint` loads into existing tensors. Call this before it loads into a strategy that has
        statistics for each tensor and has not taken a step.

        Args:
            models: modules, parameters, or iterables of either, as for `step`.
            optimizer: the optimizer, or several, if the scope has patterns of groups. Default `None`.
            process_group: see `step`.

        Raises:
            ValueError: no parameter requires gradients, the parameters are on the meta device, or none is in the scope.
        """
        models = tuple(map(listed, models))
        self._check_initialised()
        shards, others = self._in_scope(parameters_of(models), models, listed_optimizers(optimizer), process_group)
        trained = process_group is not None or any(shard.parameter.requires_grad for shard in shards)
        device = device_of(shards or others, process_group) if trained else torch.device("meta")
        if device.type == "meta":
            raise ValueError("prepare() takes the parameters to train, on their device: there are none, or on meta")
        if not self.counters:
            shape = (max(len(shards), 1),) if self.per_tensor else ()
            self._prepare_state(torch.zeros(shape, dtype=statistics_dtype(device), device=device), shards, models)

    def _prepare_state(self, like: Tensor, shards: Sequence[Shard], models: Parameters) -> None:
        """Create the statistics before the first step, or bring restored ones to the device and order of `like`."""
        if not self.counters:
            self._initialise(torch.zeros_like(like))
        elif self.counters["nonfinite"].device != like.device or self.counters["nonfinite"].is_inference():
            self._move(like)
        if self.per_tensor:
            self._follow_tensors(like, shards, models)

    @torch.inference_mode(False)
    def _move(self, like: Tensor) -> None:
        """Copy the statistics to the device of `like`; a copy made in inference mode could not be changed later."""
        self.counters = {key: value.to(like.device, copy=True) for key, value in self.counters.items()}
        self.state = {
            key: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype, copy=True)
            for key, value in self.state.items()
        }

    def _follow_tensors(self, like: Tensor, shards: Sequence[Shard], models: Parameters) -> None:
        """Give each of the n parameters its statistics, and new ones to those that have none."""
        objects = self._objects
        same_objects = all(ref() is shard.parameter for ref, shard in zip(objects, shards, strict=False))
        if shards and same_objects and len(objects) == len(shards):
            return
        current = identify(shards, self._names(models)) or [TensorId(0, None)]
        if self.tensors:
            found = find(type(self).__name__, self.tensors, objects, shards, current)
            if found != list(range(len(self.tensors))):
                self._reorder(like, found)
        self.tensors, self._objects = current, [weakref.ref(shard.parameter) for shard in shards]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _reorder(self, like: Tensor, found: Sequence[int | None]) -> None:
        """Bring the statistics of tensors to their new indices, and make those of new tensors."""
        new = self.initial_state(torch.zeros_like(like))
        known = [k for k, i in enumerate(found) if i is not None]
        for key, value in self.state.items():
            if value.ndim:
                self.state[key] = new[key].clone()
                self.state[key][known] = value[[found[k] for k in known]]

    def _in_scope(
        self,
        shards: Sequence[Shard],
        models: Parameters,
        optimizers: Sequence[Optimizer],
        process_group: dist.ProcessGroup | None,
    ) -> tuple[Sequence[Shard], Sequence[Shard]]:
        """Return the parameters that are in the scope, and the others.

        In the first step of a scope, the ranks of a process group agree on whether it is possible. One of them may have
        no parameter in it.
        """
        if self._scope is None:
            return shards, []
        names, groups = self._names(models), group_names(optimizers)
        split = split_by_scope(shards, names, groups, self._scope)
        if not self._scope_is_checked or (process_group is None and not split.inside):
            try:
                check_split(split, self._scope, names, groups, process_group)
            except ValueError:
                self._unrecord_scope()
                raise
            self._scope_is_checked = True
        return split.inside, split.others

    def _names(self, models: Parameters) -> dict[int, str]:
        """Return the names of parameters by their ids."""
        return parameter_names(models) | parameter_names(self._naming_module or ())

    def _advance(self, new: State, *, kept: Tensor, finite: Tensor, clipped: Tensor) -> None:
        """Replace the statistics where `kept` is true, and count, without a device sync.

        Args:
            new: statistics after this step; those that are missing stay.
            kept: 0-dim bool.
            finite: 0-dim bool, whether the norm is finite.
            clipped: 0-dim bool, whether the step is clipped or skipped.

        Raises:
            ValueError: `initial_state` does not have one of the new statistics.
        """
        if unknown := sorted(new.keys() - self.state.keys()):
            lacks = f"it lacks {', '.join(unknown)}"
            raise ValueError(f"{type(self).__name__}.initial_state must return all of the statistics: {lacks}")
        self._unused_scope = None
        # Make new tensors before copying any: a returned statistic may alias another one of the current state.
        state = {key: torch.where(kept, value, self.state[key]) for key, value in new.items()}
        consecutive = self.counters["consecutive_clips"]
        counters = {
            "consecutive_clips": torch.where(kept, torch.where(clipped, consecutive + 1, 0), consecutive),
            "nonfinite": self.counters["nonfinite"] + ~finite,
            "consecutive_nonfinite": torch.where(finite, 0, self.counters["consecutive_nonfinite"] + 1),
        }
        for tensors, values in ((self.state, state), (self.counters, counters)):
            for key, value in values.items():
                tensors[key].copy_(value)

    def _count_of_changes(self, name: str, like: Tensor) -> dict[str, Tensor]:
        """Return the number of changes of arguments as telemetry of this name, like another one, if there are any."""
        return {name: torch.full_like(like, len(self.changes))} if self.changes else {}

    def read_telemetry(self) -> dict[str, float]:
        """Return the last step's telemetry as floats, in one transfer from the device; empty before the first step."""
        if not self.telemetry:
            return {}
        dtype = next(iter(self.telemetry.values())).dtype  # that of the norm
        values = torch.stack([value.to(dtype) for value in self.telemetry.values()]).tolist()
        return dict(zip(self.telemetry, values, strict=True))


class TelemetryNameError(ValueError):
    """A rule's telemetry has the name of a number that every rule records."""


def check_names(rule: Statistics, own: Set[str], telemetry: Mapping[str, Tensor]) -> None:
    """Raise `TelemetryNameError` if a rule's telemetry has the name of a number that every rule records."""
    for name in sorted(own & telemetry.keys()):
        problem = f"must not have the name {name}, which every rule records"
        raise TelemetryNameError(f"telemetry of {type(rule).__name__} {problem}")


def where_finite(finite: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a value of telemetry, or NaN (false, if it is a bool) where `finite` is false."""
    return finite & value if value.dtype == torch.bool else torch.where(finite, value.to(dtype), torch.nan)
