"""Which full pages hold which tokens, for whoever comes with the same tokens again.

A tree of pages, as SGLang's radix cache (arXiv 2312.07104) with pages for edges: a page is named by
its own tokens and the page before it, by the tokens themselves, so that no two texts can be taken
for one another. The cache is one owner of each of its pages: pages that sequences own too are in
use; the others are idle, and are evicted when their room is wanted, least recently used first and
never before what continues them. Knows page numbers and token ids; no tensors, no sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.engine.kv.pages import PAGE_SIZE, PageAllocator

TokenIds = npt.NDArray[np.integer[Any]] | Sequence[int]

# Consecutive pages are sought until this many times as many as are wanted are free.
_SEARCH = 2
_PAGE_BYTES = PAGE_SIZE * np.dtype(np.uint32).itemsize


class _Node:
    """A cached page: the tokens `key`, after those of `parent` and of all before it."""

    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, page: int, key: bytes, parent: _Node | None) -> None:
        self.page = page
        self.key = key
        self.parent = parent
        self.children: dict[bytes, _Node] = {}


class PrefixCache:
    """What takes, re-uses and releases pages goes through it, so that it knows which are idle."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._root = _Node(-1, b"", None)
        self._nodes: dict[int, _Node] = {}
        # Pages that only the cache owns, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Pages that would be free but for the cache."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that can be had: free ones, and those that are idle."""
        return self._allocator.num_free + len(self._idle)

    @property
    def pages(self) -> list[int]:
        """All that are cached, in no order."""
        return list(self._nodes)

    def num_users(self, page: int) -> int:
        """Owners of a page besides the cache."""
        return self._allocator.num_owners(page) - (page in self._nodes)

    def match(self, token_ids: TokenIds) -> list[int]:
        """The pages of the longest beginning of the tokens that is cached, in order."""
        node, path = self._root, []
        for key in _keys(token_ids):
            child = node.children.get(key)
            if child is None:
                break
            node = child
            path.append(node.page)
        self._touch(path)
        return path

    def insert(self, token_ids: TokenIds, pages: Sequence[int]) -> None:
        """The tokens are held by these pages, all of them full and owned by the caller.

        Where the same tokens are cached already, the page that is stays; the caller keeps its own.
        """
        node, path = self._root, []
        for key, page in zip(_keys(token_ids), pages, strict=True):
            child = node.children.get(key)
            if child is None:
                assert page not in self._nodes, f"page {page} is cached for other tokens"
                child = _Node(page, key, node)
                node.children[key] = self._nodes[page] = child
                self._allocator.share([page], pinned=False)
            node = child
            path.append(node.page)
        self._touch(path)

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each of these pages, which are cached or owned; it pins them."""
        self._allocator.share(pages)
        for page in pages if self._idle else ():
            self._idle.pop(page, None)

    def release(self, pages: Iterable[int], *, pinned: bool = True) -> None:
        """One owner less for each; a page without any but the cache is idle, the last ones first.

        So of one sequence's pages those that continue others are evicted before them.
        """
        for page in reversed(self._allocator.release(pages, pinned=pinned)):
            if page in self._nodes:
                self._idle[page] = None

    def forget(self, page: int) -> None:
        """The page is about to be written: neither it nor what continues it is cached any more."""
        node = self._nodes.get(page)
        if node is not None:
            for below in reversed(list(_descendants(node))):
                self._drop(below)

    def make_room(self, count: int) -> None:
        """Evicts until there is a free run of `count` pages, or enough; nothing if in vain."""
        allocator = self._allocator
        if count > self.num_available:
            return
        while self._idle and allocator.num_free < _SEARCH * count and not allocator.has_run(count):
            for _ in range(min(len(self._idle), 1 + count // 8)):  # it takes time to look
                self._evict()

    def _evict(self) -> None:
        """Gives up one page: the end of what has not been used for longest.

        One that is still in use is only not cached any more.
        """
        node = self._nodes[next(iter(self._idle))]
        while node.children:
            node = next(iter(node.children.values()))
        self._drop(node)

    def check_integrity(self) -> None:
        """Asserts that tree, pages, owners and the order of the idle ones agree."""
        below = [node for node in _descendants(self._root) if node is not self._root]
        assert len(below) == len(self._nodes), "a cached page is not in the tree, or twice"
        for node in below:
            assert self._nodes[node.page] is node, f"page {node.page} is cached as another"
            assert len(node.key) == _PAGE_BYTES, f"page {node.page} is not full"
            assert self._allocator.num_owners(node.page) > 0, f"page {node.page} is not owned"
        idle = {page for page in self._nodes if self._allocator.num_owners(page) == 1}
        assert idle == set(self._idle), "idle pages are miscounted"

    def _touch(self, path: list[int]) -> None:
        """Used just now; what continues a page counts as used before it."""
        for page in reversed(path):
            if page in self._idle:
                self._idle.move_to_end(page)

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None, "the root is no page"
        assert not node.children, "a page is dropped before what continues it"
        del node.parent.children[node.key], self._nodes[node.page]
        self._idle.pop(node.page, None)
        self._allocator.release([node.page], pinned=False)


def _keys(token_ids: TokenIds) -> Iterator[bytes]:
    """The tokens of each full page."""
    data = np.asarray(token_ids).astype(np.uint32).tobytes()
    for start in range(0, len(data) - _PAGE_BYTES + 1, _PAGE_BYTES):
        yield data[start : start + _PAGE_BYTES]


def _descendants(node: _Node) -> Iterator[_Node]:
    """The node and all below it, each after what it continues."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()
