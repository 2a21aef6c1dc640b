"""A Hugging Face model as lm-eval loads it, if all of it is there, and nothing but data in its files."""

from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from common.reading import Record, parse_record, read_bytes


class _Index(Record):
    """The index of weights in several files."""

    weight_map: dict[str, str]


class CompleteHFLM(HFLM):
    """lm-eval's `HFLM`, but no weights are drawn at random, and none come from outside of the model's folder.

    Raises:
        ValueError: weights are missing, an index names files that are not in the folder, or the configuration names
            code on the hub.
    """

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        if "/" in str(attention := getattr(self.config, "_attn_implementation", None)):
            raise ValueError(f"attn_implementation={attention} is code on the hub")
        for index in Path(pretrained).glob("*.index.json"):
            names = set(parse_record(_Index, read_bytes(index)).weight_map.values())
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{index.name} names {outside[0][:80]}, which is not the name of a file in the folder")
        auto: Any = self.AUTO_MODEL_CLASS  # type: ignore[has-type]

        class Complete:
            @staticmethod
            def from_pretrained(*positional: Any, **named: Any) -> Any:
                model, info = auto.from_pretrained(*positional, output_loading_info=True, **named)
                if missing := sorted(info["missing_keys"]):
                    raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
                return model

        self.AUTO_MODEL_CLASS = Complete
        try:
            super()._create_model(pretrained, *args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto
