"""Our model as lm-eval sees a language model: no export is needed, and common contexts are computed once.

What is scored is what lm-eval's `hf` backend scores on the exported model, token for token; it fails where an answer is
longer than the model's context, which is scored in parts here.
"""

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

#: Tokens of an answer that is written, if the task does not say, as lm-eval's `hf` has it.
MOST_WRITTEN = 256


class LlamaLM(TemplateLM):
    """A `Llama` with its tokenizer.

    Where several processes have the model, all must ask it the same; each computes its share, and has all answers.

    Args:
        model: of which evaluation mode is not asked: it has no dropout.
        tokenizer: of the model.
        device: of the model.
        batch_tokens: tokens computed at once; `None`: as many as suit the device.

    Attributes:
        asked: texts scored so far.
        cut: how many of them were longer than what the model sees.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        device: torch.device,
        batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.encoder = tokenizer
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
        self._device = device
        self.asked = self.cut = 0

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text, and stands before one without a context."""
        return self.encoder.end

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at most."""
        return self.model.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; there are no special tokens around it."""
        return self._encode([string])[0]

    def _encode(self, strings: Sequence[str]) -> list[list[int]]:
        encoded = self.encoder.tokenizer.encode_batch_fast(list(strings), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) the log-likelihood in nats, and whether nothing is more likely."""
        return [(found.log_likelihood, found.greedy) for found in self._score(self._texts([r.args for r in requests]))]

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        texts = [Text([*context, *continuation], len(continuation)) for _, context, continuation in requests]
        return [(found.log_likelihood, found.greedy) for found in self._score(texts)]

    def _texts(self, pairs: Sequence[tuple[str, str]]) -> list[Text]:
        """Return what is scored of each context and continuation, as lm-eval's `_encode_pair` splits them."""
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation) if kept else (context, continuation))
        contexts = self._encode([context for context, _ in moved])
        wholes = self._encode([context + continuation for context, continuation in moved])
        found = []
        for (context, _), before, whole in zip(moved, contexts, wholes, strict=True):
            if context:
                found.append(Text(before + whole[len(before) :], len(whole) - len(before)))
            elif whole[0] == self.prefix_token_id:
                found.append(Text(whole, len(whole) - 1))
            else:
                found.append(Text([self.prefix_token_id, *whole], len(whole)))
        return found

    def _score(self, texts: Sequence[Text]) -> list[Score]:
        """Return the scores of texts, in order; what the model cannot see at once is scored in parts."""
        self.asked += len(texts)
        self.cut += sum(len(text.tokens) > self.max_length + 1 for text in texts)
        parts = [(number, part) for number, text in enumerate(texts) for part in split_long(text, self.max_length)]
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        asked = [part for _, part in parts]
        found: dict[int, Score] = {}
        for some in score(self.model, asked, self.batch_tokens, self.device, rank=rank, world_size=processes):
            found.update(some)
        if processes > 1:
            shares: list[Any] = [None] * processes
            dist.all_gather_object(shares, found)
            found = {place: each for share in shares for place, each in share.items()}
        of: list[list[Score]] = [[] for _ in texts]
        for place, (number, _) in enumerate(parts):
            of[number].append(found[place])
        return [Score(sum(part.log_likelihood for part in each), all(part.greedy for part in each)) for each in of]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in nats; each token once, with as much before it as fits."""
        windows: list[Text] = []
        of: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for before, after in map(utils.make_disjoint_window, rolling):
                windows.append(Text([*before, *after], len(after)))
                of.append(number)
        sums = [0.0] * len(requests)
        for number, found in zip(of, self._score(windows), strict=True):
            sums[number] += found.log_likelihood
        return sums

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context: the most likely token, each time from the start."""
        answers = []
        for context, settings in (request.args for request in requests):
            if settings.get("do_sample") or settings.get("temperature", 0.0) > 0:
                raise ValueError(
                    "a task that samples its answers cannot be evaluated: only the most likely are written"
                )
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            begun = len(tokens)
            text = ""
            for _ in range(settings.get("max_gen_toks", MOST_WRITTEN)):
                seen = torch.tensor([tokens[-self.max_length :]], device=self.device)
                token = int(self.model(seen)[0, -1].argmax())
                if token == self.eot_token_id:
                    break
                tokens.append(token)
                text = self.encoder.tokenizer.decode(tokens[begun:])
                if any(stop in text for stop in stops):
                    break
            answers.append(text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))])
        return answers
