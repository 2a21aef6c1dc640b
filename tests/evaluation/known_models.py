"""Models with known likelihoods, and one that records its responses."""

import math

import torch

from evaluation.language_model import LlamaLM
from models import LlamaConfig
from models.scoring import Score

CPU = torch.device("cpu")


class Oracle:
    """Stands in for a `Llama`: a token is likely if it continues a known text.

    It gets each token's context from the prefix tree, so that an error in the tree changes the scores.
    """

    def __init__(self, vocab_size: int, texts: list[list[int]], context: int = 2048) -> None:
        self.config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=2,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=context,
        )
        self.known = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}

    def score(self, tokens, tree, targets):
        assert len(tree.query_index) == len(targets)
        prefix_tokens = tree.prefixes.numel()
        log_probs = []
        for index, target in zip(tree.gather_index[tree.query_index].tolist(), targets.tolist(), strict=True):
            if index < prefix_tokens:
                number, last = divmod(index, tree.prefixes.shape[1])
                row = tree.prefixes[number, : last + 1]
            else:
                number, last = divmod(index - prefix_tokens, tree.suffixes.shape[1])
                row = tree.sequences[number][tree.visible[number, 0, last]]
            assert tree.positions[row].tolist() == list(range(len(row)))
            log_probs.append(0.0 if (*tokens[0, row].tolist(), target) in self.known else -9.0)
        return torch.tensor(log_probs), torch.tensor([log_prob == 0.0 for log_prob in log_probs])


class Uniform(Oracle):
    """Every token is as likely as any other."""

    def score(self, tokens, tree, targets):
        return torch.full(targets.shape, -math.log(self.config.vocab_size)), torch.zeros(len(targets), dtype=torch.bool)


class Recorder(LlamaLM):
    """Keeps the responses of each evaluation by request."""

    def __init__(self, model, tokenizer) -> None:
        super().__init__(model, tokenizer, CPU)
        self.recorded: list[dict[tuple[str, str], Score]] = []

    def loglikelihood(self, requests, **kwargs):
        responses = super().loglikelihood(requests)
        self.recorded.append({request.args: got for request, got in zip(requests, responses, strict=True)})
        return responses
