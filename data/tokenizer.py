"""The byte-level BPE tokenizer, trained on the corpus itself."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

#: All bytes and the end-of-text token.
SMALLEST_VOCABULARY = 257


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; any text, in any script, can be encoded and decoded without loss.

    Args:
        texts: the documents to learn merges from.
        vocab_size: number of ids, `END_OF_TEXT` (id 0) included; at least `SMALLEST_VOCABULARY`. A small corpus
            may yield fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer
