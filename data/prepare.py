"""Turns documents into prepared tokens: once per corpus, on all cores, and resumable.

Tokens are written in parts that end with a document. After each part the journal is replaced. It lists the complete
parts, and holds the state of the sources at which the next one starts; all other files in the folder are overwritten.
The manifest that `open_tokens` reads is written last.
"""

import itertools
import math
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError, UserError
from common.files import hold_lock, is_locked, make_dir, remove_leftovers, sha256, write_atomic
from common.reading import check_record, damage, read_bytes
from data.content import ContentIndex
from data.corpus import ALL_THE_SAME, ONE_MORE, Corpus, corpus_tokenizer, text_too_short
from data.encoding import BATCH_BYTES, document_batches, prefetch
from data.progress import progress
from data.shapes import Journal
from data.sources import Document, MissingTextError, Mixture
from data.stream_head import prepare_head
from data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer, read_tokenizer
from data.tokens import (
    MANIFEST,
    SPLITS,
    Tokens,
    documents_file,
    dump_with_checksum,
    load_with_checksum,
    open_tokens,
    read_documents,
)
from data.writing import EncodedDocuments, add_paths, digest_key, file_facts, write_manifest, write_part

PART_TOKENS = 1 << 26
JOURNAL = "journal.json"


def prepare(
    corpus: Corpus, cache: Path, sequence_length: int, console: Console | None = None, part_tokens: int = PART_TOKENS
) -> Tokens:
    """Return the tokens of a corpus from the cache, after preparing them if they are not there.

    Only the held-out documents of a streamed corpus are prepared; its training tokens are empty. The tokens do not
    depend on the sequence length, which is only checked. An interrupted preparation resumes after its last complete
    part, of about `part_tokens` tokens. Without a console no progress is shown.

    Raises:
        UserError: a source cannot be read, its text is too short, or the disk is full.
    """
    console = console or Console(quiet=True)
    try:
        corpus = corpus.with_content(ContentIndex(cache, console))
        folder = corpus.folder(cache)
    except MissingTextError as error:
        if (found := corpus.find(cache)) is None:
            raise
        folder = found
        path = f"data.{error.field}={error.value}"
        console.print(f"{path} is not there: using the tokens that were prepared from it, {folder}")
    if not (folder / MANIFEST).exists():
        try:
            _prepare_once(corpus, folder, console, part_tokens)
        except OSError as error:
            raise UserError(
                f"{error.filename or folder} cannot be written ({error.strerror or error}): complete parts are kept, "
                "and the same command continues"
            ) from error
    tokens = open_tokens(folder)
    if corpus.paths() not in tokens.facts["paths"]:
        add_paths(folder, corpus.paths())
    arrays = {"test": tokens.test} if corpus.streamed else {"training": tokens.train, "test": tokens.test}
    for split, array in arrays.items():
        if sequence_length >= len(array):
            raise text_too_short(sequence_length, f"the {split} text has {len(array):,} tokens")
    return tokens


