"""Prefix cache: full pages by their tokens, re-used by sequences with the same prefix.

A tree of pages, like SGLang's radix cache (arXiv 2312.07104) with one page per edge. A page is
identified by its own tokens and the page before it. Tokens themselves are compared, not hashes, so
collisions are impossible. The cache is one owner of each cached page. Pages that sequences own too
are in use; the others are idle and are evicted when pages are needed: least recently used first,
and a page never before the pages that continue it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.engine.kv.pages import PAGE_SIZE, PageAllocator

TokenIds = npt.NDArray[np.integer[Any]] | Sequence[int]

# Evict until a run is free, but at most until this many times the wanted pages are free.
_MAX_FREE_RATIO = 2
_PAGE_BYTES = PAGE_SIZE * np.dtype(np.uint32).itemsize


class _Node:
    """Cached page with the tokens `key`, after the tokens of `parent` and its ancestors."""

    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, page: int, key: bytes, parent: _Node | None) -> None:
        self.page = page
        self.key = key
        self.parent = parent
        self.children: dict[bytes, _Node] = {}


class PrefixCache:
    """Cache of full pages. Pages are shared and released through it, so it knows idle ones."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._root = _Node(-1, b"", None)
        self._nodes: dict[int, _Node] = {}
        # Pages that only the cache owns, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Pages that only the cache owns."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free or idle."""
        return self._allocator.num_free + len(self._idle)

    @property
    def pages(self) -> list[int]:
        """All cached pages, in no particular order."""
        return list(self._nodes)

    def num_users(self, page: int) -> int:
        """Owners of a page other than the cache."""
        return self._allocator.num_owners(page) - (page in self._nodes)

    def match(self, token_ids: TokenIds) -> list[int]:
        """Pages of the longest cached prefix of the tokens, in order; they count as just used."""
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
        """Cache the tokens with these pages, all full and owned by the caller.

        If the same tokens are cached already, the cached page stays and the caller keeps its own.
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
        """Add one owner, which pins, to each of these pages, which are cached or owned."""
        self._allocator.share(pages)
        for page in pages if self._idle else ():
            self._idle.pop(page, None)

    def release(self, pages: Iterable[int], *, pinned: bool = True) -> None:
        """Remove one owner from each page; a page that only the cache owns becomes idle.

        The last pages come first, so a page that continues another is evicted before it.
        """
        for page in reversed(self._allocator.release(pages, pinned=pinned)):
            if page in self._nodes:
                self._idle[page] = None

    def forget(self, page: int) -> None:
        """Remove a page, which is about to be written, and all that continue it from the cache."""
        node = self._nodes.get(page)
        if node is not None:
            for below in reversed(list(_descendants(node))):
                self._remove(below)

    def reclaim(self, count: int) -> None:
        """Evict until a run of `count` pages is free, or twice as many pages as wanted.

        Does nothing if fewer than `count` pages are available.
        """
        allocator = self._allocator
        if count > self.num_available:
            return
        while (
            self._idle
            and allocator.num_free < _MAX_FREE_RATIO * count
            and not allocator.has_run(count)
        ):
            for _ in range(min(len(self._idle), 1 + count // 8)):  # has_run is slow
                self._evict()

    def _evict(self) -> None:
        """Evict one page: a leaf below the least recently used idle page.

        If that leaf is in use, it only leaves the cache.
        """
        node = self._nodes[next(iter(self._idle))]
        while node.children:
            node = next(iter(node.children.values()))
        self._remove(node)

    def check_integrity(self) -> None:
        """Assert that tree, pages, owners and the order of idle pages agree."""
        below = [node for node in _descendants(self._root) if node is not self._root]
        assert len(below) == len(self._nodes), "a cached page is not in the tree, or twice"
        for node in below:
            assert self._nodes[node.page] is node, f"page {node.page} is cached as another"
            assert len(node.key) == _PAGE_BYTES, f"page {node.page} is not full"
            assert self._allocator.num_owners(node.page) > 0, f"page {node.page} is not owned"
        idle = {page for page in self._nodes if self._allocator.num_owners(page) == 1}
        assert idle == set(self._idle), "idle pages are miscounted"

    def _touch(self, path: list[int]) -> None:
        """Mark pages as just used; a page that continues another counts as used before it."""
        for page in reversed(path):
            if page in self._idle:
                self._idle.move_to_end(page)

    def _remove(self, node: _Node) -> None:
        """Remove a leaf from the tree and release its page."""
        assert node.parent is not None, "the root is not a page"
        assert not node.children, "a page is removed before the pages that continue it"
        del node.parent.children[node.key], self._nodes[node.page]
        self._idle.pop(node.page, None)
        self._allocator.release([node.page], pinned=False)


def _keys(token_ids: TokenIds) -> Iterator[bytes]:
    """The tokens of each full page, as bytes."""
    data = np.asarray(token_ids).astype(np.uint32).tobytes()
    for start in range(0, len(data) - _PAGE_BYTES + 1, _PAGE_BYTES):
        yield data[start : start + _PAGE_BYTES]


def _descendants(node: _Node) -> Iterator[_Node]:
    """The node and all below it, parents before children."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()
