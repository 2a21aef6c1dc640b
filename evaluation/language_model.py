"""A `Llama` behind lm-eval's model interface: no export is needed, and common prefixes are computed once.

Scores equal those of lm-eval's `hf` backend on the exported model, token for token. The exception is a continuation
longer than the model's context: `hf` fails, and this module scores it in parts.
"""

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from data import Tokenizer
from models import Llama
from models.scoring import Score, Text, score, split_long

#: Tokens computed at once, by device.
BATCH_TOKENS = {"cuda": 1 << 16, "cpu": 1 << 10}

#: Default limit of generated tokens, as in lm-eval's `hf`.
MAX_GEN_TOKENS = 256


class LlamaLM(TemplateLM):
    """A `Llama` with its tokenizer.

    With several processes, all must make the same requests. Each computes a part of them, and gets all responses.
    Of `num_texts` texts scored so far, `num_truncated` were longer than the model's context.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, device: torch.device, batch_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.encoder = tokenizer
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
        self._device = device
        self.num_texts = self.num_truncated = 0

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text. It is also the first token of a text without context."""
        return self.encoder.end

    @property
    def max_length(self) -> int:
        """Context length in tokens."""
        return self.model.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self._encode([string])[0]

    def _encode(self, strings: Sequence[str]) -> list[list[int]]:
        encodings = self.encoder.tokenizer.encode_batch_fast(list(strings), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Return the log-likelihood in nats of each (context, continuation), and whether it is the greedy one."""
        return self._score(self._texts([request.args for request in requests]))

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Score]:
        return self._score([Text([*before, *after], len(after)) for _, before, after in requests])

    def _texts(self, pairs: Sequence[tuple[str, str]]) -> list[Text]:
        """Return the tokens to score of each context and continuation, split as by lm-eval's `_encode_pair`."""
        moved = []  # trailing spaces of the context go to the continuation
        for context, continuation in pairs:
            stripped = context.rstrip()
            moved.append((stripped, context[len(stripped) :] + continuation) if stripped else (context, continuation))
        context_ids = self._encode([context for context, _ in moved])
        full_ids = self._encode([context + continuation for context, continuation in moved])
        texts = []
        for (context, _), before, full in zip(moved, context_ids, full_ids, strict=True):
            if context:
                texts.append(Text(before + full[len(before) :], len(full) - len(before)))
            elif full[0] == self.prefix_token_id:
                texts.append(Text(full, len(full) - 1))
            else:
                texts.append(Text([self.prefix_token_id, *full], len(full)))
        return texts

    def count_texts(self, kind: str, requests: Sequence[Instance]) -> tuple[int, int]:
        """Return how many texts the requests of a kind, such as "loglikelihood", have, and how many are truncated."""
        texts: list[Text] = []
        if requests and kind == "loglikelihood":
            texts = self._texts([request.args for request in requests])
        elif kind == "loglikelihood_rolling":
            texts = [window for request in requests for window in self._windows(request)]
        return len(texts), self._truncated(texts)

    def _truncated(self, texts: Sequence[Text]) -> int:
        return sum(len(text.tokens) > self.max_length + 1 for text in texts)

    def _score(self, texts: Sequence[Text]) -> list[Score]:
        self.num_texts += len(texts)
        self.num_truncated += self._truncated(texts)
        parts = [(index, part) for index, text in enumerate(texts) for part in split_long(text, self.max_length)]
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        part_texts = [part for _, part in parts]
        part_scores = score(self.model, part_texts, self.batch_tokens, self.device, rank, world_size)
        if world_size > 1:
            gathered: list[Any] = [None] * world_size
            dist.all_gather_object(gathered, part_scores)
            part_scores = dict(ChainMap(*gathered))
        by_text: list[list[Score]] = [[] for _ in texts]
        for number, (index, _) in enumerate(parts):
            by_text[index].append(part_scores[number])
        return [
            Score(sum(part.log_likelihood for part in results), all(part.greedy for part in results))
            for results in by_text
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats. Each token is scored once, with as much context as fits."""
        windows: list[Text] = []
        window_request: list[int] = []
        for number, request in enumerate(requests):
            windows += self._windows(request)
            window_request += [number] * (len(windows) - len(window_request))
        sums = [0.0] * len(requests)
        for number, result in zip(window_request, self._score(windows), strict=True):
            sums[number] += result.log_likelihood
        return sums

    def _windows(self, request: Instance) -> list[Text]:
        """Return the parts of a text in which each token is scored once."""
        tokens = self.tok_encode(request.args[0])
        rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return [Text([*before, *after], len(after)) for before, after in map(utils.make_disjoint_window, rolling)]

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each context, up to a stop string. There is no key-value cache."""
        responses = []
        for context, settings in (request.args for request in requests):
            if settings.get("do_sample") or settings.get("temperature", 0.0) > 0:
                raise ValueError("a task that samples its answers cannot be evaluated: generation is greedy")
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            start = len(tokens)
            text = ""
            for _ in range(settings.get("max_gen_toks", MAX_GEN_TOKENS)):
                inputs = torch.tensor([tokens[-self.max_length :]], device=self.device)
                token = int(self.model(inputs)[0, -1].argmax())
                if token == self.eot_token_id:
                    break
                tokens.append(token)
                text = self.encoder.tokenizer.decode(tokens[start:])
                if any(stop in text for stop in stops):
                    break
            responses.append(text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))])
        return responses