def _prepare_once(corpus: Corpus, folder: Path, console: Console, part_tokens: int) -> None:
    """Prepare a corpus, unless another process has done so while this one waited for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    if is_locked(lock):
        console.print("waiting for another process that prepares the same tokens")
    with hold_lock(lock):
        if (folder / MANIFEST).exists():
            return
        if corpus.streamed:
            prepare_head(corpus, folder, console)
        else:
            _Preparation(corpus, folder, console, part_tokens).run()


def _new_journal(threshold: float, commits: dict[str, str]) -> dict[str, Any]:
    """Return the journal of a preparation that has read nothing."""
    return {
        "commits": commits,
        "threshold": threshold,
        "lowest_hash_fraction": 1.0,
        "highest_hash_fraction": 0.0,
        "documents": 0,
        "duplicates": 0,
        "text_bytes": 0,
        "bytes_read": {},
        "parts": [],
        "files": {},
        "mixture": None,
        "complete": False,
    }


class _Preparation:
    """One process that prepares the tokens of one folder."""

    def __init__(self, corpus: Corpus, folder: Path, console: Console, part_tokens: int) -> None:
        self.corpus, self.folder, self.console, self.part_tokens = corpus, folder, console, part_tokens
        self.cache_key = corpus.cache_key()
        self.journal: dict[str, Any] = {}
        self._digests: set[int] = set()  # of the documents so far, for deduplication

    def run(self) -> None:
        make_dir(self.folder)
        remove_leftovers(self.folder)
        self._open_journal()
        self.pinned = self.corpus.pinned_to(self.journal["commits"])
        while True:
            tokenizer = self._tokenizer()
            if not self.journal["complete"]:
                self._tokenize(tokenizer)
            threshold = self._threshold_for_both_splits()
            if threshold == self.journal["threshold"]:
                break
            self.console.print(f"restarting with val_fraction={threshold:.6g}, so that each split has a document")
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self.journal = _new_journal(threshold, self.journal["commits"])
            self._save_journal()
        self._finish(tokenizer)

    def _open_journal(self) -> None:
        """Load the journal of an interrupted preparation, or create one."""
        file = self.folder / JOURNAL
        if not file.exists():
            self.journal = _new_journal(self.corpus.val_fraction, self.corpus.commits())
            self._save_journal()
            return
        try:
            self.journal = load_with_checksum(read_bytes(file))
            check_record(Journal, self.journal)
        except (OSError, ValueError) as error:
            raise UserError(damage(file, error, f"remove the folder {self.folder}")) from error
        if self.journal["parts"]:
            self.console.print(f"continuing {self.folder} after part {len(self.journal['parts'])}")

    def _save_journal(self) -> None:
        write_atomic(self.folder / JOURNAL, dump_with_checksum(self.journal))

    def _tokenizer(self) -> Tokenizer:
        """Return the tokenizer in the folder; if there is none, the configured one or a newly trained one."""
        if (self.folder / TOKENIZER_FILES[-1]).exists():  # written last of its files
            for name in TOKENIZER_FILES:
                self._verify(name)
            return read_tokenizer(self.folder)
        if self.corpus.tokenizer is not None:
            tokenizer = load_tokenizer(self.corpus.tokenizer)
        else:
            tokenizer = corpus_tokenizer(self.pinned, self.console, threshold=self.journal["threshold"])
            self.pinned.check_content()
        tokenizer.save(self.folder)
        self.journal["files"] |= {name: file_facts(self.folder / name) for name in TOKENIZER_FILES}
        return tokenizer

    def _verify(self, name: str) -> None:
        """Raise `UserError` if a file that the journal knows does not have its checksum."""
        file, facts = self.folder / name, self.journal["files"].get(name)
        if facts is not None and (not file.is_file() or sha256(file) != facts["sha256"]):
            problem = "is damaged (it does not have the checksum it was written with)"
            raise UserError(f"{file} {problem}: remove the folder {self.folder}")

    def _tokenize(self, tokenizer: Tokenizer) -> None:
        """Tokenize the documents after the last complete part, and write them in parts."""
        journal, limit = self.journal, self.corpus.max_tokens or math.inf
        self._digests = self._written_digests() if self.corpus.deduplicate else set()
        encoded: EncodedDocuments = {split: [] for split in SPLITS}
        tokens = {split: sum(part[split]["tokens"] for part in journal["parts"]) for split in SPLITS}
        written = sum(tokens.values())
        mixture = Mixture(self.pinned.sources, journal["mixture"])
        batches = prefetch(document_batches(mixture, min(BATCH_BYTES, self.part_tokens)))
        encodings = prefetch((docs, tokenizer.encode([d.text for d in docs]), state) for docs, state in batches)
        total = limit if limit < math.inf else self.pinned.estimated_bytes()
        first_bytes, started = journal["text_bytes"], time.monotonic()
        with progress(self.console, "tokenizing") as report:
            for documents, arrays, state in encodings:
                for document, ids in zip(documents, arrays, strict=True):
                    if not self._keep(document):
                        continue
                    split = "test" if document.hash_fraction < journal["threshold"] else "train"
                    encoded[split].append((document, ids))
                    tokens[split] += len(ids)
                    if tokens["train"] >= limit:
                        break
                journal["bytes_read"] = state["bytes_read"]
                all_tokens = sum(tokens.values())
                speed = (journal["text_bytes"] - first_bytes) / 1e6 / (time.monotonic() - started)
                report(
                    tokens["train"] if self.corpus.max_tokens else journal["text_bytes"],
                    total,
                    f"tokenized {journal['documents']:,} documents, {all_tokens:,} tokens, {speed:.1f} MB/s",
                )
                if tokens["train"] >= limit:
                    break
                if all_tokens - written >= self.part_tokens:
                    journal["mixture"] = state
                    self._write_part(encoded, tokenizer)
                    encoded, written = {split: [] for split in SPLITS}, all_tokens
        journal["complete"] = True
        self._write_part(encoded, tokenizer)

    def _keep(self, document: Document) -> bool:
        """Count a document in the journal, and return whether it is kept: duplicates may be dropped."""
        journal = self.journal
        journal["documents"] += 1
        journal["text_bytes"] += document.size
        if self.corpus.deduplicate:
            key = digest_key(document.digest)
            if key in self._digests:
                journal["duplicates"] += 1
                return False
            self._digests.add(key)
        journal["lowest_hash_fraction"] = min(journal["lowest_hash_fraction"], document.hash_fraction)
        journal["highest_hash_fraction"] = max(journal["highest_hash_fraction"], document.hash_fraction)
        return True

    def _written_digests(self) -> set[int]:
        """Return the digest keys of the documents in the parts that are already written."""
        digests: set[int] = set()
        for part, split in itertools.product(self.journal["parts"], SPLITS):
            if part[split]["file"]:
                file = documents_file(self.folder / part[split]["file"])
                self._verify(file.name)
                try:
                    digests.update(read_documents(file)["digest"].tolist())
                except ValueError as error:
                    raise UserError(damage(file, error, f"remove the folder {self.folder}")) from error
        return digests

    def _write_part(self, encoded: EncodedDocuments, tokenizer: Tokenizer) -> None:
        """Write documents and their ids as the next part, if there are any, and save the journal.

        Raises:
            SourceError: the text has changed, so that they may be of another one than the folder is for.
        """
        self.pinned.check_content()
        part, files = write_part(self.folder, len(self.journal["parts"]), encoded, tokenizer)
        if files:
            self.journal["files"] |= files
            self.journal["parts"].append(part)
        self._save_journal()

    def _threshold_for_both_splits(self) -> float:
        """Return the threshold, moved as little as is needed for both splits to have a document, or raise."""
        journal = self.journal
        lowest, highest = journal["lowest_hash_fraction"], journal["highest_hash_fraction"]
        if lowest < highest:
            return min(max(journal["threshold"], math.nextafter(lowest, 1)), highest)
        shutil.rmtree(self.folder)
        if journal["documents"] - journal["duplicates"] > 1:
            raise UserError(ALL_THE_SAME)
        tokens = sum(part["train"]["tokens"] for part in journal["parts"])
        if self.corpus.max_tokens and tokens >= self.corpus.max_tokens:
            problem = f"is not allowed: the first document reaches it, and {ONE_MORE}"
            raise ConfigError("max_tokens", self.corpus.max_tokens, problem=problem)
        raise UserError(f"the text is one document: {ONE_MORE}")

    def _finish(self, tokenizer: Tokenizer) -> None:
        """Write the manifest and remove the journal."""
        journal = self.journal
        facts = write_manifest(
            self.folder,
            self.cache_key,
            self.corpus.paths(),
            tokenizer,
            journal["parts"],
            journal["files"],
            duplicates=journal["duplicates"],
            commits=journal["commits"],
        )
        (self.folder / JOURNAL).unlink(missing_ok=True)
        train, test = (facts[split]["tokens"] for split in SPLITS)
        self.console.print(f"tokenized {train:,} tokens for training, {test:,} held out")
        if len(journal["bytes_read"]) > 1:
            sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in journal["bytes_read"].items())
            self.console.print(f"read from each source, until one of them or data.max_tokens ended: {sizes}")
