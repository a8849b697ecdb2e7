"""The chain of draft tokens under commits of the target's tokens, without a model."""

from __future__ import annotations

import random

import numpy as np
import pytest

from draft_service.messages import OpenDraft, Proposed
from draft_service.reencoding import Reencoder
from draft_service.tree.kv_branches import Branch
from draft_service.tree.text_tree import TextTree
from outrider.engine import KVStore
from outrider.errors import InvalidRequest
from outrider.sampling.params import Verification
from outrider.tokenizer import Tokenizer
from tests.draft_service.draft_worker import key, opening
from tests.services.tokenizer_files import write_tokenizer
from tests.vocabularies import write_sentencepiece

PROMPT = "The quick brown fox "
STORY = "jumps over the lazy dog. 你好, naïve 🙂 fox!\n  def return(x): x + 1\n" * 3
MAX_LEN = 512


class Play:
    """A tree, and the words that the draft writes: STORY, token by token."""

    def __init__(
        self, target: Tokenizer, draft: Tokenizer, buffer_len: int = MAX_LEN, **fields: object
    ) -> None:
        self.target, self.draft = target, draft
        self.reencoder = Reencoder(target, draft)
        self.target_ids = target.encode(PROMPT)
        token_ids, rest = self.reencoder.draft_context(self.target_ids)
        buffer = np.zeros(buffer_len, np.int64)
        buffer[: len(token_ids)] = token_ids
        given = {"max_len": MAX_LEN, "vocab_size": 1 << 20, "gamma": 3, "lookahead": 2, **fields}
        made: OpenDraft = opening(1, self.target_ids, **given)
        branch = Branch(KVStore([], 1).open(1))
        self.tree = TextTree(buffer, len(token_ids), branch, made, self.reencoder, rest)
        self.buffer = buffer

    def draft_next(self, story: str) -> list[Proposed]:
        """The draft's next token of a text that continues what it has."""
        text = self.text()
        written = story.encode()
        start = len(text) - len(PROMPT.encode())
        assert written[:start] == text[len(PROMPT.encode()) :]
        former = [*self.buffer[: self.tree.committed_len].tolist(), *self.tree.root.token_ids]
        window, rest = former[-16:], written[start : start + 40]
        num_kept, ids, _ = self.reencoder.extended_draft(window, rest)
        if num_kept < len(window):
            _, ids, _ = self.reencoder.extended_draft([], rest)
        has_update = self.tree.add(self.tree.root, ids[0], None, ())
        return [self.tree.proposed(key(1))] if has_update else []

    def text(self) -> bytes:
        """Text of all the draft's tokens, committed and drafted."""
        ids = [*self.buffer[: self.tree.committed_len].tolist(), *self.tree.root.token_ids]
        joined = b"".join(map(self.reencoder.draft_text, ids))
        return joined.removeprefix(b"<s>").removeprefix(b" ")

    def commit(self, token_ids: list[int], gamma: int = 3, ahead_gamma: int = 3) -> list[Proposed]:
        self.target_ids += token_ids
        outcome = self.tree.commit(token_ids, len(self.target_ids), gamma, ahead_gamma)
        assert outcome.source is self.tree.root
        self.num_right = outcome.num_right
        return [self.tree.proposed(key(1)) for _ in self.tree.updates()]

    def check(self) -> None:
        """The committed draft tokens and the bytes ahead are the committed text."""
        ids = self.buffer[: self.tree.committed_len].tolist()
        joined = b"".join(map(self.reencoder.draft_text, ids)).removeprefix(b"<s>")
        committed = self.reencoder.target_text(self.target_ids).removeprefix(b"<s>")
        whole = (joined + self.tree._ahead).removeprefix(b" ")
        assert whole.decode("utf-8", "replace") == committed.removeprefix(b" ").decode(
            "utf-8", "replace"
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "trained").mkdir()
    write_tokenizer(root / "trained", corpus=PROMPT + STORY)
    first = Tokenizer.load(str(root / "trained"))
    second = Tokenizer.load(str(write_sentencepiece(root / "pieces")))
    assert first is not None
    assert second is not None
    return first, second


