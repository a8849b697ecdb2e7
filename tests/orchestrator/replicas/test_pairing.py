"""Which token ids the orchestrator allows a draft replica to propose, given both vocabularies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers

from orchestrator.replicas.pairing import Pairing
from outrider.runtime.protobuf import pack_ranges, unpack_ranges
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2
from tests.services.tokenizer_files import write_tokenizer

# The model has more rows than the tokenizer has tokens, as Qwen's.
VOCAB_SIZE = 320


def tokenizer(directory: Path, *added: str) -> Tokenizer:
    directory.mkdir()
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(list(added))
    backend.save(str(path))
    loaded = Tokenizer.load(str(directory))
    assert loaded is not None
    return loaded


def info(name: str, tokenizer: Tokenizer) -> model_pb2.ModelInfo:
    return model_pb2.ModelInfo(
        name=name,
        model_fingerprint=name * 8,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=VOCAB_SIZE,
    )


async def unshared(target: Tokenizer, draft: Tokenizer) -> list[int]:
    """The ids that a draft with this tokenizer is told not to propose."""

    async def hashes() -> bytes:
        return draft.vocabulary.to_bytes()

    pairing = Pairing(target, assume_same_vocabulary=False)
    model = info("draft", draft)
    assert pairing.paired_target(model) is None, "no target is known yet"
    await pairing.check_target(info("target", target), hashes)
    await pairing.check_draft(model, hashes)
    paired = pairing.paired_target(model)
    assert paired is not None
    assert (paired.name, paired.model_fingerprint) == ("target", "target" * 8)
    return unpack_ranges(paired.unshared_ids, "unshared_ids").tolist()


async def test_equal_vocabularies_share_all_ids(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path / "a", "<x>"), tokenizer(tmp_path / "b", "<x>")
    assert await unshared(first, second) == []


async def test_tokens_that_only_one_has_are_not_drafted(tmp_path: Path) -> None:
    """Nor are ids without a token: the draft may have learnt anything there."""
    plain = tokenizer(tmp_path / "plain")
    size = plain.vocab_size
    extended = tokenizer(tmp_path / "extended", "<think>", "</think>")
    rest = list(range(size, VOCAB_SIZE))
    assert await unshared(plain, extended) == rest
    assert await unshared(extended, plain) == rest


async def test_an_id_with_another_token_is_not_drafted(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path / "ours", "<|end|>", "<tool>")
    theirs = tokenizer(tmp_path / "theirs", "<|eot|>", "<tool>")
    end = ours.vocab_size - 2
    assert await unshared(ours, theirs) == [end, *range(end + 2, VOCAB_SIZE)]


def test_ranges_are_packed_and_read() -> None:
    for ids in ([], [0], [5, 6, 7], [0, 2, 4, 5, 9], list(range(300))):
        packed = pack_ranges(np.array(ids, np.int64))
        assert unpack_ranges(packed, "ids").tolist() == ids
    assert len(pack_ranges(np.arange(100, 4_000))) == 8
