"""Speculation: how many draft tokens a round uses, and how they are verified.

The γ policy, in reading order:

1. `acceptance`: probability that draft tokens are accepted, by position in the block.
2. `round_costs`: measured times of target and draft; `cost_book` keeps them for each replica.
3. `round_values`: the cost model, which gives the tokens per second of every γ.
4. `probing`: when rounds without draft tokens try some again.
5. `gamma`: the choice of γ and of the longest wait for draft tokens.
6. `drafting`: applies the choice to a `draft_source`.

Draft tokens without a model, and the choice among sources:

7. `lookup`: draft tokens from earlier text of the context, and their acceptance.
8. `router`: the source of each round, `drafting` or `lookup`.

Constants marked "Choice" were set by hand, neither fitted nor taken from a paper.

`verification` accepts or rejects the draft tokens of a round. Only `drafting` reads a clock.
"""