@pytest.fixture(params=[0, 1], ids=["byte-level target", "SentencePiece target"])
def play(request: pytest.FixtureRequest, both: tuple[Tokenizer, Tokenizer]) -> Play:
    return Play(*(both if request.param == 0 else both[::-1]))


def test_a_right_draft_is_never_cut(play: Play) -> None:
    """The target writes the same text: every token is foreseen, and no KV is dropped."""
    proposed: list[int] = []
    while len(proposed) < 40:
        while play.tree.is_needed:
            play.draft_next(STORY)
        num = min(3, len(play.tree._ready))
        assert num > 0
        tokens = play.tree._ready[:num]
        proposed += tokens
        play.commit(tokens)
        assert play.num_right == MAX_LEN
        play.check()
    assert STORY.encode().startswith(play.reencoder.target_text(proposed))


def test_a_wrong_draft_is_cut_at_the_last_common_token(play: Play) -> None:
    while play.tree.is_needed:
        play.draft_next(STORY)
    other = play.target.encode("jumps onto", add_special_tokens=False)
    former_len = play.tree.committed_len
    play.commit(other)
    play.check()
    assert play.num_right >= former_len - 1, "the prompt is not run again"
    assert not play.tree.root.token_ids
    assert play.tree.is_needed


def test_proposals_name_what_they_assume(play: Play) -> None:
    """Drafting ahead: further tokens, after those of an earlier proposal."""
    events: list[Proposed] = []
    while play.tree.is_needed or play.tree.extensions():
        events += play.draft_next(STORY)
    assert len(events) > 1
    written: list[int] = []
    for event in events:
        num_assumed = len(event.assumed_token_ids)
        assert event.base_len == len(play.target_ids) + num_assumed
        assert list(event.assumed_token_ids) == written[:num_assumed]
        assert 1 <= len(event.token_ids) <= 3
        written = [*event.assumed_token_ids, *event.token_ids]
        assert STORY.encode().startswith(play.reencoder.target_text(written))
    assert len(written) > 3, "beyond the first proposal"
    again = play.commit(written[:2])
    assert again == [], "what was sent is not sent again"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_committed(seed: int, both: tuple[Tokenizer, Tokenizer]) -> None:
    """Random tokens, foreseen ones, parts of characters: the text is always the committed one."""
    rng = random.Random(seed)
    target, draft = both if seed % 2 else both[::-1]
    play = Play(target, draft)
    for _ in range(40):
        for _ in range(rng.randrange(6)):
            if play.tree.is_needed or play.tree.extensions():
                token_id = rng.choice(draft.encode(STORY, add_special_tokens=False))
                if play.tree.add(play.tree.root, token_id, None, ()):
                    event = play.tree.proposed(key(1))
                    assert event.token_ids
        num = rng.randrange(1, 4)
        foreseen = play.tree._ready[:num]
        random_ids = [rng.choice(target.encode(STORY, add_special_tokens=False))]
        for event in play.commit(foreseen if foreseen and rng.random() < 0.6 else random_ids):
            assert event.token_ids
        if play.tree.committed_len > MAX_LEN - 60:
            break
        play.check()


def test_supports_are_certain(both: tuple[Tokenizer, Tokenizer]) -> None:
    play = Play(*both, sampling={"temperature": 1.0}, verification=Verification.REJECTION)
    events: list[Proposed] = []
    while not events:
        events += play.draft_next(STORY)
    (event,) = events
    assert event.supports is not None
    for token_id, support in zip(event.token_ids, event.supports, strict=True):
        assert support.token_ids.tolist() == [token_id]
        assert support.weights.tolist() == [1.0]


def test_a_commit_that_does_not_follow_is_refused(play: Play) -> None:
    with pytest.raises(InvalidRequest, match="committed_len"):
        play.tree.commit([1], len(play.target_ids) + 2, 3, 3)


def test_a_text_too_long_for_the_draft_is_refused(both: tuple[Tokenizer, Tokenizer]) -> None:
    play = Play(*both, buffer_len=32)
    with pytest.raises(InvalidRequest, match="more than 46 draft tokens"):
        play.commit(play.target.encode("0123456789" * 4, add_special_tokens=False))
