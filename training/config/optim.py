"""The section `optim`: which optimizer a run has, with its settings, and the schedule of the learning rate."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.errors import ConfigError, UserError
from common.settings import Allowed, Flag, FolderName, Fraction, NotNegative, Positive, Settings
from common.text import nearest

#: Settings of each optimizer by its name, besides the schedule and the z-loss, which all have.
OPTIMIZER_SETTINGS = {
    "adamw": ("betas", "eps", "weight_decay", "fused", "amsgrad"),
    "sgd": ("momentum", "nesterov", "weight_decay", "fused"),
    "muon": ("momentum", "nesterov", "ns_steps", "adjust_lr_fn", "betas", "eps", "weight_decay", "fused"),
}
_OPTIMIZER_KEYS = {key for keys in OPTIMIZER_SETTINGS.values() for key in keys}
_OPTIMIZERS = "one of " + ", ".join(OPTIMIZER_SETTINGS)


class OptimConfig(Settings):
    """The optimizer and its learning-rate schedule: linear warm-up, then a cosine (the paper's Table 1).

    With `_target_`, further keys are the arguments of the class that it names.
    """

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    target: Annotated[str | None, Allowed("a class, as my_optimizers.Lion, or null")] = Field(None, alias="_target_")
    """Import path of a subclass of `torch.optim.Optimizer`; null: the optimizer that `name` names."""
    name: FolderName
    """adamw, sgd or muon; with `_target_` any other name, for the run's name and tables."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None,
        Field(strict=False),
        Allowed("two numbers from 0 to below 1"),
    ] = None
    """Decay rates of AdamW's two moments."""
    eps: Annotated[
        Positive | Annotated[tuple[NotNegative | None, ...], Field(strict=False, min_length=1)] | None,
        Allowed("a number above 0, or for a class of your own a list of numbers from 0"),
    ] = None
    """Added to the root of AdamW's second moment. A class of your own may take a list, as Adafactor does."""
    weight_decay: Annotated[NotNegative | None, Allowed("a number from 0")] = None
    """Weight decay of every parameter: decoupled from the gradient in AdamW and Muon, an L2 penalty in SGD."""
    fused: Annotated[Flag | None, Allowed("true or false")] = None
    """Whether AdamW or SGD runs as one fused kernel. Clipping is folded into it, but not with Muon."""
    amsgrad: Annotated[Flag | None, Allowed("true or false")] = None
    """Whether AdamW's updates are divided by the maximum of the second moments so far (AMSGrad); 4 more bytes a
    parameter."""
    momentum: Annotated[float | None, Field(ge=0, lt=1), Allowed("a number from 0 to below 1")] = None
    """Momentum of SGD, or of Muon's matrices."""
    nesterov: Annotated[Flag | None, Allowed("true or false")] = None
    """Whether the momentum of SGD or Muon is Nesterov's."""
    ns_steps: Annotated[int | None, Field(ge=1, lt=100), Allowed("an integer from 1 to 99")] = None
    """Newton-Schulz iterations that orthogonalise Muon's updates."""
    adjust_lr_fn: Annotated[Literal["original", "match_rms_adamw"] | None, Allowed("original or match_rms_adamw")] = (
        None
    )
    """Factor on the rate of Muon's matrices, by their shape: torch's, or one for which AdamW's rates and decay fit."""
    warmup_fraction: Fraction
    """Share of the steps over which the learning rate rises linearly from 0."""
    final_lr_fraction: Fraction
    """Share of the peak learning rate at which the cosine ends."""
    z_loss: NotNegative
    """Weight of log(Z)^2 in the loss; 1e-4 in PaLM; 0 turns it off, as in the paper."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer's class, without the parameters and the learning rate."""
        if self.target is None:
            return {key: getattr(self, key) for key in OPTIMIZER_SETTINGS[self.name]}
        given = {key: value for key in sorted(_OPTIMIZER_KEYS) if (value := getattr(self, key)) is not None}
        return given | dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _without_amsgrad(cls, values: Any) -> Any:
        """Runs from before there was AMSGrad, and files without it, have none."""
        if isinstance(values, dict) and values.get("name") == "adamw" and values.get("_target_") is None:
            return {"amsgrad": False} | values
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target is not None:
            return self
        if self.name not in OPTIMIZER_SETTINGS:
            problem = f"is not allowed: it must be {_OPTIMIZERS}, or optim._target_ must name a class"
            raise ConfigError("name", self.name, problem=problem)
        settings = OPTIMIZER_SETTINGS[self.name]
        for key, value in (self.model_extra or {}).items():
            near = nearest(key, [*type(self).model_fields])
            meant = f" (the nearest is optim.{near})" if near else ""
            raise ConfigError(key, value, problem=f"is not possible: there is no key optim.{key}{meant}")
        for key in sorted(_OPTIMIZER_KEYS):
            value = getattr(self, key)
            if key in settings and value is None:
                raise UserError(f"optim.{key} is not set: give it as optim.{key}=...")
            if key not in settings and value is not None:
                others = f"which has {', '.join(settings)}; optim={self.name} sets them"
                problem = f"is not possible with optim.name={self.name}, {others}"
                raise ConfigError(key, list(value) if isinstance(value, tuple) else value, problem=problem)
        if "betas" in settings and len(self.betas or ()) != 2:
            raise ConfigError("betas", list(self.betas or ()), "two numbers from 0 to below 1")
        if isinstance(self.eps, tuple):
            raise ConfigError("eps", list(self.eps), "a number above 0")
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ConfigError("nesterov", True, problem="is not possible with optim.momentum=0")
        return self

    @model_serializer(mode="wrap")
    def _of_this_optimizer(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings of other optimizers, so that a run is named as before there were others."""
        values: dict[str, Any] = handler(self)
        optional = {"target", "_target_", *_OPTIMIZER_KEYS}
        return {key: value for key, value in values.items() if not (value is None and key in optional)}
